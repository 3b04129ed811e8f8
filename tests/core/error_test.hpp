#include "support/support.hpp"

using namespace blackmamba;

TEST_CASE("error: a shape that disagrees names operator, argument, got and expected") {
  float data[24] = {};
  host_view<float, dyn, dyn> const x(data, 4, 6);
  CHECK_NOTHROW(check_shape("op", "x", x, {4, 6}));
  CHECK_NOTHROW(check_shape("op", "x", x, {-1, 6}));
  CHECK(test::message_of<shape_error>([&] {
          check_shape("op", "x", x, {4, 5});
        }) == "op: x: got (4, 6), expected (4, 5)");
  CHECK(test::message_of<shape_error>([&] {
          check_shape("op", "x", x, {-1, 5});
        }) == "op: x: got (4, 6), expected (any, 5)");
  CHECK(test::message_of<shape_error>([&] { check_shape("op.backward", "x", x, {24}); }) ==
        "op.backward: x: got (4, 6), expected (24)");
  CHECK(test::message_of<shape_error>([&] { check_shape("op", "x", host_view<float, dyn>{}, {3}); }) ==
        "op: x: got (0), expected (3)");
}
TEST_CASE("error: an optional argument may be absent, and is checked where present") {
  float data[24] = {};
  CHECK_NOTHROW(check_optional_shape("op", "bias", host_view<float, dyn>{}, {3}));
  CHECK(test::message_of<shape_error>([&] {
          check_optional_shape("op", "bias", host_view<float, dyn>(data, 24), {3});
        }) == "op: bias: got (24), expected (3)");
}
TEST_CASE("error: other conditions on arguments") {
  CHECK_NOTHROW(check_that(true, "op", "x", "a", "b"));
  CHECK(test::message_of<shape_error>([&] { check_that(false, "op", "x", "a strided view", "a contiguous view"); }) ==
        "op: x: got a strided view, expected a contiguous view");
}
TEST_CASE("error: one base for all") {
  static_assert(std::is_base_of_v<error, shape_error> && std::is_base_of_v<error, value_error> &&
                std::is_base_of_v<error, workspace_error> && std::is_base_of_v<error, file_error> &&
                std::is_base_of_v<std::runtime_error, error>);
  CHECK(test::message_of<error>([] { throw value_error("token 7"); }) == "token 7");
}
