/// Scans: what every prefix of a sequence amounts to. First with an operator of our own, then the recurrence that
/// state-space layers are made of, both forward and backward.
#include <blackmamba/core/tensor.hpp>
#include <blackmamba/ops/associative_scan/associative_scan.hpp>
#include <blackmamba/ops/associative_scan/first_order_recurrence.hpp>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>

using namespace blackmamba;

/// What a stretch of days offers to someone who buys once and sells once, later.
struct trade {
  float lowest, highest, gain;
};
/// Two stretches, a before b: hold both, or buy in a and sell in b. Associative; not commutative, for time has a
/// direction.
struct join {
  trade operator()(trade a, trade b) const {
    return {std::min(a.lowest, b.lowest), std::max(a.highest, b.highest),
            std::max({a.gain, b.gain, b.highest - a.lowest})};
  }
  /// For backward: gradients of a and b from that of join(a, b). Elements consist of floats.
  using scalar = float;
  scan_gradient<trade> backward(trade a, trade b, trade d) const {
    trade d_a{}, d_b{};
    (a.lowest <= b.lowest ? d_a : d_b).lowest = d.lowest;
    (a.highest >= b.highest ? d_a : d_b).highest = d.highest;
    if (b.highest - a.lowest >= std::max(a.gain, b.gain)) {
      d_b.highest += d.gain;
      d_a.lowest -= d.gain;
    } else {
      (a.gain >= b.gain ? d_a : d_b).gain = d.gain;
    }
    return {d_a, d_b};
  }
  static trade identity() {
    float const infinity = std::numeric_limits<float>::infinity();
    return {infinity, -infinity, 0};
  }
};

int main() {
  device::cpu const cpu;  // where to run; all cores

  // 1. An operator of our own, over rows: the best trade so far, and the best one still to come.
  int const days = 12;
  float const prices[days] = {7, 5, 6, 9, 8, 3, 4, 4, 10, 8, 6, 7};
  tensor<space::host, trade, dyn, dyn> day(1, days), so_far(1, days), to_come(1, days);
  for (int t = 0; t < days; ++t) day(0, t) = {prices[t], prices[t], 0};

  associative_scan::forward(cpu, join{}, day, so_far);
  // In reverse, what comes later is visited first, and the operator's arguments change places.
  associative_scan::forward(cpu, scan_operator::exchanged{join{}}, day, to_come, {.reverse = true});

  // Backward: which prices the best trade of all depends on. Its gain is the total's, nothing else is wanted.
  auto const d_so_far = zeros<trade>(cpu, 1, days), d_day = zeros<trade>(cpu, 1, days);
  auto const d_total = zeros<trade>(cpu, 1);
  d_total(0).gain = 1;
  associative_scan::backward(cpu, join{}, {.x = day, .y = so_far, .d_y = d_so_far, .d_total = d_total}, d_day);

  std::printf("day  price  best trade so far  still to come  d best / d price\n");
  for (int t = 0; t < days; ++t)
    std::printf("%3d  %5.0f  %17.0f  %13.0f  %16.0f\n", t, prices[t], so_far(0, t).gain, to_come(0, t).gain,
                d_day(0, t).lowest + d_day(0, t).highest);

  // 2. h_t = a_t h_{t-1} + b_t, along L of (B, L, D): two channels that see the same pulse. a_t is what is kept.
  int const length = 12;
  tensor<space::host, float, dyn, dyn, dyn> a(1, length, 2), b(1, length, 2), h(1, length, 2);
  for (int t = 0; t < length; ++t) {
    a(0, t, 0) = 0.9f;
    a(0, t, 1) = t == 6 ? 0.0f : 1.0f;  // keeps everything, and forgets at step 6
    b(0, t, 0) = b(0, t, 1) = t == 2 ? 1.0f : 0.0f;
  }
  first_order_recurrence::forward(cpu, {.a = a, .b = b}, h);

  // 3. Backward: the loss is the last state, so its gradient is 1 there, and nothing else is wanted of h.
  auto d_h = zeros<float>(cpu, 1, length, 2);
  d_h(0, length - 1, 0) = d_h(0, length - 1, 1) = 1;
  tensor<space::host, float, dyn, dyn, dyn> d_a(1, length, 2), d_b(1, length, 2);
  first_order_recurrence::backward(cpu, {.a = a, .h = h, .d_h = d_h}, d_a, d_b);

  std::printf("\n      channel that decays            channel that forgets once\n");
  std::printf("  t      h  d h_11/d a  d h_11/d b      h  d h_11/d a  d h_11/d b\n");
  for (int t = 0; t < length; ++t)
    std::printf("%3d  %5.3f  %10.3f  %10.3f  %5.3f  %10.3f  %10.3f\n", t, h(0, t, 0), d_a(0, t, 0), d_b(0, t, 0),
                h(0, t, 1), d_a(0, t, 1), d_b(0, t, 1));

  // The gradient says what a change of one coefficient does; so does trying it.
  float const step = 0.01f, last = h(0, length - 1, 0);
  a(0, 8, 0) += step;
  first_order_recurrence::forward(cpu, {.a = a, .b = b}, h);
  float const tried = (h(0, length - 1, 0) - last) / step;
  std::printf("\nd h_11 / d a_8: %.4f by backward, %.4f by trying\n", d_a(0, 8, 0), tried);
  return std::abs(tried - d_a(0, 8, 0)) < 1e-3f ? 0 : 1;
}
