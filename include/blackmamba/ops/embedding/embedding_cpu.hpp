#pragma once
#include <blackmamba/core/cpu/parallel_for.hpp>
#include <blackmamba/core/cpu/simd.hpp>
#include <blackmamba/ops/embedding/embedding.hpp>

#include <algorithm>
#include <cstring>
#include <string>

namespace blackmamba {

template <>
struct backend<embedding, device::cpu> {
  template <class T>
  static void forward(device::cpu const& policy, host_view<std::int32_t const, dyn> token,
                      host_view<T const, dyn, dyn> table, host_view<T, dyn, dyn> y) {
    check_tokens("embedding", token, table.extent(0));
    std::size_t const bytes = sizeof(T) * static_cast<std::size_t>(y.extent(1));
    cpu::parallel_for(policy.threads, y.extent(0), 16, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r) std::memcpy(static_cast<void*>(y.row(r)), table.row(token(r)), bytes);
    });
  }

  /// A counting sort brings equal tokens together, in order of position. Then each element of d_table that occurs is
  /// summed by one thread, so that work may be divided in any way: over tiles of columns and chunks of positions.
  template <class T>
  static void backward(device::cpu const& policy, host_view<std::int32_t const, dyn> token,
                       host_view<T const, dyn, dyn> d_y, host_view<accum_t<T>, dyn, dyn> d_table,
                       embedding::sorted_rows<space::host, accum_t<T>> const& sorted) {
    auto const &order = sorted.order, &first = sorted.first;
    std::int64_t const rows = d_y.extent(0), width = d_y.extent(1), vocabulary = d_table.extent(0);
    check_tokens("embedding.backward", token, vocabulary);
    std::fill_n(first.data(), vocabulary + 1, std::int64_t{0});
    for (std::int64_t r = 0; r < rows; ++r) ++first(token(r) + 1);
    for (std::int64_t v = 0; v < vocabulary; ++v) first(v + 1) += first(v);
    for (std::int64_t r = 0; r < rows; ++r) order(first(token(r))++) = r;  // first(v) is now the end of v's positions

    std::int64_t const tiles = (width + tile - 1) / tile, chunks = (rows + chunk - 1) / chunk;
    cpu::parallel_for(policy.threads, tiles * chunks, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t work = begin; work < end; ++work) {
        std::int64_t const column = work / chunks * tile, columns = std::min(tile, width - column);
        std::int64_t i = work % chunks * chunk;
        std::int64_t const stop = std::min(i + chunk, rows);
        // A token whose positions begin in an earlier chunk belongs to that one.
        while (i < stop && i > 0 && token(order(i)) == token(order(i - 1))) ++i;
        while (i < stop) {
          std::int32_t const v = token(order(i));
          add_rows(d_y.columns(column, columns), &order(i), first(v) - i, d_table.row(v) + column);
          i = first(v);
        }
      }
    });
  }

 private:
  static constexpr std::int64_t tile = 64, chunk = 256;

  /// total += sum of the given rows; four packs at a time stay in registers.
  template <class T>
  static void add_rows(host_view<T const, dyn, dyn> rows, std::int64_t const* which, std::int64_t count,
                       accum_t<T>* total) {
    using V = simd::pack<accum_t<T>>;
    std::int64_t const width = rows.extent(1);
    std::int64_t column = 0;
    for (; column + 4 * V::lanes <= width; column += 4 * V::lanes)
      add_sum<4, V>(
          count, [&](std::int64_t i, int j) { return V::load(rows.row(which[i]) + column + j * V::lanes); },
          [&](V const& sum, int j) {
            auto* const to = total + column + j * V::lanes;
            (V::load(to) + sum).store(to);
          });
    simd::for_packs<V::lanes>(width - column, [&](std::int64_t offset, auto lanes) {
      auto* const to = total + column + offset;
      add_sum<1, V>(
          count, [&](std::int64_t i, int) { return simd::load<V>(rows.row(which[i]) + column + offset, lanes); },
          [&](V const& sum, int) { simd::store(simd::load<V>(to, lanes) + sum, to, lanes); });
    });
  }

  /// Calls done(sum of row(i, j) over i < count, j) for j < Packs: of one run, or run by run and group by group.
  template <int Packs, class V, class Row, class Done>
  static void add_sum(std::int64_t count, Row&& row, Done&& done) {
    if (count >= 2 * embedding::run_rows) return add_runs<Packs, V>(count, row, done);
    V run[static_cast<std::size_t>(Packs)];
    for (int j = 0; j < Packs; ++j) run[j] = 0;
    for (std::int64_t i = 0; i < count; ++i)
      for (int j = 0; j < Packs; ++j) run[j] += row(i, j);
    for (int j = 0; j < Packs; ++j) done(run[j], j);
  }
  template <int Packs, class V, class Row, class Done>
  static void add_runs(std::int64_t count, Row const& row, Done const& done) {
    std::int64_t const runs = count / embedding::run_rows;
    constexpr auto packs = static_cast<std::size_t>(Packs);
    V total[packs], group[packs];
    for (int j = 0; j < Packs; ++j) total[j] = group[j] = 0;
    for (std::int64_t r = 0; r < runs; ++r) {
      bool const last = r + 1 == runs;
      std::int64_t const begin = r * embedding::run_rows, end = last ? count : begin + embedding::run_rows;
      V run[packs];
      for (int j = 0; j < Packs; ++j) run[j] = 0;
      for (std::int64_t i = begin; i < end; ++i)
        for (int j = 0; j < Packs; ++j) run[j] += row(i, j);
      for (int j = 0; j < Packs; ++j) group[j] += run[j];
      if (!last && (r + 1) % embedding::group_runs != 0) continue;
      for (int j = 0; j < Packs; ++j) {
        total[j] += group[j];
        group[j] = 0;
      }
    }
    for (int j = 0; j < Packs; ++j) done(total[j], j);
  }

  static void check_tokens(char const* op, host_view<std::int32_t const, dyn> token, std::int64_t vocabulary) {
    for (std::int64_t r = 0; r < token.extent(0); ++r)
      if (token(r) < 0 || token(r) >= vocabulary)
        throw value_error(std::string(op) + ": token: position " + std::to_string(r) + " holds " +
                          std::to_string(token(r)) + ", but the vocabulary has " + std::to_string(vocabulary) +
                          " entries");
  }
};

}  // namespace blackmamba
