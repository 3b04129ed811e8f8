#pragma once
#include <blackmamba/core/config.hpp>
#include <blackmamba/core/view.hpp>

#include <concepts>
#include <type_traits>

#if BLACKMAMBA_CUDA
#include <cuda_runtime_api.h>
#endif

namespace blackmamba {

template <class Space>
class arena;

/// Device policies: small values that say where an operator runs. Passed first, always explicit.
namespace device {

/// Runs on the host's cores; operators return when they are done.
struct cpu {
  using memory_space = space::host;

  int threads = 0;                          ///< 0: all cores
  arena<space::host>* workspace = nullptr;  ///< scratch memory; without one, operators allocate what they need
};

#if BLACKMAMBA_CUDA
/// Runs on the current CUDA device; operators are enqueued on the stream and, given a workspace, return at once.
struct cuda {
  using memory_space = space::device;

  cudaStream_t stream = nullptr;
  arena<space::device>* workspace = nullptr;  ///< scratch memory; required inside a graph capture
};
#else
/// Where there is no CUDA the name stands for one sentence.
template <bool CompiledAsCuda = false>
struct cuda_without_nvcc {
  static_assert(CompiledAsCuda,
                "blackmamba: device::cuda: this file is not compiled as CUDA; compile it with nvcc (name it .cu, link "
                "blackmamba::cuda), or choose device::cpu");
  using memory_space = space::device;
  arena<space::device>* workspace = nullptr;
};
using cuda = cuda_without_nvcc<>;
#endif

/// Runs nothing: every operator checks its arguments, takes its scratch from the workspace and returns. A step under
/// this policy with a measuring arena tells the exact peak of workspace bytes that the same step needs under P: all of
/// its device memory; on the host, small lists (of packed sequences, of threads) come from the heap besides.
template <class P>
struct dry {
  using memory_space = typename P::memory_space;
  arena<memory_space>* workspace = nullptr;
};

}  // namespace device

/// Whether P is a dry policy, under which views have sizes but no memory that may be touched.
template <class P>
inline constexpr bool is_dry = false;
template <class P>
inline constexpr bool is_dry<device::dry<P>> = true;

/// A value that names a memory space and may carry a workspace.
template <class P>
concept device_policy = requires(P p) {
  typename P::memory_space;
  { p.workspace } -> std::convertible_to<arena<typename P::memory_space>*>;
} && std::copyable<P>;

/// The implementation of operator Op under policy P. Left undefined here; an operator's sibling files (and a user's own
/// policies) specialise it.
template <class Op, class P>
struct backend;

/// Under the dry policy every member function of every operator does nothing.
template <class Op, class P>
struct backend<Op, device::dry<P>> {
  static constexpr auto nothing = [](auto const&...) {};
  static constexpr auto forward = nothing, backward = nothing, step = nothing;           // operators
  static constexpr auto plan = nothing, permute = nothing, combine = nothing;            // expert_dispatch
  static constexpr auto permute_backward = nothing, combine_backward = nothing;
  static constexpr auto norm = nothing;                                                  // adamw
  static constexpr auto zero = nothing, copy = nothing, upload = nothing, download = nothing;  // memory
};

/// Whether operator Op has an implementation under policy P in this translation unit.
template <class Op, class P>
concept implemented_on = requires { sizeof(backend<Op, P>); };

namespace detail {
template <class Op, class P>
struct checked_backend {
  static_assert(implemented_on<Op, P>,
                "blackmamba: this operator has no implementation under this device policy; include the operator's "
                "sibling file for that device, or specialise blackmamba::backend<Op, Policy>");
  using type = backend<Op, P>;
};
}  // namespace detail

/// backend<Op, P>, or one sentence that says what is missing.
template <class Op, class P>
using backend_of = typename detail::checked_backend<Op, P>::type;

namespace detail {
template <class P, class Space = typename P::memory_space>
struct home_of {
  using type = P;
};
template <class P>
struct home_of<P, space::host> {
  using type = device::cpu;
};
#if BLACKMAMBA_CUDA
template <class P>
struct home_of<P, space::device> {
  using type = device::cuda;
};
#endif
}  // namespace detail

/// The library's own policy of P's memory space; P itself in a space of its own. Argument aggregates are those of
/// home<P>, so that a policy that wraps another one hands its arguments on as they are.
template <device_policy P>
using home = typename detail::home_of<P>::type;

/// Whether a result replaces what the output holds or is added to it.
enum class update { overwrite, accumulate };

/// Operator arguments. An input never takes part in deduction, so const and static-extent conversions just work; an
/// output (or state) deduces the element type.
template <class P, class T, int... Extents>
using in = std::type_identity_t<view<typename P::memory_space, T const, Extents...>>;
template <class P, class T, int... Extents>
using out = view<typename P::memory_space, T, Extents...>;
/// An optional output: may be absent, never deduces.
template <class P, class T, int... Extents>
using optional_out = std::type_identity_t<view<typename P::memory_space, T, Extents...>>;

}  // namespace blackmamba
