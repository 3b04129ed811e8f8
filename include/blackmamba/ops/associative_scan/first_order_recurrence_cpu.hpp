#pragma once
#include <blackmamba/ops/associative_scan/first_order_recurrence.hpp>
#include <blackmamba/ops/associative_scan/scan_blocks_cpu.hpp>

#include <array>

namespace blackmamba {

template <>
struct backend<first_order_recurrence, device::cpu> {
  using op = first_order_recurrence;
  using flags = host_view<std::int32_t, dyn>;
  template <class A>
  using carries = host_view<A, dyn, dyn>;

  template <class T>
  static void forward(device::cpu const& policy, op::inputs<device::cpu, T, 2> const& in, host_view<T, dyn, dyn> h,
                      host_view<accum_t<T>, dyn> final_state, carries<accum_t<T>> memory, flags ready) {
    cpu::sequences const list("first_order_recurrence", h.extent(0), h.extent(1), in.cu_seqlens,
                              scan_blocks::of_rows<accum_t<T>>());
    auto const scan = [&]<bool Reverse>(std::bool_constant<Reverse>) {
      forward_rows<T, Reverse> const rule{{memory, large(h)}, in, h, final_state};
      cpu::scan::run(policy.threads, list, 1, ready, cpu::scan::row_kernel<forward_rows<T, Reverse>>{rule});
    };
    in.reverse ? scan(std::true_type{}) : scan(std::false_type{});
  }
  template <class T>
  static void forward(device::cpu const& policy, op::inputs<device::cpu, T, 3> const& in, host_view<T, dyn, dyn, dyn> h,
                      host_view<accum_t<T>, dyn, dyn> final_state, carries<accum_t<T>> memory, flags ready) {
    std::int64_t const channels = h.extent(2);
    cpu::sequences const list("first_order_recurrence", h.extent(0), h.extent(1), in.cu_seqlens,
                              scan_blocks::of_channels<accum_t<T>>(channels));
    forward_channels<T> const rule{{memory, large(h)}, in, h, final_state};
    cpu::scan::run(policy.threads, list, tiles<T>(channels), ready,
                   cpu::scan::channel_kernel<forward_channels<T>>{rule, channels});
  }

  template <class T>
  static void backward(device::cpu const& policy, op::gradient_inputs<device::cpu, T, 2> const& in,
                       host_view<T, dyn, dyn> d_a, host_view<T, dyn, dyn> d_b,
                       host_view<accum_t<T>, dyn> d_initial_state, carries<accum_t<T>> memory, flags ready) {
    cpu::sequences const list("first_order_recurrence.backward", d_a.extent(0), d_a.extent(1), in.cu_seqlens,
                              scan_blocks::of_rows<accum_t<T>>());
    auto const scan = [&]<bool Reverse>(std::bool_constant<Reverse>) {
      backward_rows<T, Reverse> const rule{{memory, large(d_a)}, in, d_a, d_b, d_initial_state};
      cpu::scan::run(policy.threads, list, 1, ready, cpu::scan::row_kernel<backward_rows<T, Reverse>>{rule});
    };
    in.reverse ? scan(std::false_type{}) : scan(std::true_type{});  // gradients flow against the recurrence
  }
  template <class T>
  static void backward(device::cpu const& policy, op::gradient_inputs<device::cpu, T, 3> const& in,
                       host_view<T, dyn, dyn, dyn> d_a, host_view<T, dyn, dyn, dyn> d_b,
                       host_view<accum_t<T>, dyn, dyn> d_initial_state, carries<accum_t<T>> memory, flags ready) {
    std::int64_t const channels = d_a.extent(2);
    cpu::sequences const list("first_order_recurrence.backward", d_a.extent(0), d_a.extent(1), in.cu_seqlens,
                              scan_blocks::of_channels<accum_t<T>>(channels));
    backward_channels<T> const rule{{memory, large(d_a)}, in, d_a, d_b, d_initial_state};
    cpu::scan::run(policy.threads, list, tiles<T>(channels), ready,
                   cpu::scan::channel_kernel<backward_channels<T>>{rule, channels});
  }

  template <class T>
  static void step(device::cpu const& policy, op::step_inputs<device::cpu, T> const& in,
                   host_view<accum_t<T>, dyn, dyn> state, host_view<T, dyn, dyn> h) {
    using V = simd::pack<accum_t<T>>;
    cpu::parallel_for(policy.threads, h.extent(0), std::max<std::int64_t>(1, 16384 / h.extent(1)),
                      [&](std::int64_t begin, std::int64_t end) {
                        for (std::int64_t r = begin; r < end; ++r)
                          simd::for_packs<V::lanes>(h.extent(1), [&](std::int64_t i, auto lanes) {
                            V const next = fma(simd::load<V>(in.a.row(r) + i, lanes),
                                               simd::load<V>(state.row(r) + i, lanes),
                                               simd::load<V>(in.b.row(r) + i, lanes));
                            simd::store(next, state.row(r) + i, lanes);
                            simd::store(next, h.row(r) + i, lanes);
                          });
                      });
  }

 private:
  template <class View>
  static bool large(View const& v) {
    return v.size() * static_cast<std::int64_t>(sizeof(typename View::value_type)) >= simd::past_cache_bytes;
  }
  template <class T>
  static std::int64_t tiles(std::int64_t channels) {
    return (channels + scan_blocks::channel_tile<accum_t<T>> - 1) / scan_blocks::channel_tile<accum_t<T>>;
  }

  /// What rules of rows have in common. Of a carry only b, the state, means anything.
  template <class T>
  struct rows {
    using A = accum_t<T>;
    using V = simd::pack<A>;
    using Wide = affine<V>;
    static constexpr int lanes = V::lanes;
    static constexpr scan_operator::composition<A> op{};

    carries<A> memory;
    bool past_cache;

    static Wide identity() { return {V(1), V(0)}; }
    static Wide carried(Wide x) { return {V(1), x.b}; }
    static Wide state(A h) { return {V(1), V(h)}; }
    /// A state of zero stays out of a product that overflowed over the block.
    static Wide advance(Wide c, Wide total) { return {V(1), select(c.b == V(0), total.b, fma(total.a, c.b, total.b))}; }
    void give(std::int64_t number, Wide c) const { memory(number, 0) = c.b[0]; }
    Wide take(std::int64_t number) const { return state(memory(number, 0)); }
  };

  template <class T, bool Reverse>
  struct forward_rows : rows<T> {
    using typename rows<T>::A;
    using typename rows<T>::V;
    using typename rows<T>::Wide;
    using sequence = cpu::sequences::sequence;
    op::inputs<device::cpu, T, 2> const& in;
    host_view<T, dyn, dyn> h;
    host_view<A, dyn> final_state;

    static constexpr std::int64_t margin = 0;
    struct lines {
      cpu::scan::line<T const, Reverse> a, b;
      cpu::scan::line<T, Reverse> h;
      bool past_cache;
      template <bool Edge>
      BLACKMAMBA_INLINE Wide load(std::int64_t j) const {
        return {a.template load<V, Edge>(j, A(1)), b.template load<V, Edge>(j, A(0))};
      }
      template <bool Edge>
      BLACKMAMBA_INLINE void emit(std::int64_t j, Wide x, Wide) const {
        h.template store<Edge>(x.b, j, past_cache);
      }
    };
    lines at(sequence const& q) const { return {{in.a, q}, {in.b, q}, {h, q}, this->past_cache}; }
    Wide initial(sequence const& q) const {
      return this->state(in.initial_state.present() ? in.initial_state(q.index) : A(0));
    }
    void final(sequence const& q, Wide x) const {
      if (final_state.present()) final_state(q.index) = x.b[0];
    }
  };

  template <class T, bool Reverse>
  struct backward_rows : rows<T> {
    using typename rows<T>::A;
    using typename rows<T>::V;
    using typename rows<T>::Wide;
    using sequence = cpu::sequences::sequence;
    op::gradient_inputs<device::cpu, T, 2> const& in;
    host_view<T, dyn, dyn> d_a, d_b;
    host_view<A, dyn> d_initial_state;

    static constexpr std::int64_t margin = 1;
    struct lines {
      cpu::scan::line<T const, Reverse> a, h, d_h;
      cpu::scan::line<T, Reverse> d_a, d_b;
      A initial;
      bool past_cache;
      /// The coefficient is that of the element visited before, and 1 for the first.
      template <bool Edge>
      BLACKMAMBA_INLINE Wide load(std::int64_t j) const {
        V c = a.template load<V, Edge>(j - 1, A(1));
        if constexpr (Edge)  // past the end nothing must change the state
          for (std::int64_t i = std::max<std::int64_t>(0, a.length - j); i < V::lanes; ++i) c.v[i] = A(1);
        return {c, d_h.template load<V, Edge>(j, A(0))};
      }
      template <bool Edge>
      BLACKMAMBA_INLINE void emit(std::int64_t j, Wide x, Wide) const {
        d_b.template store<Edge>(x.b, j, past_cache);
        d_a.template store<Edge>(x.b * h.template load<V, Edge>(j + 1, initial), j, past_cache);
      }
    };
    lines at(sequence const& q) const {
      A const before = in.initial_state.present() ? in.initial_state(q.index) : A(0);
      return {{in.a, q}, {in.h, q}, {in.d_h, q}, {d_a, q}, {d_b, q}, before, this->past_cache};
    }
    Wide initial(sequence const& q) const {
      return this->state(in.d_final_state.present() ? in.d_final_state(q.index) : A(0));
    }
    void final(sequence const& q, Wide x) const {
      if (!d_initial_state.present()) return;
      std::int64_t const last = Reverse ? 0 : q.length - 1;
      d_initial_state(q.index) = q.length > 0 ? widen(in.a(q.batch, q.first + last)) * x.b[0] : x.b[0];
    }
  };

  /// What rules of channels have in common.
  template <class T>
  struct channels {
    using A = accum_t<T>;
    static constexpr std::int64_t tile = scan_blocks::channel_tile<A>;
    static constexpr int lanes = simd::pack<A>::lanes;
    static constexpr scan_operator::composition<A> op{};
    template <int N>
    using wide = affine<simd::pack<A, N>>;
    using values = std::array<A, static_cast<std::size_t>(tile)>;

    struct carry {
      alignas(64) values h;
      template <int N>
      wide<N> get(std::int64_t d) const {
        return {simd::pack<A, N>(1), simd::pack<A, N>::load(h.data() + d)};
      }
      template <int N>
      void put(std::int64_t d, wide<N> x) {
        x.b.store(h.data() + d);
      }
    };
    struct total {
      alignas(64) values a, b;
      template <int N>
      wide<N> get(std::int64_t d) const {
        return {simd::pack<A, N>::load(a.data() + d), simd::pack<A, N>::load(b.data() + d)};
      }
      template <int N>
      void put(std::int64_t d, wide<N> x) {
        x.a.store(a.data() + d);
        x.b.store(b.data() + d);
      }
    };

    carries<A> memory;
    bool past_cache;

    static void clear(std::int64_t width, total& t) {
      std::fill_n(t.a.data(), width, A(1));
      std::fill_n(t.b.data(), width, A(0));
    }
    static void advance(std::int64_t width, carry& c, total const& t) {
      A* const h = c.h.data();
      A const *const a = t.a.data(), *const b = t.b.data();
      for (std::int64_t d = 0; d < width; ++d) h[d] = h[d] == 0 ? b[d] : math::fma(a[d], h[d], b[d]);
    }
    void give(std::int64_t number, std::int64_t d0, std::int64_t width, carry const& c) const {
      std::copy_n(c.h.data(), width, memory.row(number) + d0);
    }
    void take(std::int64_t number, std::int64_t d0, std::int64_t width, carry& c) const {
      std::copy_n(memory.row(number) + d0, width, c.h.data());
    }
    template <class View>
    static void read(View const& states, std::int64_t row, std::int64_t d0, std::int64_t width, carry& c) {
      states.present() ? std::copy_n(states.row(row) + d0, width, c.h.data()) : std::fill_n(c.h.data(), width, A(0));
    }
  };

  template <class T>
  struct forward_channels : channels<T> {
    using typename channels<T>::A;
    using typename channels<T>::carry;
    using sequence = cpu::sequences::sequence;
    op::inputs<device::cpu, T, 3> const& in;
    host_view<T, dyn, dyn, dyn> h;
    host_view<A, dyn, dyn> final_state;

    struct place {
      cpu::scan::column<T const> a, b;
      cpu::scan::column<T> h;
      bool past_cache;
      template <int N>
      BLACKMAMBA_INLINE affine<simd::pack<A, N>> load(std::int64_t i, std::int64_t d) const {
        return {simd::pack<A, N>::load(a(i, d)), simd::pack<A, N>::load(b(i, d))};
      }
      template <int N>
      BLACKMAMBA_INLINE void emit(std::int64_t i, std::int64_t d, affine<simd::pack<A, N>> x,
                                  affine<simd::pack<A, N>>) const {
        simd::store(x.b, h(i, d), past_cache);
      }
      BLACKMAMBA_INLINE void fetch(std::int64_t i, std::int64_t d) const {
        simd::prefetch(a(i, d));
        simd::prefetch(b(i, d));
      }
    };
    place at(sequence const& q, std::int64_t j, std::int64_t d0) const {
      return {{in.a, q, j, d0, in.reverse}, {in.b, q, j, d0, in.reverse}, {h, q, j, d0, in.reverse}, this->past_cache};
    }
    void initial(sequence const& q, std::int64_t d0, std::int64_t width, carry& c) const {
      this->read(in.initial_state, q.index, d0, width, c);
    }
    void final(sequence const& q, std::int64_t d0, std::int64_t width, carry const& c) const {
      if (final_state.present()) std::copy_n(c.h.data(), width, final_state.row(q.index) + d0);
    }
  };

  template <class T>
  struct backward_channels : channels<T> {
    using typename channels<T>::A;
    using typename channels<T>::carry;
    using sequence = cpu::sequences::sequence;
    op::gradient_inputs<device::cpu, T, 3> const& in;
    host_view<T, dyn, dyn, dyn> d_a, d_b;
    host_view<A, dyn, dyn> d_initial_state;

    struct place {
      cpu::scan::column<T const> a, h, d_h;
      cpu::scan::column<T> d_a, d_b;
      std::int64_t begin, end;  // the first and the last element of the sequence, counted from here
      A const* initial;
      bool past_cache;
      /// The coefficient is that of the element visited before, and 1 for the first.
      template <int N>
      BLACKMAMBA_INLINE affine<simd::pack<A, N>> load(std::int64_t i, std::int64_t d) const {
        using V = simd::pack<A, N>;
        return {i > begin ? V::load(a(i - 1, d)) : V(1), V::load(d_h(i, d))};
      }
      template <int N>
      BLACKMAMBA_INLINE void emit(std::int64_t i, std::int64_t d, affine<simd::pack<A, N>> x,
                                  affine<simd::pack<A, N>>) const {
        using V = simd::pack<A, N>;
        V const before = i < end ? V::load(h(i + 1, d)) : initial ? V::load(initial + d) : V(0);
        simd::store(x.b, d_b(i, d), past_cache);
        simd::store(x.b * before, d_a(i, d), past_cache);
      }
      BLACKMAMBA_INLINE void fetch(std::int64_t i, std::int64_t d) const {
        simd::prefetch(a(i, d));
        simd::prefetch(h(i, d));
        simd::prefetch(d_h(i, d));
      }
    };
    place at(sequence const& q, std::int64_t j, std::int64_t d0) const {
      bool const against = !in.reverse;
      return {{in.a, q, j, d0, against},
              {in.h, q, j, d0, against},
              {in.d_h, q, j, d0, against},
              {d_a, q, j, d0, against},
              {d_b, q, j, d0, against},
              -j,
              q.length - 1 - j,
              in.initial_state.present() ? in.initial_state.row(q.index) + d0 : nullptr,
              this->past_cache};
    }
    void initial(sequence const& q, std::int64_t d0, std::int64_t width, carry& c) const {
      this->read(in.d_final_state, q.index, d0, width, c);
    }
    void final(sequence const& q, std::int64_t d0, std::int64_t width, carry const& c) const {
      if (!d_initial_state.present()) return;
      A* const d = d_initial_state.row(q.index) + d0;
      std::copy_n(c.h.data(), width, d);
      if (q.length == 0) return;
      T const* const a = at(q, q.length - 1, d0).a(0, 0);
      for (std::int64_t i = 0; i < width; ++i) d[i] *= widen(a[i]);
    }
  };
};

}  // namespace blackmamba
