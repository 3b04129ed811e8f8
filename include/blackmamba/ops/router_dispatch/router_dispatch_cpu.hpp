#pragma once
#include <blackmamba/ops/router_dispatch/router_dispatch.hpp>

#include <cstdint>

namespace blackmamba {

/// On the host its steps are the operators'.
template <>
struct backend<router_dispatch, device::cpu> {
  template <class T>
  static constexpr bool takes_tokens(std::int64_t, std::int64_t, std::int64_t) {
    return false;
  }
  template <class A>
  static constexpr bool takes_logits(std::int64_t, std::int64_t, std::int64_t) {
    return false;
  }
  static void forward(auto const&...) {}
  static void plan(auto const&...) {}
};

}  // namespace blackmamba
