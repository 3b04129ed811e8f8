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

/// Statistics of every mixture-of-experts layer, in order: those with a statistic named "load". Other statistics of a
/// network are passed over. Waits for the device.
template <class Network>
std::vector<expert_statistics> expert_statistics_of(Network const& network) {
  std::vector<expert_statistics> layers;
  network.memory().visit([&](entry const& e, auto const& x) {
    if (e.what != kind::statistic) return;
    using T = typename std::remove_cvref_t<decltype(x)>::value_type;
    auto const dot = e.name.rfind('.');
    std::string const layer = e.name.substr(0, dot), name = e.name.substr(dot + 1);
    bool const known = std::is_same_v<T, std::int64_t>       ? name == "load"
                       : std::is_same_v<T, std::int32_t>     ? name == "unrouted"
                       : std::is_same_v<T, sinkhorn::report> ? name == "report"
                                                             : false;
    if (!known || x.size() < 1) return;
    auto at = std::find_if(layers.begin(), layers.end(), [&](auto const& s) { return s.layer == layer; });
    if (at == layers.end()) at = layers.insert(at, expert_statistics{layer, {}, 0, {}});
    tensor<space::host, T, dyn> host(x.size());
    memory::download(network.policy(), x, host.as_view());
    if constexpr (std::is_same_v<T, std::int64_t>)
      for (std::int64_t i = 0; i + 1 < host.size(); ++i) at->load.push_back(host(i + 1) - host(i));
    else if constexpr (std::is_same_v<T, std::int32_t>)
      at->unrouted = host(0);
    else if constexpr (std::is_same_v<T, sinkhorn::report>)
      at->balance = host(0);
  });
  std::erase_if(layers, [](auto const& s) { return s.load.empty(); });
  return layers;
}

}  // namespace blackmamba
