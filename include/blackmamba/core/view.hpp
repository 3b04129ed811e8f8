#pragma once
#include <blackmamba/core/config.hpp>

#include <array>
#include <cstdint>
#include <type_traits>

namespace blackmamba {

/// An extent known at run time.
inline constexpr int dyn = -1;

/// Memory spaces. A view's space is part of its type: host and device memory can't be mixed up.
namespace space {
struct host {};
struct device {};
}  // namespace space

/// A non-owning, typed, strided block of memory: space, element type and rank are static, each extent static or dyn.
///
/// The last dimension is contiguous; every other has its own stride (in elements, 64-bit), so that a slice of columns
/// is a view too. A default-constructed view is absent: optional arguments are views that may be absent. Copying a view
/// copies the reference, not the data; constness of the data is T's. Preconditions are asserted in debug builds on the
/// host (BLACKMAMBA_ASSERT).
template <class Space, class T, int... Extents>
class view {
 public:
  using space_type = Space;
  using element_type = T;
  using value_type = std::remove_const_t<T>;
  static constexpr int rank = sizeof...(Extents);
  using shape_type = std::array<std::int64_t, static_cast<std::size_t>(rank)>;
  static_assert(rank >= 1, "blackmamba: view: a view has at least one dimension");

  /// Absent: no data, every extent zero.
  constexpr view() = default;

  /// Contiguous, row-major. One extent for each dimension, the static ones included.
  template <class... Ints>
    requires(sizeof...(Ints) == rank && (std::is_integral_v<Ints> && ...))
  BLACKMAMBA_HD constexpr view(T* data, Ints... extents) : data_(data), extent_{static_cast<std::int64_t>(extents)...} {
    make_contiguous();
  }
  constexpr view(T* data, shape_type const& extents) : data_(data) {
    for (int i = 0; i < rank; ++i) extent_[i] = extents[static_cast<std::size_t>(i)];
    make_contiguous();
  }
  /// Strided; the last stride must be 1.
  constexpr view(T* data, shape_type const& extents, shape_type const& strides) : data_(data) {
    for (int i = 0; i < rank; ++i) {
      extent_[i] = extents[static_cast<std::size_t>(i)];
      stride_[i] = strides[static_cast<std::size_t>(i)];
    }
  }

  /// From a view of the same space and rank: mutable to const, and static to dynamic extents.
  template <class U, int... Others>
    requires(sizeof...(Others) == rank && std::is_convertible_v<U (*)[], T (*)[]> &&
             ((Extents == dyn || Extents == Others) && ...))
  BLACKMAMBA_HD constexpr view(view<Space, U, Others...> const& other) : data_(other.data()) {
    for (int i = 0; i < rank; ++i) {
      extent_[i] = other.extent(i);
      stride_[i] = other.stride(i);
    }
  }

  BLACKMAMBA_HD constexpr T* data() const { return data_; }
  BLACKMAMBA_HD constexpr bool present() const { return data_ != nullptr; }
  BLACKMAMBA_HD constexpr std::int64_t extent(int i) const { return extent_[i]; }
  /// The i-th extent; a constant where it is static, so that loops over it unroll.
  template <int I>
  BLACKMAMBA_HD constexpr std::int64_t extent() const {
    constexpr int fixed[] = {Extents...};
    if constexpr (fixed[I] != dyn)
      return fixed[I];
    else
      return extent_[I];
  }
  BLACKMAMBA_HD constexpr std::int64_t stride(int i) const { return stride_[i]; }
  constexpr shape_type extents() const {
    shape_type e{};
    for (int i = 0; i < rank; ++i) e[static_cast<std::size_t>(i)] = extent_[i];
    return e;
  }
  /// Number of elements.
  BLACKMAMBA_HD constexpr std::int64_t size() const {
    std::int64_t n = 1;
    for (int i = 0; i < rank; ++i) n *= extent_[i];
    return n;
  }
  /// Whether elements lie without gaps in row-major order. Dimensions of extent one may have any stride.
  BLACKMAMBA_HD constexpr bool contiguous() const {
    std::int64_t expected = 1;
    for (int i = rank - 1; i >= 0; --i) {
      if (extent_[i] != 1 && stride_[i] != expected) return false;
      expected *= extent_[i];
    }
    return true;
  }

  /// The element at the given indices. Precondition: each lies in its dimension.
  template <class... Ints>
    requires(sizeof...(Ints) == rank)
  BLACKMAMBA_HD constexpr T& operator()(Ints... indices) const {
    BLACKMAMBA_ASSERT(within(indices...));
    return data_[offset(indices...)];
  }
  /// Pointer to the last dimension's first element at the given leading indices.
  template <class... Ints>
    requires(sizeof...(Ints) == rank - 1)
  BLACKMAMBA_HD constexpr T* row(Ints... indices) const {
    return data_ + offset(indices..., 0);
  }

  /// All leading dimensions as one: (R, D). Precondition: the leading dimensions are without gaps among themselves
  /// (foldable()).
  BLACKMAMBA_HD constexpr view<Space, T, dyn, dyn> rows() const
    requires(rank >= 2)
  {
    std::int64_t r = 1;
    for (int i = 0; i + 1 < rank; ++i) r *= extent_[i];
    view<Space, T, dyn, dyn> folded(data_, r, extent_[rank - 1]);
    folded.set_stride(0, stride_[rank - 2]);
    return folded;
  }
  /// Whether rows() describes this view.
  BLACKMAMBA_HD constexpr bool foldable() const {
    for (int i = 0; i + 2 < rank; ++i)
      if (extent_[i] != 1 && stride_[i] != stride_[i + 1] * extent_[i + 1]) return false;
    return true;
  }
  /// The same memory with another shape. Precondition: contiguous, same size.
  template <class... Ints>
  BLACKMAMBA_HD constexpr auto reshape(Ints... extents) const {
    view<Space, T, (static_cast<void>(extents), dyn)...> const shaped(data_, extents...);
    BLACKMAMBA_ASSERT(!present() || (contiguous() && shaped.size() == size()));
    return shaped;
  }
  /// Columns [first, first + count) of the last dimension; strides stay.
  BLACKMAMBA_HD constexpr auto columns(std::int64_t first, std::int64_t count) const {
    auto part = as_dynamic();
    part.narrow(rank - 1, first, count);
    return part;
  }
  /// Indices [first, first + count) of the first dimension; strides stay.
  BLACKMAMBA_HD constexpr auto slice(std::int64_t first, std::int64_t count) const {
    auto part = as_dynamic();
    part.narrow(0, first, count);
    return part;
  }
  /// The same view with every extent dyn.
  BLACKMAMBA_HD constexpr auto as_dynamic() const {
    return view<Space, T, (static_cast<void>(Extents), dyn)...>(*this);
  }

  /// Restricts dimension i to [first, first + count). Precondition: that range lies in the dimension, which is dyn or
  /// keeps its extent.
  BLACKMAMBA_HD constexpr void narrow(int i, std::int64_t first, std::int64_t count) {
    BLACKMAMBA_ASSERT(!present() || (first >= 0 && count >= 0 && first + count <= extent_[i]));
    data_ += first * stride_[i];
    extent_[i] = count;
  }
  BLACKMAMBA_HD constexpr void set_stride(int i, std::int64_t stride) { stride_[i] = stride; }

 private:
  template <class... Ints>
  BLACKMAMBA_HD constexpr bool within(Ints... indices) const {
    int i = 0;
    return (... && (static_cast<std::int64_t>(indices) >= 0 && static_cast<std::int64_t>(indices) < extent_[i++]));
  }
  BLACKMAMBA_HD constexpr void make_contiguous() {
    std::int64_t s = 1;
    for (int i = rank - 1; i >= 0; --i) {
      stride_[i] = s;
      s *= extent_[i];
    }
  }
  template <class... Ints>
  BLACKMAMBA_HD constexpr std::int64_t offset(Ints... indices) const {
    std::int64_t const index[] = {static_cast<std::int64_t>(indices)...};
    std::int64_t o = index[rank - 1];
    for (int i = 0; i + 1 < rank; ++i) o += index[i] * stride_[i];
    return o;
  }

  T* data_ = nullptr;
  std::int64_t extent_[sizeof...(Extents)] = {};
  std::int64_t stride_[sizeof...(Extents)] = {};
};

template <class T, int... Extents>
using host_view = view<space::host, T, Extents...>;

}  // namespace blackmamba
