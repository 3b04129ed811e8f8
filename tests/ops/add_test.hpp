#include "support/support.hpp"

#include <blackmamba/ops/add/add.hpp>

using namespace blackmamba;

TEST_CASE_TEMPLATE("add: equals its definition, in place and strided", T, STORAGE_TYPES) {
  for (std::int64_t rows : {0, 1, 3, 130})
    for (std::int64_t width : {1, 15, 16, 17, 65}) {
      auto const a = test::rounded<T>(test::random_normal(rows * width, 1));
      auto const b = test::rounded<T>(test::random_normal(rows * width, 2));
      test::values sum(a.size());
      for (std::size_t i = 0; i < a.size(); ++i) sum[i] = a[i] + b[i];
      auto const da = test::upload<T>(a, rows, width);
      auto const db = test::upload<T>(b, rows, width);
      auto y = test::poisoned<T>(rows, width);
      add::forward(make_policy(), da, db, y);
      test::check_close(test::download(y), sum, test::tolerance<T>());
      add::forward(make_policy(), da, db, da.as_view());
      test::check_equal(test::download(da), test::download(y), "in place");
    }
}

TEST_CASE("add: shapes that disagree are named") {
  auto const a = test::upload<float>(test::values(6), 2, 3);
  auto const b = test::upload<float>(test::values(6), 3, 2);
  auto y = test::poisoned<float>(2, 3);
  CHECK(test::message_of<shape_error>([&] { add::forward(make_policy(), a, b, y); }) ==
        "add: b: got (3, 2), expected (2, 3)");
}
