#pragma once
#include <blackmamba/core/cpu/parallel_for.hpp>
#include <blackmamba/core/cpu/sequences.hpp>
#include <blackmamba/ops/attention/attention.hpp>
#include <blackmamba/ops/attention/attention_work_cpu.hpp>

#include <algorithm>
#include <array>
#include <vector>

namespace blackmamba {

/// Work is divided into (sequence, head, tile of queries or keys); tiles start at the sequence's first position, so
/// that a sequence's bits depend neither on its neighbours nor on the pieces that it came in.
template <>
struct backend<attention, device::cpu> {
  using policy_type = device::cpu;

  template <class T>
  static void forward(policy_type const& policy, attention::inputs<policy_type, T> const& in,
                      host_view<T, dyn, dyn, dyn, dyn> y, attention::results<policy_type, T> const& keep,
                      attention::rotary_tables<policy_type, T> const& tables) {
    using A = accum_t<T>;
    auto const& held = keep.cache;
    bool const cached = held.key.present();
    auto list = sequences("attention", in.q, in.cu_seqlens);
    if (cached)
      for (auto& s : list) {
        s.past = held.length(s.index);
        s.angles = s.batch * in.q.extent(1) + s.first;
        check_capacity("attention", s.index, s.past, s.rows, held.key.extent(1));
      }
    if (tables.angles.present()) {
      if (cached)
        fill_tables(policy, list, in.rotary_base, tables.angles, tables.steps);
      else
        fill_tables(policy, {sequence{.rows = in.q.extent(1)}}, in.rotary_base, tables.angles, tables.steps);
    }
    if (cached) append(policy, in, list, held, tables.angles);

    std::int64_t const heads = y.extent(2), share = heads / in.k.extent(2);
    for_tiles(policy, list, heads, [&](auto&& each_tile) {
      attention_tiles::forward_tile<A> work(y.extent(3));
      each_tile([&](sequence const& s, std::int64_t head, std::int64_t first, std::int64_t rows) {
        A const* const angles = tables.angles.present() ? tables.angles.row(s.angles) : nullptr;
        std::int64_t const kv_head = head / share;
        auto const k =
            cached ? rows_of(held.key, s.index, 0, kv_head) : rows_of(in.k, s.batch, s.first, kv_head, angles);
        auto const v = cached ? rows_of(held.value, s.index, 0, kv_head) : rows_of(in.v, s.batch, s.first, kv_head);
        work.run(rows_of(in.q, s.batch, s.first, head, angles), k, v, first, rows, s.past + first);
        work.write(rows, y.row(s.batch, s.first + first, head), y.stride(1),
                   keep.lse.present() ? keep.lse.row(s.batch, head) + s.first + first : nullptr);
      });
    });
    if (cached)
      for (auto const& s : list) held.length(s.index) += static_cast<std::int32_t>(s.rows);
  }

  /// In one pass over the scores where sequences and heads alone keep the threads busy; else in two, which divide
  /// further. Both do the same arithmetic in the same order.
  template <class T>
  static void backward(policy_type const& policy, attention::gradient_inputs<policy_type, T> const& in,
                       attention::gradients<policy_type, T> const& grad,
                       attention::rotary_tables<policy_type, T> const& tables,
                       host_view<accum_t<T>, dyn, dyn, dyn> delta, host_view<accum_t<T>, dyn, dyn, dyn> d_q) {
    auto const list = sequences("attention.backward", in.q, in.cu_seqlens);
    accum_t<T> const* angles = nullptr;
    if (tables.angles.present()) {
      fill_tables(policy, {sequence{.rows = in.q.extent(1)}}, in.rotary_base, tables.angles, tables.steps);
      angles = tables.angles.data();
    }
    fill_delta(policy, in, delta);
    if (static_cast<std::int64_t>(list.size()) * in.k.extent(2) >= 2 * cpu::thread_count(policy.threads)) {
      backward_in_one(policy, in, grad, list, angles, delta, d_q);
    } else {
      query_gradients(policy, in, grad, list, angles, delta);
      key_gradients(policy, in, grad, list, angles, delta);
    }
  }

  template <class T>
  static void step(policy_type const& policy, attention::step_inputs<policy_type, T> const& in,
                   attention::cache<policy_type, T> const& held, host_view<T, dyn, dyn, dyn> y,
                   host_view<accum_t<T>, dyn, dyn> angles, host_view<accum_t<T>, dyn, dyn, dyn, dyn> partial) {
    using A = accum_t<T>;
    std::int64_t const batch = y.extent(0), heads = y.extent(1), head_dim = y.extent(2);
    std::int64_t const kv_heads = in.k.extent(1);
    bool const rotary = in.rotary_base != 0;
    std::int64_t longest = 0;
    for (std::int64_t b = 0; b < batch; ++b) {
      check_capacity("attention.step", b, held.length(b), 1, held.key.extent(1));
      longest = std::max<std::int64_t>(longest, held.length(b) + 1);
    }
    if (rotary)
      cpu::parallel_for(policy.threads, batch, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t b = begin; b < end; ++b) fill_row(held.length(b), head_dim, in.rotary_base, angles.row(b));
      });
    std::int64_t const chunks = attention::step_chunks(longest);
    cpu::parallel_for(policy.threads, batch * chunks, 1, [&](std::int64_t begin, std::int64_t end) {
      attention_tiles::step_work<A> work(heads, heads / kv_heads, head_dim, attention::step_chunk);
      for (std::int64_t task = begin; task < end; ++task) {
        std::int64_t const b = task / chunks, chunk = task % chunks;
        std::int64_t const last = held.length(b), first = chunk * attention::step_chunk;
        if (first > last) continue;
        std::int64_t const keys = std::min(attention::step_chunk, last + 1 - first);
        A const* const turn = rotary ? angles.row(b) : nullptr;
        if (first + keys > last)  // the chunk that the new token is in; no other task reads its row
          for (std::int64_t head = 0; head < kv_heads; ++head) {
            attention_tiles::rotate_row<false>(in.k.row(b, head), head_dim, turn, A(1), held.key.row(b, last, head));
            std::copy_n(in.v.row(b, head), head_dim, held.value.row(b, last, head));
          }
        work.template run<T>(inner<2>(in.q, b), turn, inner<3>(held.key, b).slice(first, keys),
                             inner<3>(held.value, b).slice(first, keys), inner<2>(partial, b, chunk));
      }
    });
    cpu::parallel_for(policy.threads, batch * heads, 4, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t task = begin; task < end; ++task) {
        std::int64_t const b = task / heads, head = task % heads;
        attention_tiles::combine_chunks(partial.row(b, 0, head), partial.stride(1),
                                        attention::step_chunks(held.length(b) + 1), head_dim, y.row(b, head));
      }
    });
    for (std::int64_t b = 0; b < batch; ++b) ++held.length(b);
  }

 private:
  /// One sequence: rows [first, first + rows) of row `batch` of the batch, after `past` tokens in the cache. Its angles
  /// begin at row `angles` of the table.
  struct sequence {
    std::int64_t index = 0, batch = 0, first = 0, rows = 0, past = 0, angles = 0;
  };

  /// d_q, d_k and d_v of whole heads: tile of keys by tile of keys, with the sums of d_q in memory.
  template <class T>
  static void backward_in_one(policy_type const& policy, attention::gradient_inputs<policy_type, T> const& in,
                              attention::gradients<policy_type, T> const& grad, std::vector<sequence> const& list,
                              accum_t<T> const* angles, host_view<accum_t<T>, dyn, dyn, dyn> delta,
                              host_view<accum_t<T>, dyn, dyn, dyn> d_q) {
    using A = accum_t<T>;
    std::int64_t const kv_heads = in.k.extent(2), share = in.q.extent(2) / kv_heads, head_dim = in.q.extent(3);
    std::int64_t const ld = attention_tiles::whole_packs<A>(head_dim);
    static_assert(attention_tiles::block_rows <= attention::gradient_row_padding &&
                  simd::width<A> <= attention::gradient_column_padding);
    cpu::parallel_for(policy.threads, static_cast<std::int64_t>(list.size()) * kv_heads, 1, [&](auto begin, auto end) {
      attention_tiles::key_gradient_tile<A> work(head_dim);
      for (std::int64_t task = begin; task < end; ++task) {
        sequence const& s = list[static_cast<std::size_t>(task / kv_heads)];
        std::int64_t const kv_head = task % kv_heads;
        auto const sums = [&](std::int64_t head) {
          return d_q.row(head, s.batch * in.q.extent(1) + s.first + s.index * attention::gradient_row_padding);
        };
        for (std::int64_t head = kv_head * share; head < (kv_head + 1) * share; ++head)
          std::fill_n(sums(head), attention_tiles::whole_blocks(s.rows) * ld, A(0));
        for (std::int64_t key = 0; key < s.rows; key += attention_tiles::tile)
          key_gradient(work, in, grad, s, kv_head, key, std::min(attention_tiles::tile, s.rows - key), angles, delta,
                       [&](std::int64_t head, std::int64_t query) { return sums(head) + query * ld; });
        for (std::int64_t head = kv_head * share; head < (kv_head + 1) * share; ++head)
          attention_tiles::write_query_gradient(sums(head), s.rows, head_dim, angles,
                                                grad.d_q.row(s.batch, s.first, head), grad.d_q.stride(1));
      }
    });
  }

  /// d_k and d_v of one tile of keys; d_q(head, query) tells where sums for queries go.
  template <class T, class Work, class QuerySums>
  static void key_gradient(Work& work, attention::gradient_inputs<policy_type, T> const& in,
                           attention::gradients<policy_type, T> const& grad, sequence const& s, std::int64_t kv_head,
                           std::int64_t first, std::int64_t rows, accum_t<T> const* angles,
                           host_view<accum_t<T>, dyn, dyn, dyn> delta, QuerySums&& d_q) {
    std::int64_t const share = in.q.extent(2) / in.k.extent(2);
    work.begin(rows_of(in.k, s.batch, s.first, kv_head, angles), rows_of(in.v, s.batch, s.first, kv_head), first, rows);
    for (std::int64_t head = kv_head * share; head < (kv_head + 1) * share; ++head)
      for (std::int64_t query = first; query < s.rows; query += attention_tiles::tile)
        work.add(rows_of(in.q, s.batch, s.first, head, angles), rows_of(in.d_y, s.batch, s.first, head),
                 in.lse.row(s.batch, head) + s.first, delta.row(s.batch, head) + s.first, query,
                 std::min(attention_tiles::tile, s.rows - query), d_q(head, query));
    work.write(angles, grad.d_k.row(s.batch, s.first, kv_head), grad.d_k.stride(1),
               grad.d_v.row(s.batch, s.first, kv_head), grad.d_v.stride(1));
  }
  template <class T>
  static void key_gradients(policy_type const& policy, attention::gradient_inputs<policy_type, T> const& in,
                            attention::gradients<policy_type, T> const& grad, std::vector<sequence> const& list,
                            accum_t<T> const* angles, host_view<accum_t<T>, dyn, dyn, dyn> delta) {
    for_tiles(policy, list, in.k.extent(2), [&](auto&& each_tile) {
      attention_tiles::key_gradient_tile<accum_t<T>> work(in.q.extent(3));
      each_tile([&](sequence const& s, std::int64_t kv_head, std::int64_t first, std::int64_t rows) {
        key_gradient(work, in, grad, s, kv_head, first, rows, angles, delta,
                     [](std::int64_t, std::int64_t) -> accum_t<T>* { return nullptr; });
      });
    });
  }
  template <class T>
  static void query_gradients(policy_type const& policy, attention::gradient_inputs<policy_type, T> const& in,
                              attention::gradients<policy_type, T> const& grad, std::vector<sequence> const& list,
                              accum_t<T> const* angles, host_view<accum_t<T>, dyn, dyn, dyn> delta) {
    std::int64_t const heads = in.q.extent(2), share = heads / in.k.extent(2), head_dim = in.q.extent(3);
    for_tiles(policy, list, heads, [&](auto&& each_tile) {
      attention_tiles::query_gradient_tile<accum_t<T>> work(head_dim);
      each_tile([&](sequence const& s, std::int64_t head, std::int64_t first, std::int64_t rows) {
        work.run(rows_of(in.q, s.batch, s.first, head, angles), rows_of(in.k, s.batch, s.first, head / share, angles),
                 rows_of(in.v, s.batch, s.first, head / share), rows_of(in.d_y, s.batch, s.first, head),
                 in.lse.row(s.batch, head) + s.first, delta.row(s.batch, head) + s.first, first, rows);
        attention_tiles::write_query_gradient(work.sums(), rows, head_dim, angles ? angles + first * head_dim : nullptr,
                                              grad.d_q.row(s.batch, s.first + first, head), grad.d_q.stride(1));
      });
    });
  }

  template <class Q, class Offsets>
  static std::vector<sequence> sequences(char const* op, Q const& q, Offsets const& cu_seqlens) {
    cpu::sequences const all(op, q.extent(0), q.extent(1), cu_seqlens, attention_tiles::tile);
    std::vector<sequence> list;
    for (std::int64_t s = 0; s < all.count(); ++s) {
      auto const of = all[s];
      list.push_back({.index = of.index, .batch = of.batch, .first = of.first, .rows = of.length});
    }
    return list;
  }

  static void check_capacity(char const* op, std::int64_t sequence, std::int64_t held, std::int64_t more,
                             std::int64_t capacity) {
    if (held < 0 || held + more > capacity)
      throw value_error(std::string(op) + ": cache: sequence " + std::to_string(sequence) + " holds " +
                        std::to_string(held) + " tokens and gets " + std::to_string(more) +
                        ", which exceeds the capacity " + std::to_string(capacity));
  }

  /// One head of x from row `first` on.
  template <class X>
  static auto rows_of(X const& x, std::int64_t batch, std::int64_t first, std::int64_t head,
                      accum_t<typename X::value_type> const* angles = nullptr) {
    return attention_tiles::head_rows<typename X::value_type>{x.row(batch, first, head), x.stride(1), angles};
  }

  /// x at the given leading indices: a view of its last Rest dimensions.
  template <int Rest, class X, class... Ints>
  static auto inner(X const& x, Ints... indices) {
    std::array<std::int64_t, static_cast<std::size_t>(Rest)> extents{}, strides{};
    for (int i = 0; i < Rest; ++i) {
      extents[static_cast<std::size_t>(i)] = x.extent(X::rank - Rest + i);
      strides[static_cast<std::size_t>(i)] = x.stride(X::rank - Rest + i);
    }
    auto* data = x.data();
    int dimension = 0;
    ((data += indices * x.stride(dimension++)), ...);
    using T = typename X::element_type;
    if constexpr (Rest == 2)
      return host_view<T, dyn, dyn>(data, extents, strides);
    else
      return host_view<T, dyn, dyn, dyn>(data, extents, strides);
  }

  /// The angles at a position are those at its block's first position and those of the step within the block, added:
  /// what a position gets does not depend on the piece that it came in.
  static constexpr std::int64_t block = attention::rotary_block;
  /// Cosines and sines at a position, directly.
  static void fill_angles(std::int64_t position, std::int64_t head_dim, float base, double* to) {
    for (std::int64_t m = 0; m < head_dim / 2; ++m) {
      double const frequency = attention_math::rotary_frequency(m, head_dim, static_cast<double>(base));
      double const angle = static_cast<double>(position) * frequency;
      to[m] = std::cos(angle);
      to[head_dim / 2 + m] = std::sin(angle);
    }
  }
  template <class A>
  static void add_angles(double const* block_angles, double const* step, std::int64_t head_dim, A* to) {
    std::int64_t const half = head_dim / 2;
    for (std::int64_t m = 0; m < half; ++m) {
      auto const sum =
          attention_math::rotate<double>({block_angles[m], block_angles[half + m]}, step[m], step[half + m]);
      to[m] = static_cast<A>(sum.first);
      to[half + m] = static_cast<A>(sum.second);
    }
  }
  /// The angles at one position.
  template <class A>
  static void fill_row(std::int64_t position, std::int64_t head_dim, float base, A* to) {
    double block_angles[attention::max_head_dim], step[attention::max_head_dim];
    fill_angles(position / block * block, head_dim, base, block_angles);
    fill_angles(position % block, head_dim, base, step);
    add_angles(block_angles, step, head_dim, to);
  }
  /// The angles at all positions of the sequences.
  template <class A>
  static void fill_tables(policy_type const& policy, std::vector<sequence> const& list, float base,
                          host_view<A, dyn, dyn> angles, host_view<double, dyn, dyn> steps) {
    std::int64_t const head_dim = angles.extent(1);
    std::int64_t positions = 0;
    for (auto const& s : list) positions += s.rows;
    if (positions < block / 2) {
      for (auto const& s : list)
        for (std::int64_t i = 0; i < s.rows; ++i) fill_row(s.past + i, head_dim, base, angles.row(s.angles + i));
      return;
    }
    cpu::parallel_for(policy.threads, block, 8, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) fill_angles(i, head_dim, base, steps.row(i));
    });
    for (auto const& s : list) {
      std::int64_t const first_block = s.past / block, blocks = (s.past + s.rows + block - 1) / block - first_block;
      cpu::parallel_for(policy.threads, blocks, 1, [&](std::int64_t begin, std::int64_t end) {
        double block_angles[attention::max_head_dim];
        for (std::int64_t b = first_block + begin; b < first_block + end; ++b) {
          fill_angles(b * block, head_dim, base, block_angles);
          std::int64_t const last = std::min((b + 1) * block, s.past + s.rows);
          for (std::int64_t position = std::max(b * block, s.past); position < last; ++position)
            add_angles(block_angles, steps.row(position - b * block), head_dim,
                       angles.row(s.angles + position - s.past));
        }
      });
    }
  }

  /// Writes the new keys, turned, and values behind those that the cache holds.
  template <class T>
  static void append(policy_type const& policy, attention::inputs<policy_type, T> const& in,
                     std::vector<sequence> const& list, attention::cache<policy_type, T> const& held,
                     host_view<accum_t<T>, dyn, dyn> angles) {
    using A = accum_t<T>;
    std::int64_t const kv_heads = in.k.extent(2), head_dim = in.k.extent(3);
    for (auto const& s : list)
      cpu::parallel_for(policy.threads, s.rows, 16, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i)
          for (std::int64_t head = 0; head < kv_heads; ++head) {
            attention_tiles::rotate_row<false>(in.k.row(s.batch, s.first + i, head), head_dim,
                                               angles.present() ? angles.row(s.angles + i) : nullptr, A(1),
                                               held.key.row(s.index, s.past + i, head));
            std::copy_n(in.v.row(s.batch, s.first + i, head), head_dim, held.value.row(s.index, s.past + i, head));
          }
      });
  }

  /// delta = d_y . y for each query and head.
  template <class T>
  static void fill_delta(policy_type const& policy, attention::gradient_inputs<policy_type, T> const& in,
                         host_view<accum_t<T>, dyn, dyn, dyn> delta) {
    using V = simd::pack<accum_t<T>>;
    std::int64_t const heads = delta.extent(1), length = delta.extent(2);
    cpu::parallel_for(policy.threads, delta.extent(0) * length, 16, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t row = begin; row < end; ++row) {
        std::int64_t const b = row / length, i = row % length;
        for (std::int64_t h = 0; h < heads; ++h) {
          V sum = 0;
          simd::for_packs<V::lanes>(in.y.extent(3), [&](std::int64_t d, auto lanes) {
            sum = fma(simd::load<V>(in.y.row(b, i, h) + d, lanes), simd::load<V>(in.d_y.row(b, i, h) + d, lanes), sum);
          });
          delta(b, h, i) = simd::sum(sum);
        }
      }
    });
  }

  /// Calls start(each_tile) on each thread; each_tile(work) calls work(sequence, head, first row, rows) for the
  /// thread's share of all tiles. A sequence's tiles are taken from both ends in turn, for the mask makes work grow
  /// along it.
  template <class Start>
  static void for_tiles(policy_type const& policy, std::vector<sequence> const& list, std::int64_t heads,
                        Start&& start) {
    constexpr std::int64_t tile = attention_tiles::tile;
    std::vector<std::int64_t> offset{0};
    for (auto const& s : list) offset.push_back(offset.back() + heads * ((s.rows + tile - 1) / tile));
    cpu::parallel_for(policy.threads, offset.back(), 1, [&](std::int64_t begin, std::int64_t end) {
      start([&](auto&& work) {
        auto s = static_cast<std::size_t>(std::upper_bound(offset.begin(), offset.end(), begin) - offset.begin() - 1);
        for (std::int64_t task = begin; task < end; ++task) {
          while (task >= offset[s + 1]) ++s;
          std::int64_t const tiles = (list[s].rows + tile - 1) / tile, local = task - offset[s], n = local % tiles;
          std::int64_t const first = (n % 2 == 0 ? n / 2 : tiles - 1 - n / 2) * tile;
          work(list[s], local / tiles, first, std::min(tile, list[s].rows - first));
        }
      });
    });
  }
};

}  // namespace blackmamba
