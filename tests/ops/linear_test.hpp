#include "support/sums.hpp"
#include "support/support.hpp"

#include <blackmamba/ops/linear/linear.hpp>

#include <string>

using namespace blackmamba;

namespace {

/// Rows, inputs, outputs.
struct shape {
  std::int64_t rows, width, outputs;
};

/// What the operator is called with, as it sees it: rounded to the types that it is stored in.
struct problem {
  shape size;
  test::values x, weight, bias, d_y;

  template <class T, class Y = T>
  static problem make(shape s, bool with_bias = true) {
    return {s, test::rounded<T>(test::random_normal(s.rows * s.width, 1)),
            test::rounded<T>(test::random_normal(s.outputs * s.width, 2)),
            with_bias ? test::rounded<accum_t<T>>(test::random_normal(s.outputs, 3)) : test::values{},
            test::rounded<Y>(test::random_normal(s.rows * s.outputs, 4))};
  }
};

std::size_t at(std::int64_t row, std::int64_t width, std::int64_t column) {
  return static_cast<std::size_t>(row * width + column);
}

/// The definition, in double.
test::sums reference(problem const& p) {
  auto const [rows, width, outputs] = p.size;
  test::sums y(p.d_y.size());
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t o = 0; o < outputs; ++o) {
      auto& s = y[at(r, outputs, o)];
      if (!p.bias.empty()) s.add(p.bias[static_cast<std::size_t>(o)]);
      for (std::int64_t i = 0; i < width; ++i) s.add(p.x[at(r, width, i)] * p.weight[at(o, width, i)]);
    }
  return y;
}

template <class T, class Y = T>
test::values run(problem const& p, test_policy policy = make_policy()) {
  auto const [rows, width, outputs] = p.size;
  auto const x = test::upload<T>(p.x, rows, width);
  auto const weight = test::upload<T>(p.weight, outputs, width);
  auto y = test::poisoned<Y>(rows, outputs);
  if (p.bias.empty()) {
    linear::forward<test_policy, Y, T>(policy, {.x = x, .weight = weight}, y);
  } else {
    auto const bias = test::upload<accum_t<T>>(p.bias, outputs);
    linear::forward<test_policy, Y, T>(policy, {.x = x, .weight = weight, .bias = bias}, y);
  }
  return test::download(y);
}

struct result {
  test::values d_x, d_weight, d_bias;
};

struct expected_result {
  test::sums d_x, d_weight, d_bias;
};

/// The definition of the gradients, in double, added to what `before` holds.
expected_result reference_backward(problem const& p, result const& before) {
  auto const [rows, width, outputs] = p.size;
  auto const started = [](test::values const& v) {
    test::sums s(v.size());
    for (std::size_t i = 0; i < v.size(); ++i) s[i].add(v[i]);
    return s;
  };
  expected_result d{started(before.d_x), started(before.d_weight), started(before.d_bias)};
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t o = 0; o < outputs; ++o) {
      double const g = p.d_y[at(r, outputs, o)];
      d.d_bias[static_cast<std::size_t>(o)].add(g);
      for (std::int64_t i = 0; i < width; ++i) {
        d.d_x[at(r, width, i)].add(g * p.weight[at(o, width, i)]);
        d.d_weight[at(o, width, i)].add(g * p.x[at(r, width, i)]);
      }
    }
  return d;
}

/// What the gradients hold before: nothing in d_x where it is overwritten.
template <class T>
result initial(problem const& p, update d_x_update) {
  auto const [rows, width, outputs] = p.size;
  using A = accum_t<T>;
  return {d_x_update == update::accumulate ? test::rounded<T>(test::random_normal(rows * width, 5))
                                           : test::values(p.x.size(), 0.0),
          test::rounded<A>(test::random_normal(outputs * width, 6)), test::rounded<A>(test::random_normal(outputs, 7))};
}

template <class T, class Y = T>
result run_backward(problem const& p, result const& before, update d_x_update, test_policy policy = make_policy()) {
  using A = accum_t<T>;
  auto const [rows, width, outputs] = p.size;
  auto const x = test::upload<T>(p.x, rows, width);
  auto const weight = test::upload<T>(p.weight, outputs, width);
  auto const d_y = test::upload<Y>(p.d_y, rows, outputs);
  auto d_x =
      d_x_update == update::accumulate ? test::upload<T>(before.d_x, rows, width) : test::poisoned<T>(rows, width);
  auto d_weight = test::upload<A>(before.d_weight, outputs, width);
  auto d_bias = test::upload<A>(before.d_bias, outputs);
  linear::backward<test_policy, T, Y>(policy, {.x = x, .weight = weight, .d_y = d_y},
                                      {.d_x = d_x, .d_weight = d_weight, .d_bias = d_bias, .d_x_update = d_x_update});
  return {test::download(d_x), test::download(d_weight), test::download(d_bias)};
}

std::string name_of(shape s) {
  return "(" + std::to_string(s.rows) + ", " + std::to_string(s.width) + ") to " + std::to_string(s.outputs);
}
template <class T, class Y = T>
void check_forward(shape s, bool bias) {
  auto const p = problem::make<T, Y>(s, bias);
  test::check_sums<Y>(run<T, Y>(p), reference(p), s.width + 1, "y of " + name_of(s));
}
template <class T, class Y = T>
void check_backward(shape s, update d_x_update) {
  using A = accum_t<T>;
  auto const p = problem::make<T, Y>(s);
  auto const before = initial<T>(p, d_x_update);
  auto const expected = reference_backward(p, before);
  auto const actual = run_backward<T, Y>(p, before, d_x_update);
  test::check_sums<T>(actual.d_x, expected.d_x, s.outputs + 1, "d_x of " + name_of(s));
  test::check_sums<A>(actual.d_weight, expected.d_weight, s.rows + 1, "d_weight of " + name_of(s));
  test::check_sums<A>(actual.d_bias, expected.d_bias, s.rows + 1, "d_bias of " + name_of(s));
}

}  // namespace

TEST_CASE_TEMPLATE("linear: equals its definition at every size and type", T, STORAGE_TYPES) {
  using A = accum_t<T>;
  for (std::int64_t rows : test::sizes({0, 1, 2, 3, 5, 8, 9, 65}))
    for (std::int64_t width : test::sizes({0, 1, 10, 16, 17, 65}))
      for (std::int64_t outputs : test::sizes({0, 1, 7, 16, 42, 65}))
        for (bool bias : {false, true}) {
          check_forward<T>({rows, width, outputs}, bias);
          check_forward<T, A>({rows, width, outputs}, bias);
        }
  for (shape s : {shape{1, 1000, 301}, {6, 1000, 301}, {130, 1000, 301}, {129, 386, 241}, {1, 23000, 3}, {8, 23000, 3}})
    check_forward<T>(s, true);
}

TEST_CASE_TEMPLATE("linear: gradients equal their definition at every size and type", T, STORAGE_TYPES) {
  using A = accum_t<T>;
  for (auto mode : {update::overwrite, update::accumulate}) {
    for (std::int64_t rows : test::sizes({0, 1, 3, 9, 65}))
      for (std::int64_t width : test::sizes({0, 1, 10, 17, 65}))
        for (std::int64_t outputs : test::sizes({0, 1, 16, 42})) {
          check_backward<T>({rows, width, outputs}, mode);
          check_backward<T, A>({rows, width, outputs}, mode);
        }
    for (shape s : {shape{1023, 20, 30}, {1024, 20, 30}, {1500, 250, 20}, {130, 130, 400}}) check_backward<T>(s, mode);
  }
}

TEST_CASE_TEMPLATE("linear: equals its definition where rows are aligned, over several tiles", T, bfloat16,
                   blackmamba::half) {
  using A = accum_t<T>;
  for (std::int64_t rows : test::sizes({1, 4, 16, 17, 130, 300}))
    for (shape s : {shape{rows, 64, 264}, {rows, 200, 16}, {rows, 1032, 72}, {rows, 320, 8}})
      for (bool bias : {false, true}) {
        check_forward<T>(s, bias);
        check_forward<T, A>(s, bias);
      }
  for (shape s : {shape{300, 136, 520}, {700, 264, 8}}) {
    check_backward<T>(s, update::overwrite);
    check_backward<T>(s, update::accumulate);
    check_backward<T, A>(s, update::accumulate);
  }
}

TEST_CASE_TEMPLATE("linear: a few outputs of many rows, as a router has them", T, STORAGE_TYPES) {
  using A = accum_t<T>;
  for (std::int64_t outputs : test::sizes({2, 8, 9, 64}))
    for (shape s : {shape{2500, 48, outputs}, {1100, 61, outputs}}) {
      check_forward<T, A>(s, true);
      check_backward<T, A>(s, update::overwrite);
      check_backward<T, A>(s, update::accumulate);
    }
}

TEST_CASE_TEMPLATE("linear: two runs give the same bits", T, float, bfloat16) {
  using A = accum_t<T>;
  for (shape s : {shape{3, 1480, 520}, {2500, 328, 8}, {600, 328, 520}}) {
    auto const p = problem::make<T, A>(s);
    auto const before = initial<T>(p, update::accumulate);
    auto const y = run<T, A>(p);
    auto const d = run_backward<T, A>(p, before, update::accumulate);
    for (int i = 0; i < 3; ++i) {
      test::check_equal(run<T, A>(p), y, "y");
      auto const again = run_backward<T, A>(p, before, update::accumulate);
      test::check_equal(again.d_x, d.d_x, "d_x");
      test::check_equal(again.d_weight, d.d_weight, "d_weight");
      test::check_equal(again.d_bias, d.d_bias, "d_bias");
    }
  }
}

TEST_CASE("linear: gradients equal central differences") {
  for (shape s : {shape{3, 5, 4}, {11, 3, 7}}) {
    auto const p = problem::make<double>(s);
    result const zero{test::values(p.x.size()), test::values(p.weight.size()), test::values(p.bias.size())};
    auto const g = run_backward<double>(p, zero, update::overwrite);
    auto const loss = [&](test::values problem::*which) {
      return [&p, which](test::values const& v) {
        problem moved = p;
        moved.*which = v;
        return test::weighted_sum(run<double>(moved), p.d_y);
      };
    };
    test::check_gradient(loss(&problem::x), p.x, g.d_x, "d_x");
    test::check_gradient(loss(&problem::weight), p.weight, g.d_weight, "d_weight");
    test::check_gradient(loss(&problem::bias), p.bias, g.d_bias, "d_bias");
  }
}

TEST_CASE("linear: gradients that are not wanted change nothing of the others") {
  shape const s{1100, 20, 30};
  auto const p = problem::make<float>(s);
  auto const before = initial<float>(p, update::overwrite);
  auto const all = run_backward<float>(p, before, update::overwrite);
  auto const x = test::upload<float>(p.x, s.rows, s.width);
  auto const weight = test::upload<float>(p.weight, s.outputs, s.width);
  auto const d_y = test::upload<float>(p.d_y, s.rows, s.outputs);
  auto d_x = test::poisoned<float>(s.rows, s.width);
  auto d_weight = test::upload<float>(before.d_weight, s.outputs, s.width);
  auto d_bias = test::upload<float>(before.d_bias, s.outputs);
  auto const backward = [&](linear::gradients<test_policy, float> const& d) {
    linear::backward(make_policy(), {.x = x, .weight = weight, .d_y = d_y}, d);
  };
  backward({});
  test::check_equal(test::download(d_bias), before.d_bias, "d_bias");
  backward({.d_x = d_x});
  test::check_equal(test::download(d_x), all.d_x, "d_x");
  test::check_equal(test::download(d_weight), before.d_weight, "d_weight");
  backward({.d_weight = d_weight});
  test::check_equal(test::download(d_weight), all.d_weight, "d_weight");
  backward({.d_bias = d_bias});
  test::check_equal(test::download(d_bias), all.d_bias, "d_bias");
}

TEST_CASE("linear: takes strided rows and leaves what lies between them") {
  for (std::int64_t rows : {3, 40}) {
    std::int64_t const width = 19, outputs = 23;
    auto const p = problem::make<bfloat16>({rows, width, outputs});
    // The operands are the middle columns of wider matrices.
    auto const widened = [&](test::values const& v, std::int64_t columns) {
      auto wide = test::rounded<bfloat16>(test::random_normal(rows * 2 * columns, 9));
      for (std::int64_t r = 0; r < rows; ++r)
        for (std::int64_t i = 0; i < columns; ++i) wide[at(r, 2 * columns, 5 + i)] = v[at(r, columns, i)];
      return wide;
    };
    auto const weight = test::upload<bfloat16>(p.weight, outputs, width);
    auto const bias = test::upload<float>(p.bias, outputs);
    auto const x = test::upload<bfloat16>(widened(p.x, width), rows, 2 * width);
    auto const y_before = widened(test::values(p.d_y.size()), outputs);
    auto y = test::upload<bfloat16>(y_before, rows, 2 * outputs);
    linear::forward(make_policy(), {.x = x.columns(5, width), .weight = weight, .bias = bias}, y.columns(5, outputs));

    result const before = initial<bfloat16>(p, update::accumulate);
    auto const d_y = test::upload<bfloat16>(widened(p.d_y, outputs), rows, 2 * outputs);
    auto d_x = test::upload<bfloat16>(widened(before.d_x, width), rows, 2 * width);
    auto d_weight = test::upload<float>(before.d_weight, outputs, width);
    auto d_bias = test::upload<float>(before.d_bias, outputs);
    linear::backward<test_policy, bfloat16>(
        make_policy(), {.x = x.columns(5, width), .weight = weight, .d_y = d_y.columns(5, outputs)},
        {.d_x = d_x.columns(5, width), .d_weight = d_weight, .d_bias = d_bias, .d_x_update = update::accumulate});

    auto const expected = run_backward<bfloat16>(p, before, update::accumulate);
    test::check_equal(test::download(y), widened(run<bfloat16>(p), outputs), "y and its surroundings");
    test::check_equal(test::download(d_x), widened(expected.d_x, width), "d_x and its surroundings");
    test::check_equal(test::download(d_weight), expected.d_weight, "d_weight");
    test::check_equal(test::download(d_bias), expected.d_bias, "d_bias");
  }
}

TEST_CASE_TEMPLATE("linear: the same bits for any number of threads", P, test_policy) {
  if constexpr (requires(P p) { p.threads; })
    for (shape s : {shape{1, 300, 700}, {7, 300, 700}, {2100, 50, 90}}) {
      auto const p = problem::make<bfloat16>(s);
      auto const before = initial<bfloat16>(p, update::overwrite);
      auto const y = run<bfloat16, float>(p);
      auto const d = run_backward<bfloat16>(p, before, update::overwrite);
      for (int threads : {1, 2, 5}) {
        P policy = make_policy();
        policy.threads = threads;
        test::check_equal(run<bfloat16, float>(p, policy), y, "y");
        auto const again = run_backward<bfloat16>(p, before, update::overwrite, policy);
        test::check_equal(again.d_x, d.d_x, "d_x");
        test::check_equal(again.d_weight, d.d_weight, "d_weight");
        test::check_equal(again.d_bias, d.d_bias, "d_bias");
      }
    }
}

TEST_CASE("linear: scratch is what scratch_bytes says, and what a dry run measures") {
  for (shape s : {shape{100, 20, 30}, {1024, 20, 30}, {5000, 300, 200}}) {
    auto const p = problem::make<float>(s);
    auto const before = initial<float>(p, update::overwrite);
    auto const expected = run_backward<float>(p, before, update::overwrite);
    arena<test::test_space> workspace(linear::scratch_bytes<float, test::test_space>(s.rows, s.width, s.outputs));
    test_policy policy = make_policy();
    policy.workspace = &workspace;
    auto const actual = run_backward<float>(p, before, update::overwrite, policy);
    test::check_equal(actual.d_weight, expected.d_weight, "d_weight");
    CHECK(workspace.used() == 0);
    CHECK(workspace.peak() == workspace.capacity());

    auto measuring = arena<test::test_space>::measuring();
    device::dry<test_policy> const dry{&measuring};
    auto const x = test::upload<float>(p.x, s.rows, s.width);
    auto const weight = test::upload<float>(p.weight, s.outputs, s.width);
    auto d_y = test::upload<float>(p.d_y, s.rows, s.outputs);
    auto d_weight = test::upload<float>(before.d_weight, s.outputs, s.width);
    linear::forward(dry, {.x = x, .weight = weight}, d_y.as_view());
    linear::backward<device::dry<test_policy>, float>(dry, {.x = x, .weight = weight, .d_y = d_y},
                                                      {.d_weight = d_weight});
    CHECK(measuring.peak() == workspace.peak());
    test::check_equal(test::download(d_y), p.d_y, "a dry run's output");
    test::check_equal(test::download(d_weight), before.d_weight, "a dry run's gradient");
  }
}

TEST_CASE("linear: more shapes than are remembered at a time") {
  auto const first = problem::make<float>({40, 24, 56}, false);
  auto const before = run<float>(first);
  for (std::int64_t rows = 1; rows <= 40; ++rows)
    for (std::int64_t outputs = 17; outputs < 48; ++outputs) check_forward<float>({rows, 12, outputs}, false);
  test::check_equal(run<float>(first), before, "the first one again");
}

TEST_CASE("linear: shapes that disagree are named") {
  auto const x = test::upload<float>(test::values(12), 3, 4);
  auto const weight = test::upload<float>(test::values(20), 5, 4);
  auto const narrow = test::upload<float>(test::values(15), 5, 3);
  auto const bias = test::upload<float>(test::values(4), 4);
  auto y = test::poisoned<float>(3, 5);
  auto short_y = test::poisoned<float>(2, 5);
  auto const message = [](auto&& f) { return test::message_of<shape_error>(f); };
  CHECK(message([&] { linear::forward(make_policy(), {.x = x, .weight = weight}, short_y); }) ==
        "linear: x: got (3, 4), expected (2, any)");
  CHECK(message([&] { linear::forward(make_policy(), {.x = x, .weight = narrow}, y); }) ==
        "linear: weight: got (5, 3), expected (5, 4)");
  CHECK(message([&] { linear::forward(make_policy(), {.x = x, .weight = weight, .bias = bias}, y); }) ==
        "linear: bias: got (4), expected (5)");
  auto const backward = [&](auto const& w, auto const& d_y, linear::gradients<test_policy, float> const& d) {
    return message([&] { linear::backward<test_policy, float>(make_policy(), {.x = x, .weight = w, .d_y = d_y}, d); });
  };
  CHECK(backward(bias.reshape(1, 4), y, {}) == "linear.backward: weight: got (1, 4), expected (5, any)");
  CHECK(backward(narrow, y, {}) == "linear.backward: x: got (3, 4), expected (3, 3)");
  CHECK(backward(weight, y, {.d_x = y}) == "linear.backward: d_x: got (3, 5), expected (3, 4)");
  CHECK(backward(weight, y, {.d_weight = y}) == "linear.backward: d_weight: got (3, 5), expected (5, 4)");
  CHECK(backward(weight, y, {.d_bias = zeros<float>(make_policy(), 4)}) ==
        "linear.backward: d_bias: got (4), expected (5)");
}
