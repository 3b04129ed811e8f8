#pragma once
#include <blackmamba/ops/router_dispatch/router_dispatch.hpp>

namespace blackmamba {

template <>
struct backend<router_dispatch, device::cpu> {
  static constexpr bool fused = false;  ///< its steps are the operators'
};

}  // namespace blackmamba
