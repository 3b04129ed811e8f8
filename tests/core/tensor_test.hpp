#include "support/support.hpp"

using namespace blackmamba;

namespace {

template <class T, int... E>
using owned = tensor<test::test_space, T, E...>;
template <class T, int... E>
using on_host = tensor<space::host, T, E...>;

static_assert(!std::is_copy_constructible_v<owned<float, dyn>> && !std::is_copy_assignable_v<owned<float, dyn>>);
static_assert(std::is_nothrow_move_constructible_v<owned<float, dyn>> &&
              std::is_nothrow_move_assignable_v<owned<float, dyn>>);
static_assert(std::is_convertible_v<owned<float, 2, 3>&, view<test::test_space, float const, dyn, dyn>>);

}  // namespace

TEST_CASE("tensor: owns aligned memory of its shape") {
  owned<float, dyn, 3> const x(5, 3);
  CHECK(x.present());
  CHECK(x.extents() == std::array<std::int64_t, 2>{5, 3});
  CHECK(x.contiguous());
  CHECK(reinterpret_cast<std::uintptr_t>(x.data()) % 256 == 0);
  CHECK(x.as_view().data() == x.data());
  CHECK(!owned<float, dyn>().present());
}
TEST_CASE("tensor: of size zero is present") {
  owned<float, dyn, dyn> const x(0, 7);
  CHECK(x.present());
  CHECK(x.size() == 0);
}
TEST_CASE("tensor: moves hand the memory on") {
  owned<float, dyn> a(4);
  float* const memory = a.data();
  owned<float, dyn> b(std::move(a));
  CHECK(b.data() == memory);
  CHECK(!a.present());
  owned<float, dyn> c(2);
  c = std::move(b);
  CHECK(c.data() == memory);
  CHECK(c.size() == 4);
}
TEST_CASE("memory: upload, download and zero") {
  auto const values = test::random_normal(37, 1);
  auto const x = test::upload<double>(values, 37);
  test::check_equal(test::download(x), values);
  memory::zero(make_policy(), x.as_view());
  test::check_equal(test::download(x), test::values(37, 0.0));
  test::check_equal(test::download(zeros<half>(make_policy(), 3, 4)), test::values(12, 0.0));
}
TEST_CASE("memory: copy moves or converts, also within one tensor") {
  auto const values = test::rounded<half>(test::random_normal(24, 2));
  auto const x = test::upload<float>(values, 4, 6);
  owned<half, dyn> const y(24);
  memory::copy(make_policy(), x.as_view(), y.as_view());
  test::check_equal(test::download(y), values);
  owned<double, dyn> const z(24);
  memory::copy(make_policy(), y.as_view(), z.as_view());
  test::check_equal(test::download(z), values);

  auto shifted = values;
  for (std::size_t i = 0; i < 18; ++i) shifted[i] = values[i + 6];
  memory::copy(make_policy(), x.slice(1, 3), x.slice(0, 3));
  test::check_equal(test::download(x), shifted);
}
TEST_CASE("memory: nothing to do for sizes of zero") {
  owned<float, dyn> const none(0);
  on_host<float, dyn> const host(0);
  CHECK_NOTHROW(memory::zero(make_policy(), none.as_view()));
  CHECK_NOTHROW(memory::copy(make_policy(), none.as_view(), none.as_view()));
  CHECK_NOTHROW(memory::upload(make_policy(), host.as_view(), none.as_view()));
  CHECK_NOTHROW(memory::download(make_policy(), none.as_view(), host.as_view()));
}
TEST_CASE("memory: sizes that disagree and strided views are named") {
  // Parts of larger tensors, so that the compiler sees no overrun in what must not be reached.
  owned<float, dyn, dyn> const x(4, 6), larger(8, 5);
  on_host<float, dyn> const larger_host(20);
  auto const y = larger.slice(0, 4);
  auto const host = larger_host.slice(0, 3);
  auto const policy = make_policy();
  CHECK(test::message_of<shape_error>([&] { memory::copy(policy, x.as_view(), y); }) ==
        "memory::copy: to: got (4, 5), expected (4, 6)");
  CHECK(test::message_of<shape_error>([&] { memory::copy(policy, x.columns(0, 5), y); }) ==
        "memory::copy: from, to: got a strided view, expected contiguous views");
  CHECK(test::message_of<shape_error>([&] { memory::zero(policy, x.columns(1, 2)); }) ==
        "memory::zero: x: got a strided view, expected a contiguous view");
  CHECK(test::message_of<shape_error>([&] { memory::upload(policy, host, y); }) ==
        "memory::upload: to: got (4, 5), expected (3)");
  CHECK(test::message_of<shape_error>([&] { memory::download(policy, y, host); }) ==
        "memory::download: to: got (3), expected (4, 5)");
}
