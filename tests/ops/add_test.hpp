#include "support/support.hpp"

#include <blackmamba/ops/add/add.hpp>

using namespace blackmamba;

TEST_CASE_TEMPLATE("add: equals its definition, in place and strided", T, STORAGE_TYPES) {
  for (std::int64_t rows : test::sizes({0, 1, 3, 130}))
    for (std::int64_t width : test::sizes({1, 15, 16, 17, 64, 65, 2056})) {
      auto const a = test::rounded<T>(test::random_normal(rows * width, 1));
      auto const b = test::rounded<T>(test::random_normal(rows * width, 2));
      test::values sum(a.size());
      for (std::size_t i = 0; i < a.size(); ++i) sum[i] = a[i] + b[i];
      auto const da = test::upload<T>(a, rows, width);
      auto const db = test::upload<T>(b, rows, width);
      auto y = test::poisoned<T>(rows, width);
      add::forward(make_policy(), da, db, y);
      test::check_close_each(test::download(y), sum, test::tolerance<T>());
      add::forward(make_policy(), da, db, da.as_view());
      test::check_equal(test::download(da), test::download(y), "in place");

      // Columns of wider matrices.
      auto const wide =
          test::upload<T>(test::values(static_cast<std::size_t>(rows * (width + 16)), 1.0), rows, width + 16);
      add::forward(make_policy(), y, db, wide.columns(8, width));
      add::forward(make_policy(), wide.columns(8, width), db, wide.columns(8, width));
      auto const after = test::download(wide);
      add::forward(make_policy(), y, db, y.as_view());
      add::forward(make_policy(), y, db, y.as_view());
      auto const twice = test::download(y);
      for (std::int64_t i = 0; i < rows; ++i)
        for (std::int64_t j = 0; j < width + 16; ++j)
          REQUIRE(after[static_cast<std::size_t>(i * (width + 16) + j)] ==
                  (j < 8 || j >= 8 + width ? 1.0 : twice[static_cast<std::size_t>(i * width + j - 8)]));
    }
}

TEST_CASE("add: shapes that disagree are named") {
  auto const a = test::upload<float>(test::values(6), 2, 3);
  auto const b = test::upload<float>(test::values(6), 3, 2);
  auto y = test::poisoned<float>(2, 3);
  CHECK(test::message_of<shape_error>([&] { add::forward(make_policy(), a, b, y); }) ==
        "add: b: got (3, 2), expected (2, 3)");
}

TEST_CASE("add: more elements than a device's threads have numbers for are turned away") {
  if constexpr (!std::is_same_v<test::test_space, space::host>) {
    auto const one = test::upload<float>(test::values(1), 1, 1);
    std::int64_t const rows = std::int64_t{1} << 33;
    // In packs, and one by one.
    for (std::int64_t width : {std::int64_t{2048}, std::int64_t{2047}}) {
      view<test::test_space, float, dyn, dyn> const large{one.data(), rows, width};
      CHECK(test::message_of<shape_error>([&] { add::forward(make_policy(), large, large, large); }) ==
            "add: got 1 rows of " + std::to_string(rows * width) + " elements, expected fewer on a device");
    }
  }
}
