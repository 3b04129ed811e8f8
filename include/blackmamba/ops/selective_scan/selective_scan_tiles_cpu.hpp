#pragma once
#include <blackmamba/core/cpu/simd.hpp>
#include <blackmamba/core/cpu/transpose.hpp>
#include <blackmamba/core/view.hpp>
#include <blackmamba/ops/selective_scan/selective_scan_math.hpp>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

/// What the selective scan on the host is made of. A pack holds one number for each of `lanes` channels; a tile holds
/// packs for the steps of a chunk. States are worked on in tiles of a few, which stay in registers over a chunk.
namespace blackmamba::selective_scan_tiles {

/// Steps of a tile: selective_scan::chunk_length.
inline constexpr int chunk = 32;

template <class A>
inline constexpr int lanes = simd::width<A>;

/// Channels that make a group, of which each sequence's are one piece of work: at most `most`, fewer where there would
/// be less than `wanted` pieces. A multiple of Lanes, as `most` is.
template <int Lanes>
constexpr std::int64_t group_width(std::int64_t most, std::int64_t channels, std::int64_t sequences,
                                   std::int64_t wanted) {
  std::int64_t width = most;
  while (width > Lanes && (channels + width - 1) / width * sequences < wanted)
    width = (width / 2 + Lanes - 1) / Lanes * Lanes;
  return width;
}

/// Calls f(0), ... f(N - 1) with integral constants: what is indexed by them lives in registers at any level of
/// optimisation, where f itself is inlined.
template <class F, int... I>
BLACKMAMBA_INLINE void unroll(F&& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
BLACKMAMBA_INLINE void unroll(F&& f) {
  unroll(f, std::make_integer_sequence<int, N>{});
}
/// Calls f(first, count) over N states in tiles of Tile; count is an integral constant.
template <int N, int Tile, class F>
BLACKMAMBA_INLINE void state_tiles(F&& f) {
  int first = 0;
  if constexpr (N >= Tile)
    for (; first + Tile <= N; first += Tile) f(first, std::integral_constant<int, Tile>{});
  if constexpr (N % Tile != 0) f(first, std::integral_constant<int, N % Tile>{});
}
/// Calls f(count), where count is an integral constant for a whole pack and an int for the last channels.
template <class A, class F>
BLACKMAMBA_INLINE void with_lanes(std::int64_t count, F&& f) {
  if (count >= lanes<A>)
    f(std::integral_constant<int, lanes<A>>{});
  else
    f(static_cast<int>(count));
}

/// 2^x for x in [-126, 127.9]. An object, so that its constants stay in registers over a loop.
template <class V>
struct power_of_two;

template <int N>
struct power_of_two<simd::pack<float, N>> {
  using V = simd::pack<float, N>;
  BLACKMAMBA_INLINE V operator()(V x) const { return simd::detail::exp2_in_range(x); }
};
template <int N>
struct power_of_two<simd::pack<double, N>> {
  using V = simd::pack<double, N>;
  BLACKMAMBA_INLINE V operator()(V x) const {
    V const shifted = x + 0x1.8p52;  // rounds to an integer, which the low bits then hold
    V const r = (x - (shifted - 0x1.8p52)) * selective_scan_math::ln_2;
    V p = inverse_factorials[13];  // e^r to the 13th power: relative error below 1e-17
    unroll<13>([&](auto k) __attribute__((always_inline)) { p = fma(p, r, V(inverse_factorials[12 - k])); });
    using bits = typename simd::detail::vector_of<std::int64_t, N>::type;
    return simd::detail::vector_bits<typename V::vector>(simd::detail::vector_bits<bits>(p.v) +
                                                         (simd::detail::vector_bits<bits>(shifted.v) << 52));
  }
  static constexpr double inverse_factorials[] = {
      1.0,        1.0,         1.0 / 2,      1.0 / 6,       1.0 / 24,       1.0 / 120,       1.0 / 720,
      1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
};

#if defined(__AVX512F__) && defined(__AVX512DQ__)
/// 2^x = 2^(k / 32) 2^r with k / 32 the nearest multiple of 1/32: a table of 32 that is looked up in two registers, and
/// a polynomial of degree two. Ten instructions, four of them multiplications; a polynomial without table has eight.
/// Relative error below 1.7e-7; the error vanishes with x, which is what a long memory needs.
template <>
struct power_of_two<simd::pack<float, 16>> {
  using V = simd::pack<float, 16>;
  using bits = simd::detail::int_vector<16>;

  BLACKMAMBA_INLINE V operator()(V x) const {
    // The sum has k in its low bits: the last five are the place in the table, the others the power of two. The table's
    // entries have k 2^18 taken away, so that adding the sum's bits, shifted by 18, adds to the exponent alone.
    V const shifted = x + 393216.0f;  // 1.5 * 2^23 / 32
    V const r = V(typename V::vector(_mm512_reduce_ps(__m512(x.v), 5 << 4)));
    auto const place = __m512i(simd::detail::vector_bits<bits>(shifted.v));
    auto const looked_up = _mm512_permutex2var_epi32(__m512i(low), place, __m512i(high));
    V const scale = simd::detail::vector_bits<typename V::vector>(bits(looked_up) +
                                                                  (simd::detail::vector_bits<bits>(shifted.v) << 18));
    return fma(scale, r * fma(V(0.24022651f), r, V(0.69315734f)), scale);
  }

  bits low = {0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3, 0x3f78f4f0,
              0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6};
  bits high = {0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be, 0x3f76248c, 0x3f76a81e,
               0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3};
};
#endif

/// x, rounded. g++ contracts a product with one of the sums that it is used in, by its own choice; a state must come
/// out the same wherever it is computed.
template <class V>
BLACKMAMBA_INLINE V rounded(V x) {
#if defined(__GNUC__) && !defined(__clang__) && defined(__AVX512F__)
  asm("" : "+v"(x.v));
#elif defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
  asm("" : "+x"(x.v));
#endif
  return x;
}

/// exp(dt A) = 2^(dt rate). Bounded promises that the exponent is in range; otherwise it is clamped, which changes no
/// bit of those that are.
template <class V, bool Bounded>
struct decay {
  power_of_two<V> power;
  BLACKMAMBA_INLINE V operator()(V dt, V rate) const {
    V const x = rounded(dt * rate);
    return power(Bounded ? x : selective_scan_math::clamp_exponent(x));
  }
};

/// Rows of a tensor at one channel: p points at the first step.
template <class T>
struct strided_rows {
  T* p;
  std::int64_t stride;
  BLACKMAMBA_INLINE T* operator[](std::int64_t t) const { return p + t * stride; }
};
/// Steps from `step` on, at channel `channel`, of row b; of an absent tensor, nothing that may be read.
template <class View>
BLACKMAMBA_INLINE auto rows_at(View const& x, std::int64_t b, std::int64_t step, std::int64_t channel) {
  using T = typename View::element_type;
  return x.present() ? strided_rows<T>{x.row(b, step) + channel, x.stride(1)} : strided_rows<T>{nullptr, 0};
}

/// What the next tiles will read and write. The rows of a tile lie a page apart, where no hardware looks ahead; so the
/// loops over states ask for a few rows with each step, evenly, which keeps memory busy while they compute.
struct row_stream {
  char const* p;
  std::int64_t stride;
};
/// Streams for one loop: it calls ask(t) with each of its steps.
struct prefetch_share {
  row_stream const* streams;
  int count;
  BLACKMAMBA_INLINE void ask(std::int64_t t) const {
    for (int i = 0; i < count; ++i) __builtin_prefetch(streams[i].p + t * streams[i].stride, 0, 2);
  }
};
template <int Capacity>
class prefetch_list {
 public:
  /// Begins a new list, of which `loops` loops get equal shares.
  void start(int loops) { count_ = next_ = 0, loops_ = loops; }
  template <class T>
  void add(strided_rows<T> const& rows) {
    if (rows.p == nullptr || count_ == Capacity) return;
    streams_[count_++] = {reinterpret_cast<char const*>(rows.p), rows.stride * static_cast<std::int64_t>(sizeof(T))};
  }
  prefetch_share share() {
    int const each = (count_ + loops_ - 1) / loops_, first = std::min(next_, count_);
    next_ += each;
    return {streams_ + first, std::min(each, count_ - first)};
  }

 private:
  row_stream streams_[std::size_t{Capacity}];
  int count_ = 0, next_ = 0, loops_ = 1;
};

/// B or C of the steps of a chunk, in the order in which the states' tiles read them: (tiles, steps, states of a tile).
template <int N, int Tile, class A, class T>
void load_projection(strided_rows<T const> rows, int steps, A* to) {
  for (int t = 0; t < steps; ++t)
    state_tiles<N, Tile>([&](int first, auto count) {
      A* const out = to + first * chunk + t * count;
      if constexpr (count >= 4 && (count & (count - 1)) == 0) {
        simd::pack<A, count>::load(rows[t] + first).store(out);
      } else {
        for (int n = 0; n < count; ++n) out[n] = widen(rows[t][first + n]);
      }
    });
}

/// States (N, lanes) of `count` channels from `channel` on, of row s of (S, D, N); zeros in the other lanes, and
/// everywhere where x is absent.
template <int N, class A>
void load_states(host_view<A const, dyn, dyn, dyn> x, std::int64_t s, std::int64_t channel, int count, A* h) {
  if (x.present())
    simd::rows_to_lanes<simd::pack<A>>(x.row(s, channel), x.stride(1), count, N, A(0), h);
  else
    std::fill_n(h, N * lanes<A>, A(0));
}
template <int N, class A>
void store_states(A const* h, host_view<A, dyn, dyn, dyn> x, std::int64_t s, std::int64_t channel, int count,
                  std::int64_t stride = lanes<A>) {
  if (!x.present()) return;
  for (int lane = 0; lane < count; ++lane) {
    A* const to = x.row(s, channel + lane);
    for (int n = 0; n < N; ++n) to[n] = h[n * stride + lane];
  }
}
/// The rates (N, lanes) of `count` channels. @returns the largest |rate| of each channel
template <int N, class A>
simd::pack<A> load_rates(host_view<A const, dyn, dyn> a, bool is_log, std::int64_t channel, int count, A* rate) {
  using V = simd::pack<A>;
  simd::rows_to_lanes<V>(a.row(channel), a.stride(0), count, N, A(0), rate);
  power_of_two<V> const power;
  V largest = 0;
  for (int n = 0; n < N; ++n) {
    V const r = selective_scan_math::rate(V::load(rate + n * V::lanes), is_log, power);
    r.store(rate + n * V::lanes);
    largest = max(largest, abs(r));
  }
  return largest;
}

/// Sums over the lanes of packs that lie behind each other, as many as there are lanes, in the lanes of one pack.
/// Neighbouring lanes are added; round by round the sums move together, in order.
template <int Count, class A>
BLACKMAMBA_INLINE simd::pack<A> lane_sums(A const* packs) {
  using V = simd::pack<A>;
  if constexpr (Count == 1) {
    return V::load(packs);
  } else {
    V const a = lane_sums<Count / 2>(packs), b = lane_sums<Count / 2>(packs + Count / 2 * V::lanes);
    return simd::every_second<0>(a, b) + simd::every_second<1>(a, b);
  }
}

}  // namespace blackmamba::selective_scan_tiles
