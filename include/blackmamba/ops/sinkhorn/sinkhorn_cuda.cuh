#pragma once
#include <blackmamba/core/cuda/vector_cuda.cuh>
#include <blackmamba/ops/sinkhorn/sinkhorn_general_cuda.cuh>
#include <blackmamba/ops/sinkhorn/sinkhorn_resident_cuda.cuh>

namespace blackmamba {

template <>
struct backend<sinkhorn, device::cuda> {
  template <class A>
  static void forward(device::cuda const& policy, view<space::device, A const, dyn, dyn> logits,
                      view<space::device, A, dyn> offset, view<space::device, sinkhorn::report, dyn> result,
                      sinkhorn::options const& how, view<space::device, A, dyn, dyn> plan,
                      sinkhorn::work<device::cuda, A> const& space) {
    std::int64_t const rows = logits.extent(0), experts = logits.extent(1);
    bool const sound = how.mode == sinkhorn::mode::sound;
    cuda::detail::sinkhorn_arguments<A> const arguments{
        .rows = rows,
        .experts = static_cast<int>(experts),
        .logits = logits.data(),
        .logits_stride = logits.stride(0),
        .offset = offset.data(),
        .result = result.data(),
        .plan = plan.data(),
        .plan_stride = plan.stride(0),
        .beta = static_cast<A>(how.beta),
        .mode = how.mode,
        .tolerance = how.tolerance > 0 ? how.tolerance
                     : sound           ? 1e-3
                                       : 1e-4,
        .limit = how.fixed_passes > 0 ? how.fixed_passes : how.max_passes,
        .fixed = how.fixed_passes > 0,
        .newton = sound && how.newton && experts <= sinkhorn::newton_experts,
        .sample_stride = sinkhorn::sample_stride(rows, experts),
        .kernel_rows = sinkhorn::padded_rows(rows),
        .kernel = space.kernel.data(),
        .sums = space.sums.data(),
        .pairs = space.pairs.data(),
        .state = space.state.data()};
    if constexpr (std::is_same_v<A, float>)
      if (sound && experts <= cuda::detail::sinkhorn_resident::experts &&
          resident(policy, arguments, cuda::rows_in_packs<4>(logits) && experts == 8))
        return;
    general(policy, arguments);
  }

 private:
  /// Whether all rows fit in registers and shared memory; else nothing is done.
  template <class A>  // float: a template, so that who does not call it does not compile it
  static bool resident(device::cuda const& policy, cuda::detail::sinkhorn_arguments<A> const& arguments, bool packs) {
    using as = cuda::detail::sinkhorn_resident;
    auto const& device = cuda::properties();
    std::int64_t const rows = arguments.rows;
    std::int64_t const most_blocks = std::min(device.multiprocessors, as::most_blocks);
    std::int64_t const blocks = rows <= as::rows_of_one_block ? 1 : std::min(sinkhorn::chunks(rows), most_blocks);
    std::int64_t const each = (rows + blocks * as::threads - 1) / (blocks * as::threads);
    std::int64_t const in_shared = std::max<std::int64_t>(each - as::register_rows, 0);
    std::size_t const bytes = static_cast<std::size_t>(in_shared) * as::bytes_of_shared_row;
    if (bytes + sizeof(cuda::detail::sinkhorn_resident_shared) >
        static_cast<std::size_t>(device.shared_bytes_per_block))
      return false;
    cuda::grid shape{static_cast<unsigned>(blocks), as::threads, bytes};
    shape.cooperative = blocks > 1;
    cuda::detail::sinkhorn_resident_arguments const all{arguments, static_cast<int>(each), packs};
    cuda::launch("sinkhorn", policy, shape, cuda::detail::sinkhorn_resident_sound<0>, all);
    return true;
  }
  template <class A>
  static void general(device::cuda const& policy, cuda::detail::sinkhorn_arguments<A> const& arguments) {
    auto const& device = cuda::properties();
    using shared = cuda::detail::sinkhorn_shared<A>;
    std::int64_t warps = cuda::detail::sinkhorn_warps;
    auto const bytes = [&] { return shared::bytes(arguments.experts, warps, arguments.newton); };
    while (warps > 1 && bytes() > static_cast<std::size_t>(device.shared_bytes_per_block)) warps /= 2;
    check_that(bytes() <= static_cast<std::size_t>(device.shared_bytes_per_block), "sinkhorn", "offset",
               std::to_string(arguments.experts) + " experts", "as many as fit in shared memory");
    std::int64_t const blocks = std::clamp<std::int64_t>(sinkhorn::chunks(arguments.rows), 1, device.multiprocessors);
    cuda::grid shape{static_cast<unsigned>(blocks), static_cast<unsigned>(32 * warps), bytes()};
    shape.cooperative = blocks > 1;
    cuda::launch("sinkhorn", policy, shape, cuda::detail::sinkhorn_general<A>, arguments);
  }
};

}  // namespace blackmamba
