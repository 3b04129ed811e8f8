#pragma once
#include <blackmamba/core/memory.hpp>
#include <blackmamba/core/view.hpp>

#include <cstddef>
#include <utility>

namespace blackmamba {

/// An owning, contiguous block of memory. A tensor is a view of what it owns and converts to one; it moves, and does
/// not copy. Memory is not initialised; zeros(policy, …) makes a zeroed one.
template <class Space, class T, int... Extents>
class tensor : public view<Space, T, Extents...> {
 public:
  using view_type = view<Space, T, Extents...>;

  tensor() = default;
  /// One extent for each dimension, the static ones included.
  template <class... Ints>
    requires(sizeof...(Ints) == sizeof...(Extents) && (std::is_integral_v<Ints> && ...))
  explicit tensor(Ints... extents) : view_type(allocate(extents...), extents...) {}
  tensor(tensor const&) = delete;
  tensor& operator=(tensor const&) = delete;
  tensor(tensor&& other) noexcept : view_type(std::exchange(other.base(), view_type{})) {}
  tensor& operator=(tensor&& other) noexcept {
    std::swap(base(), other.base());
    return *this;
  }
  ~tensor() {
    if (this->present()) memory_resource<Space>::deallocate(this->data());
  }

  /// The memory as a view, where the tensor's own type would hinder deduction.
  view_type as_view() const { return *this; }

 private:
  view_type& base() { return *this; }
  template <class... Ints>
  static T* allocate(Ints... extents) {
    std::size_t bytes = sizeof(T);
    ((bytes *= static_cast<std::size_t>(extents)), ...);
    return static_cast<T*>(memory_resource<Space>::allocate(bytes > 0 ? bytes : 1));
  }
};

/// A zeroed tensor in the policy's memory space.
template <class T, device_policy P, class... Ints>
auto zeros(P const& policy, Ints... extents) {
  tensor<typename P::memory_space, T, (static_cast<void>(extents), dyn)...> t(extents...);
  memory::zero(policy, t.as_view());
  return t;
}

}  // namespace blackmamba
