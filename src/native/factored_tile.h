// A tile of rows of the factored problem: the four steps of factored.h, in the work memory of one thread.
#pragma once

#include <cstring>
#include <numeric>

#include "panels.h"
#include "scratch.h"
#include "small_gemm.h"

namespace KRONBLOCKS_ISA {

constexpr std::size_t kTileBytes = 448 << 10;       // what a tile of rows works on should stay in the second-level cache

// One tile of rows of the problem, with the work memory of one thread. V: vectors of a piece.
template <class T, int V>
struct Tile {
  static constexpr int size = V * kLanes<T>;
  const Sides<T>& f;
  Pieces pieces;
  int rows;     // in this tile, at most pieces.rows
  T* panel;     // M: [piece][s][size]
  T* spreads;   // E: [piece][o, i][size]
  T* mixed;     // Q of one group: [o in group, i][running index]
  T* by_rows;   // E or Q of one o: [t][i, c]
  T* block;     // N of one o: [t][n_width]
  T* applied;   // N of one o before it is rounded: [t][n_width]

  // Q of a group of o, into `mixed`
  void mix(const MixLists<T>& lists, std::int64_t group) {
    const std::ptrdiff_t length = pieces.count() * size;
    for (std::int64_t piece = 0; piece < pieces.count(); ++piece)
      for (int first = 0; first < lists.width; first += lists.part)
        weighted_sums_of<T, V, true>(std::min(lists.part, lists.width - first), lists, group, first, 1,
                               panel + piece * f.panel_rows() * size, size, keep_at<V>(mixed + first * length + piece * size, length));
  }

  // Q of the k-th o of a group as rows [t][i, c]
  const T* mixture(int k) {
    const std::ptrdiff_t length = pieces.count() * size;
    const T* from = mixed + k * f.rank * length;
    if (f.rank == 1) return from;  // the running index is (t, c) already
    for (int i = 0; i < f.rank; ++i)
      copy_rows(rows, f.m_width, from + i * length, f.m_width, by_rows + i * f.m_width, f.spread());
    return by_rows;
  }

  // E of o from N's rows, to its place in `spreads`, of which a piece holds `stride` rows (o, i); `place`: the first of o's
  void spread(std::int64_t o, const T* n_rows, std::ptrdiff_t n_step, std::int64_t place, std::int64_t stride) {
    small_gemm<T>(rows, f.spread(), f.n_width, {n_rows, n_step, 1}, f.bank(o), f.spread(), by_rows, f.spread(), false);
    const std::int64_t filled = std::int64_t(rows) * f.m_width, all = pieces.count() * size, step = stride * size;
    T* to = spreads + place * size;
    if (f.rank == 1) {
      for (std::int64_t at = 0; at < filled; at += size, to += step) {
        if (filled - at >= size)
          std::memcpy(to, by_rows + at, size * sizeof(T));
        else
          copy_run<0>(to, by_rows + at, int(filled - at));
      }
    } else {
      with_width(size % f.m_width ? 0 : f.m_width, [&](auto w) {
        for_runs(pieces, rows, [&](int t, int c, std::int64_t piece, int inside, int length) {
          for (int i = 0; i < f.rank; ++i)
            copy_run<decltype(w)::value>(to + piece * step + i * size + inside, by_rows + t * f.spread() + i * f.m_width + c, length);
        });
      });
    }
    for (std::int64_t at = filled; at < all; ++at)
      for (int i = 0; i < f.rank; ++i) spreads[(at / size * stride + place + i) * size + at % size] = T(0);
  }

  // M = sum of C E, to rows of M, plus bias; needs all of `spreads`
  template <class X>
  void collect(const MixLists<T>& lists, const T* bias, X* out, std::ptrdiff_t out_step) {
    alignas(64) T sums[kMixRows * size];
    for (std::int64_t piece = 0; piece < pieces.count(); ++piece) {
      const T* in = spreads + piece * f.spread_rows() * size;
      const std::int64_t first = piece * size, end = std::min(first + size, std::int64_t(rows) * f.m_width);
      for (std::int64_t group = 0; group < lists.groups(); ++group) {
        const int here = int(std::min<std::int64_t>(lists.per_group, f.sources - group * lists.per_group));
        if (f.rank == 1)
          weighted_sums_of<T, V, true>(lists.per_group, lists, group, 0, 1, in, size, keep_at<V>(sums, size));
        else
          weighted_sums_of<T, V, false>(lists.per_group, lists, group, 0, f.rank, in, size, keep_at<V>(sums, size));
        with_width(size % f.m_width ? 0 : f.m_width, [&](auto w) {
          constexpr int width = decltype(w)::value <= size ? decltype(w)::value : 0;
          for (std::int64_t at = first; at < end;) {
            const std::int64_t t = at / f.m_width;
            const int c = int(at % f.m_width), length = int(std::min<std::int64_t>(f.m_width - c, end - at));
            for (int k = 0; k < here; ++k) {
              const std::int64_t feature = (group * lists.per_group + k) * f.m_width + c;
              T* from = sums + k * size + (at - first);
              if (bias)
                for (int j = 0; j < length; ++j) from[j] += bias[feature + j];
              copy_run<width>(out + t * out_step + feature, from, length);
            }
            at += length;
          }
        });
      }
    }
  }

  // N_o = Q_o B^T, stored in or added to rows of N; tiles_t: banks of (rank * m_width, n_width)
  template <class X>
  void apply(std::int64_t o, const T* mixture, const T* tiles_t, const T* bias, X* out, std::ptrdiff_t out_step, bool add) {
    X* to = out + o * f.n_width;
    if constexpr (std::is_same_v<T, X>) {
      if (bias) {
        for (int t = 0; t < rows; ++t) std::memcpy(to + t * out_step, bias + o * f.n_width, f.n_width * sizeof(T));
        add = true;
      }
      small_gemm<T>(rows, f.n_width, f.spread(), {mixture, f.spread(), 1}, tiles_t + f.bank_number(o) * f.n_width * f.spread(),
                    f.n_width, to, out_step, add);
    } else {
      apply(o, mixture, tiles_t, bias, applied - o * f.n_width, f.n_width, false);
      copy_rows(rows, f.n_width, applied, f.n_width, to, out_step);
    }
  }

  // dC of a group from its E and the panel of M, added to dcoefs as the lists order them
  void coefficient_gradients(const MixLists<T>& lists, std::int64_t group, std::int64_t place, std::int64_t stride, T* dcoefs) {
    for (std::int32_t e = lists.starts[group]; e < lists.starts[group + 1]; e += kDotSources) {
      const int here = std::min(kDotSources, lists.starts[group + 1] - e);
      const T* right[kDotSources];
      T* out[kDotSources];
      for (int first = 0; first < lists.width; first += lists.part) {
        for (int s = 0; s < here; ++s) {
          right[s] = panel + lists.source[e + s] * size;
          out[s] = dcoefs + std::int64_t(e + s) * lists.width + first;
        }
        dots_of<T>(std::min(lists.part, lists.width - first), here, pieces.count(), size, spreads + (place + first) * size,
                   stride * size, right, f.panel_rows() * size, out);
      }
    }
  }
};

// Rows of a tile: as many as the cache takes, given the bytes that each needs, but equally many tiles for every thread. Rows fill
// whole pieces where they can: their number is a multiple of size / gcd(size, m_width) then.
inline int tile_rows(std::int64_t count, std::size_t bytes_per_row, int threads, int m_width, int size, std::size_t tile_bytes = kTileBytes) {
  const std::int64_t most = std::max<std::int64_t>(1, std::min<std::int64_t>(128, std::int64_t(tile_bytes / bytes_per_row)));
  const std::int64_t rounds = (count + most * threads - 1) / (most * threads);
  const std::int64_t rows = (count + rounds * threads - 1) / (rounds * threads), step = size / std::gcd(size, m_width);
  return int(rows < step ? rows : (rows + step - 1) / step * step);
}

// Work memory of one thread for tiles of the given rows
template <class T, int V>
Tile<T, V> make_tile(const Sides<T>& f, int rows, int per_group, bool all_spreads) {
  static thread_local Scratch panel, spreads, mixed, by_rows, block, applied;
  const Pieces pieces{rows, f.m_width, Tile<T, V>::size};
  const std::size_t length = std::size_t(pieces.count()) * pieces.size;
  return {f,
          pieces,
          0,
          panel.take<T>(length * f.panel_rows()),
          spreads.take<T>(length * (all_spreads ? f.spread_rows() : f.rank * per_group) + per_group * f.rank * pieces.size),
          mixed.take<T>(length * f.rank * per_group),
          by_rows.take<T>(std::size_t(rows) * f.spread()),
          block.take<T>(std::size_t(rows) * f.n_width),
          applied.take<T>(std::size_t(rows) * f.n_width)};
}

template <class T>
int widest_piece(std::int64_t rows, int width) {  // vectors of a piece, so that few rows do not fill it with zeros
  int vectors = kMixVectors;
  while (vectors > 1 && std::int64_t(vectors) * kLanes<T> > rows * width) vectors /= 2;
  return vectors;
}

template <class T, class Call>
void with_pieces(int vectors, Call call) {
  if constexpr (kMixVectors >= 4)
    if (vectors >= 4) return call(std::integral_constant<int, 4>());
  if (vectors >= 2) return call(std::integral_constant<int, 2>());
  call(std::integral_constant<int, 1>());
}

}  // namespace KRONBLOCKS_ISA
