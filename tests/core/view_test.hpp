#include "support/support.hpp"

using namespace blackmamba;

namespace {

template <int... Extents>
using floats = host_view<float, Extents...>;
template <int... Extents>
using constants = host_view<float const, Extents...>;

/// Conversions that exist, and those that must not.
static_assert(std::is_convertible_v<floats<dyn, dyn>, constants<dyn, dyn>>);
static_assert(std::is_convertible_v<floats<2, 3>, floats<dyn, 3>>);
static_assert(std::is_convertible_v<floats<2, 3>, constants<dyn, dyn>>);
static_assert(!std::is_convertible_v<constants<dyn>, floats<dyn>>);
static_assert(!std::is_convertible_v<floats<dyn, 3>, floats<dyn, 4>>);
static_assert(!std::is_convertible_v<floats<dyn, dyn>, floats<dyn, 3>>);
static_assert(!std::is_convertible_v<floats<dyn, dyn>, floats<dyn>>);
static_assert(!std::is_convertible_v<host_view<double, dyn>, floats<dyn>>);
static_assert(!std::is_convertible_v<view<space::device, float, dyn>, floats<dyn>>);
static_assert(!std::is_convertible_v<floats<dyn>, view<space::device, float, dyn>>);
static_assert(floats<dyn, 3>::rank == 2 && std::is_same_v<constants<dyn>::value_type, float>);
static_assert(std::is_trivially_copyable_v<floats<dyn, dyn>>);

struct numbered {
  float data[120];
  numbered() {
    for (int i = 0; i < 120; ++i) data[i] = static_cast<float>(i);
  }
};

constexpr float storage_for_constants[6] = {0, 1, 2, 3, 4, 5};
constexpr constants<dyn, 3> compile_time(storage_for_constants, 2, 3);
static_assert(compile_time(1, 2) == 5 && compile_time.size() == 6 && compile_time.extent<1>() == 3);

}  // namespace

TEST_CASE("view: a default-constructed one is absent and empty") {
  floats<dyn, 4> const x;
  CHECK(!x.present());
  CHECK(x.size() == 0);
  CHECK(x.data() == nullptr);
}
TEST_CASE("view: contiguous elements in row-major order") {
  numbered n;
  floats<dyn, dyn, dyn> const x(n.data, 4, 5, 6);
  CHECK(x.present());
  CHECK(x.size() == 120);
  CHECK(x.extents() == std::array<std::int64_t, 3>{4, 5, 6});
  CHECK(x.stride(0) == 30);
  CHECK(x.stride(1) == 6);
  CHECK(x.stride(2) == 1);
  CHECK(x(3, 2, 1) == 103);
  CHECK(x.row(3, 2) == n.data + 102);
  CHECK(x.contiguous());
  CHECK(x.foldable());
  CHECK(floats<dyn, dyn, dyn>(n.data, std::array<std::int64_t, 3>{4, 5, 6})(3, 2, 1) == 103);
  x(0, 0, 0) = 7;
  CHECK(n.data[0] == 7);
}
TEST_CASE("view: static extents are constants, conversion keeps shape and strides") {
  numbered n;
  floats<4, 5> const x(n.data, 4, 5);
  CHECK(x.extent<0>() == 4);
  CHECK(x.extent<1>() == 5);
  constants<dyn, dyn> const y = x;
  CHECK(y.extents() == x.extents());
  CHECK(y(3, 4) == 19);
  constants<dyn, dyn> const part = x.columns(1, 2);
  CHECK(part.stride(0) == 5);
  CHECK(part(3, 1) == 17);
}
TEST_CASE("view: slices and columns") {
  numbered n;
  floats<dyn, dyn> const x(n.data, 10, 12);
  auto const columns = x.columns(3, 4);
  CHECK(columns.extents() == std::array<std::int64_t, 2>{10, 4});
  CHECK(columns(2, 3) == 30);
  CHECK(!columns.contiguous());
  CHECK(columns.foldable());
  auto const slice = x.slice(2, 3);
  CHECK(slice.extents() == std::array<std::int64_t, 2>{3, 12});
  CHECK(slice(1, 1) == 37);
  CHECK(slice.contiguous());
  auto const both = columns.slice(9, 1);
  CHECK(both(0, 0) == 111);
  CHECK(both.contiguous());  // one row: its stride does not matter
  CHECK(x.columns(12, 0).size() == 0);
  CHECK(x.slice(10, 0).size() == 0);
}
TEST_CASE("view: leading dimensions as rows") {
  numbered n;
  floats<dyn, dyn, dyn> const x(n.data, 4, 5, 6);
  auto const rows = x.rows();
  CHECK(rows.extents() == std::array<std::int64_t, 2>{20, 6});
  CHECK(rows(7, 2) == 44);
  auto const part = x.columns(2, 3);
  CHECK(part.foldable());
  CHECK(part.rows().stride(0) == 6);
  CHECK(part.rows()(19, 1) == 117);
  floats<dyn, dyn, dyn> const gap(n.data, {2, 2, 6}, {30, 6, 1});  // rows 2 to 4 of each slice left out
  CHECK(!gap.foldable());
  CHECK(gap.slice(1, 1).foldable());
  CHECK(gap(1, 1, 0) == 36);
}
TEST_CASE("view: another shape over the same elements") {
  numbered n;
  floats<dyn, dyn> const x(n.data, 10, 12);
  auto const y = x.reshape(2, 5, 12);
  static_assert(decltype(y)::rank == 3);
  CHECK(y(1, 2, 3) == 87);
  CHECK(x.reshape(std::int64_t{120})(119) == 119);
}
TEST_CASE("view: sizes of zero") {
  numbered n;
  floats<dyn, dyn, dyn> const x(n.data, 0, 5, 6);
  CHECK(x.size() == 0);
  CHECK(x.present());
  CHECK(x.contiguous());
  CHECK(x.rows().extents() == std::array<std::int64_t, 2>{0, 6});
  floats<dyn, dyn> const y(n.data, 3, 0);
  CHECK(y.size() == 0);
  CHECK(y.contiguous());
}
TEST_CASE("view: offsets beyond 32 bits") {
  view<space::host, char, dyn, dyn> const x(static_cast<char*>(nullptr), std::int64_t{3} << 20, std::int64_t{1} << 20);
  CHECK(x.size() == std::int64_t{3} << 40);
  CHECK(x.stride(0) == std::int64_t{1} << 20);
}
