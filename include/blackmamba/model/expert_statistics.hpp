#pragma once
#include <blackmamba/core/memory.hpp>
#include <blackmamba/core/tensor.hpp>
#include <blackmamba/nn/module.hpp>
#include <blackmamba/ops/sinkhorn/sinkhorn.hpp>

#include <algorithm>
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

namespace blackmamba {

/// What one mixture-of-experts layer did in the last step that recorded statistics.
struct expert_statistics {
  std::string layer;                ///< the layer's prefix in a checkpoint
  std::vector<std::int64_t> load;   ///< tokens of each expert
  std::int32_t unrouted = 0;        ///< tokens with a router logit that is not finite: no expert took them
  sinkhorn::report balance{};       ///< what Sinkhorn reached, where it is the balance rule

  /// The busiest expert's tokens over the mean; 0 where no token was routed.
  double max_over_mean() const {
    std::int64_t total = 0, most = 0;
    for (auto n : load) {
      total += n;
      most = std::max(most, n);
    }
    return total > 0 ? static_cast<double>(most) * static_cast<double>(load.size()) / static_cast<double>(total) : 0;
  }
};

/// Statistics of every mixture-of-experts layer, in order. Waits for the device.
template <class Network>
std::vector<expert_statistics> expert_statistics_of(Network const& network) {
  std::vector<expert_statistics> layers;
  network.memory().visit([&](entry const& e, auto const& x) {
    if (e.what != kind::statistic) return;
    using T = typename std::remove_cvref_t<decltype(x)>::value_type;
    tensor<space::host, T, dyn> host(x.size());
    memory::download(network.policy(), x, host.as_view());
    if constexpr (std::is_same_v<T, std::int64_t>) {
      expert_statistics s{e.name.substr(0, e.name.rfind('.')), {}, 0, {}};
      for (std::int64_t i = 0; i + 1 < host.size(); ++i) s.load.push_back(host(i + 1) - host(i));
      layers.push_back(std::move(s));
    } else if constexpr (std::is_same_v<T, std::int32_t>) {
      layers.back().unrouted = host(0);
    } else if constexpr (std::is_same_v<T, sinkhorn::report>) {
      layers.back().balance = host(0);
    }
  });
  return layers;
}

}  // namespace blackmamba
