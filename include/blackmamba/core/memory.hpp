#pragma once
#include <blackmamba/core/error.hpp>
#include <blackmamba/core/numeric.hpp>
#include <blackmamba/core/policy.hpp>

#include <cstddef>
#include <cstring>
#include <new>
#include <string>

namespace blackmamba {

/// Where the bytes of a memory space come from. Specialised beside each device; allocations are aligned to 256 bytes.
/// fill() and read() (to host memory) wait for all work on the memory; they are for guarded workspaces.
template <class Space>
struct memory_resource;

template <>
struct memory_resource<space::host> {
  static constexpr std::size_t alignment = 256;

  static void* allocate(std::size_t bytes) {
    try {
      return ::operator new(bytes, std::align_val_t{alignment});
    } catch (std::bad_alloc const&) {
      throw workspace_error("memory: out of host memory: asked for " + std::to_string(bytes) + " bytes");
    }
  }
  static void deallocate(void* p) noexcept { ::operator delete(p, std::align_val_t{alignment}); }
  static void fill(void* p, int byte, std::size_t bytes) { std::memset(p, byte, bytes); }
  static void read(void* to, void const* from, std::size_t bytes) {
    if (bytes > 0) std::memcpy(to, from, bytes);
  }
};

/// Moving bytes: the one operator on memory itself. All views contiguous and of equal size, except where said.
struct memory {
  /// x = 0.
  template <device_policy P, class T, int... E>
  static void zero(P const& policy, view<typename P::memory_space, T, E...> x) {
    check_that(x.contiguous(), "memory::zero", "x", "a strided view", "a contiguous view");
    if (x.size() > 0) backend_of<memory, P>::zero(policy, x);
  }
  /// to = from, within the policy's memory space; converts between storage types.
  template <device_policy P, class From, class To, int... E, int... F>
  static void copy(P const& policy, view<typename P::memory_space, From, E...> from,
                   view<typename P::memory_space, To, F...> to) {
    check_sizes("memory::copy", from, to);
    if (from.size() > 0) backend_of<memory, P>::copy(policy, from, to);
  }
  /// to = from, host to the policy's memory space. The host memory may be reused on return: it waits until then.
  template <device_policy P, class From, class To, int... E, int... F>
    requires std::is_same_v<std::remove_const_t<From>, To>
  static void upload(P const& policy, view<space::host, From, E...> from, view<typename P::memory_space, To, F...> to) {
    check_sizes("memory::upload", from, to);
    if (from.size() > 0) backend_of<memory, P>::upload(policy, from, to);
  }
  /// to = from, the policy's memory space to host. On return the data is there: it waits for it.
  template <device_policy P, class From, class To, int... E, int... F>
    requires std::is_same_v<std::remove_const_t<From>, To>
  static void download(P const& policy, view<typename P::memory_space, From, E...> from,
                       view<space::host, To, F...> to) {
    check_sizes("memory::download", from, to);
    if (from.size() > 0) backend_of<memory, P>::download(policy, from, to);
  }

 private:
  template <class From, class To>
  static void check_sizes(char const* op, From const& from, To const& to) {
    check_that(from.size() == to.size(), op, "to", detail::shape_text(to.extents()),
               detail::shape_text(from.extents()));
    check_that(from.contiguous() && to.contiguous(), op, "from, to", "a strided view", "contiguous views");
  }
};

template <>
struct backend<memory, device::cpu> {
  template <class V>
  static void zero(device::cpu const&, V const& x) {
    std::memset(static_cast<void*>(x.data()), 0, static_cast<std::size_t>(x.size()) * sizeof(typename V::value_type));
  }
  template <class From, class To>
  static void copy(device::cpu const&, From const& from, To const& to) {
    using from_type = typename From::value_type;
    using to_type = typename To::value_type;
    if constexpr (std::is_same_v<from_type, to_type>)
      std::memmove(static_cast<void*>(to.data()), from.data(), static_cast<std::size_t>(from.size()) * sizeof(to_type));
    else
      for (std::int64_t i = 0; i < from.size(); ++i) to.data()[i] = convert<to_type>(from.data()[i]);
  }
  template <class From, class To>
  static void upload(device::cpu const& policy, From const& from, To const& to) {
    copy(policy, from, to);
  }
  template <class From, class To>
  static void download(device::cpu const& policy, From const& from, To const& to) {
    copy(policy, from, to);
  }
};

}  // namespace blackmamba

#if BLACKMAMBA_CUDA
#include <blackmamba/core/cuda/memory_cuda.cuh>
#endif
