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
  /// summed by one thread in that order, so that work may be divided in any way: over tiles of columns and chunks of
  /// positions.
  template <class T>
  static void backward(device::cpu const& policy, host_view<std::int32_t const, dyn> token,
                       host_view<T const, dyn, dyn> d_y, host_view<accum_t<T>, dyn, dyn> d_table,
                       host_view<std::int64_t, dyn> order, host_view<std::int64_t, dyn> first,
                       host_view<std::int32_t, dyn>) {
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

  /// total += sum of the given rows, in order; four packs at a time stay in registers.
  template <class T>
  static void add_rows(host_view<T const, dyn, dyn> rows, std::int64_t const* which, std::int64_t count,
                       accum_t<T>* total) {
    using V = simd::pack<accum_t<T>>;
    std::int64_t const width = rows.extent(1);
    std::int64_t column = 0;
    for (; column + 4 * V::lanes <= width; column += 4 * V::lanes) {
      V sum[4];
      for (int j = 0; j < 4; ++j) sum[j] = V::load(total + column + j * V::lanes);
      for (std::int64_t i = 0; i < count; ++i)
        for (int j = 0; j < 4; ++j) sum[j] += V::load(rows.row(which[i]) + column + j * V::lanes);
      for (int j = 0; j < 4; ++j) sum[j].store(total + column + j * V::lanes);
    }
    simd::for_packs<V::lanes>(width - column, [&](std::int64_t offset, auto lanes) {
      V sum = simd::load<V>(total + column + offset, lanes);
      for (std::int64_t i = 0; i < count; ++i) sum += simd::load<V>(rows.row(which[i]) + column + offset, lanes);
      simd::store(sum, total + column + offset, lanes);
    });
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
