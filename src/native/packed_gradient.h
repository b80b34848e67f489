// The third product with packed blocks: dvalues = the live blocks of dy^T x.
//
// T: what panels are made of; Word: pairs of rows of bf16. X: what dy, x and dvalues are.
#pragma once

#include "api.h"
#include "bf16.h"
#include "row_groups.h"
#include "scratch.h"

namespace KRONBLOCKS_ISA {

// Inner products over rows of x of R features of dy with Q features of x, added to or stored in an R x Q corner of a block
template <class T, int R, int Q>
inline void inner_products(const T* dy, const T* x, std::ptrdiff_t step, int lanes, Sum<T>* block, int block_step, bool add) {
  constexpr int n = kLanes<T>;
  Vec<Sum<T>> sum[R * Q] = {};
  for (int t = 0; t < lanes; t += n) {
    Vec<T> right[Q];
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) right[q] = load<Vec<T>>(x + q * step + t);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec<T> left = load_once<Vec<T>>(dy + r * step + t);
#pragma GCC unroll 8
      for (int q = 0; q < Q; ++q) sum[r * Q + q] = multiply_add<T>(sum[r * Q + q], left, right[q]);
    }
  }
  Sum<T> result[R * Q];
  lane_sums<Sum<T>, R * Q>(sum, result);
  for (int r = 0; r < R; ++r)
    for (int q = 0; q < Q; ++q) block[r * block_step + q] = result[r * Q + q] + (add ? block[r * block_step + q] : Sum<T>(0));
}

constexpr int kDotRows = 4, kDotCols = kRegisters == 32 ? 4 : 3;

template <class T, int R = kDotRows, int Q = kDotCols>
inline void inner_products_of(int rows, int cols, const T* dy, const T* x, std::ptrdiff_t step, int lanes, Sum<T>* block,
                              int block_step, bool add) {
  if (rows == R && cols == Q)
    inner_products<T, R, Q>(dy, x, step, lanes, block, block_step, add);
  else if constexpr (R > 1) {
    if (rows < R) return inner_products_of<T, R - 1, Q>(rows, cols, dy, x, step, lanes, block, block_step, add);
    if constexpr (Q > 1) inner_products_of<T, R, Q - 1>(rows, cols, dy, x, step, lanes, block, block_step, add);
  } else if constexpr (Q > 1)
    inner_products_of<T, R, Q - 1>(rows, cols, dy, x, step, lanes, block, block_step, add);
}

// dy^T x on one block where whole vectors fit along its columns: sums of outer products, rows of x one after another
template <class T, int R, int V>
inline void outer_products(const T* dy, int dy_step, const T* x, int x_step, int rows, Sum<T>* block, int block_step, bool add) {
  constexpr int n = kLanes<T>;
  Vec<Sum<T>> sum[R][V] = {};
  for (int t = 0; t < rows; ++t, dy += dy_step, x += x_step) {
    Vec<T> right[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) right[v] = load<Vec<T>>(x + v * n);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[r][v] = multiply_add<T>(sum[r][v], right[v], dy[r]);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      Sum<T>* to = block + r * block_step + v * n;
      store(to, add ? sum[r][v] + load<Vec<Sum<T>>>(to) : sum[r][v]);
    }
}

template <class T, int V, int R>
inline void outer_products_of(int count, const T* dy, int dy_step, const T* x, int x_step, int rows, Sum<T>* block,
                              int block_step, bool add) {
  for (; count >= R; count -= R, dy += R, block += R * block_step)
    outer_products<T, R, V>(dy, dy_step, x, x_step, rows, block, block_step, add);
  if constexpr (R > 1) {
    if (count) outer_products_of<T, V, (R + 1) / 2>(count, dy, dy_step, x, x_step, rows, block, block_step, add);
  }
}

// How a block's gradient is summed over rows of x: as inner products of features, for which dy and x are transposed (every block
// size), or as outer products of rows, for which blocks of columns are copied together. Lengths along rows count elements of T.
// A Way says how many features and rows its copies are cut by, how many rows at most it takes at once, and how many blocks.
template <class T>
struct ByFeatures {
  using Panel = T;
  static constexpr int unit = kLanes<T> * kNumbers<T>, most = 256, row_unit = kLanes<T>, most_blocks = 1;

  template <class X>
  static void pack(const X* from, std::int64_t step, int rows, Range own, int, Range features, T* to, std::int64_t to_step) {
    const int first = int(own.begin), lanes = int(own.end - own.begin), count = int(features.end - features.begin);
    from += first * kNumbers<T> * step + features.begin;
    to += features.begin * to_step + first;
    if constexpr (kNumbers<T> == 2)
      pack_row_pairs(from, step, rows - 2 * first, count, to, to_step, lanes);
    else
      pack_transposed(from, step, rows - first, count, to, to_step, lanes);
  }

  static void blocks(int, const T* dy, const T* const* x, std::int64_t step, int lanes, int, int bm, int bn, Sum<T>* const* to,
                     bool add) {
    block(dy, *x, step, lanes, bm, bn, *to, add);
  }

  static void block(const T* dy, const T* x, std::int64_t step, int lanes, int bm, int bn, Sum<T>* block, bool add) {
    const int row_parts = (bm + kDotRows - 1) / kDotRows, col_parts = (bn + kDotCols - 1) / kDotCols;
    for (int p = 0; p < row_parts; ++p)
      for (int q = 0; q < col_parts; ++q) {
        const Range a = share(bm, row_parts, p), b = share(bn, col_parts, q);
        inner_products_of<T>(int(a.end - a.begin), int(b.end - b.begin), dy + a.begin * step, x + b.begin * step, step, lanes,
                             block + a.begin * bn + b.begin, bn, add);
      }
  }
};

template <class T>
struct ByRows {
  using Panel = T;
  static constexpr int unit = 1, most = 128, row_unit = 1, most_blocks = 1;

  // `features` are whole blocks of `width`; a block's rows stand one after another
  template <class X>
  static void pack(const X* from, std::int64_t step, int rows, Range own, int width, Range features, T* to, std::int64_t to_step) {
    constexpr int per = kNumbers<T>;
    for (std::int64_t t = own.begin; t < own.end && t * per < rows; ++t)
      for (std::int64_t c = features.begin; c < features.end; c += width) {
        const X* row = from + t * per * step + c;
        T* block = to + c * to_step + t * width;
        if constexpr (per == 2)
          interleave(row, t * per + 1 < rows ? row + step : nullptr, width, block);
        else
          convert(row, width, block);
      }
  }

  static void blocks(int, const T* dy, const T* const* x, std::int64_t, int, int rows, int bm, int bn, Sum<T>* const* to, bool add) {
    constexpr int n = kLanes<T>;
    int q = 0;
    for (; q + 2 * n <= bn; q += 2 * n)
      outer_products_of<T, 2, (kRegisters == 32 ? 8 : 6)>(bm, dy, bm, *x + q, bn, rows, *to + q, bn, add);
    if (q < bn) outer_products_of<T, 1, (kRegisters == 32 ? 16 : 12)>(bm, dy, bm, *x + q, bn, rows, *to + q, bn, add);
  }
};

// Some hundreds of rows of x and dy at a time go into panels that all threads share; then each thread owns rows of blocks, so no
// two write the same values, and the result does not depend on how many there are. Sums of bf16 wait in float until the last rows.
template <class Way, class X>
void grad_values(const PackedIndex& index, const X* dy, const X* x, std::int64_t count, X* dvalues, int threads) {
  using T = typename Way::Panel;
  constexpr int n = kLanes<T>, per = kNumbers<T>;
  constexpr bool in_place = std::is_same_v<Wide<X>, X>;
  constexpr std::int64_t stripe_bytes = 384 << 10;
  static thread_local Scratch left_scratch, right_scratch, sums_scratch;
  const int bm = int(index.bm), bn = int(index.bn), area = bm * bn;
  const std::int64_t outputs = index.m1 * bm, inputs = index.n1 * bn, vectors = (count + n * per - 1) / (n * per);
  // a vector more than the rows, so that features are not all a power of two apart, in few sets of the cache
  const std::int64_t chunks = (vectors * n + Way::most - 1) / Way::most, widest = ((vectors + chunks - 1) / chunks + 1) * n;
  T* left = left_scratch.take<T>(std::size_t(outputs) * widest);
  T* right = right_scratch.take<T>(std::size_t(inputs) * widest);
  Wide<X>* sums = nullptr;
  if (!in_place) sums = sums_scratch.take<Wide<X>>(std::size_t(chunks > 1 ? index.crow[index.m1] : threads * Way::most_blocks) * area);
  const std::int64_t stripe = std::max<std::int64_t>(1, stripe_bytes / std::int64_t(sizeof(T)) / (widest * bn));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int team = omp_get_num_threads(), self = omp_get_thread_num();
    const Range own = share_rows(index.crow, index.m1, team, self);
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
      const Range part = share(vectors, int(chunks), int(chunk));
      const std::int64_t first = part.begin * n * per;
      const int lanes = int(part.end - part.begin) * n, here = int(std::min<std::int64_t>(count - first, lanes * per));
      // threads share the rows, since memory answers faster where whole rows are read; where those are few, the features too
      const int groups = (lanes + Way::row_unit - 1) / Way::row_unit, bands = std::min(team, groups), helpers = team / bands;
      auto pack = [&](const X* from, std::int64_t features, int width, T* to) {
        if (self >= bands * helpers) return;
        const std::int64_t unit = Way::unit == 1 ? width : Way::unit;
        const Range band = share(groups, bands, self / helpers);
        const Range units = share((features + unit - 1) / unit, helpers, self % helpers);
        Way::pack(from + first * features, features, here,
                  {band.begin * Way::row_unit, std::min<std::int64_t>(lanes, band.end * Way::row_unit)}, width,
                  {units.begin * unit, std::min(features, units.end * unit)}, to, widest);
      };
      pack(dy, outputs, bm, left);
      pack(x, inputs, bn, right);
#pragma omp barrier
      for (std::int64_t col = 0; col < index.n1; col += stripe)
        for (std::int64_t row = own.begin; row < own.end; ++row) {
          const std::int32_t *begin = index.col + index.crow[row], *end = index.col + index.crow[row + 1];
          if (index.n1 > stripe) {
            begin = std::lower_bound(begin, end, std::int32_t(col));
            end = std::lower_bound(begin, end, std::int32_t(std::min(index.n1, col + stripe)));
          }
          for (const std::int32_t* k = begin; k < end;) {
            const int number = int(std::min<std::int64_t>(Way::most_blocks, end - k));
            const T* from[Way::most_blocks] = {};
            Wide<X>* to[Way::most_blocks] = {};
            for (int b = 0; b < number; ++b) {
              const std::int64_t entry = k + b - index.col;
              from[b] = right + std::int64_t(k[b]) * bn * widest;
              if constexpr (in_place)
                to[b] = dvalues + std::int64_t(index.slot[entry]) * area;
              else
                to[b] = sums + (chunks > 1 ? entry : self * Way::most_blocks + b) * area;
            }
            Way::blocks(number, left + row * bm * widest, from, widest, lanes, (here + per - 1) / per, bm, bn, to, chunk > 0);
            if constexpr (!in_place)
              if (chunk + 1 == chunks)
                for (int b = 0; b < number; ++b)
                  convert(to[b], area, dvalues + std::int64_t(index.slot[k + b - index.col]) * area);
            k += number;
          }
        }
#pragma omp barrier
    }
  }
}

template <class X>
void packed_grad_values(const PackedIndex& index, const X* dy, const X* x, std::int64_t count, X* dvalues, std::int64_t capacity,
                        int threads) {
  if (capacity != index.crow[index.m1] || count == 0)
    std::memset(dvalues, 0, std::size_t(capacity) * index.bm * index.bn * sizeof(X));
  if (count == 0) return;
  auto by = [&](auto way) { grad_values<decltype(way)>(index, dy, x, count, dvalues, threads); };
  using T = std::conditional_t<std::is_same_v<X, Bf16> && kPairProducts, Word, Wide<X>>;
  // measured: with one vector along a block outer products win where there are registers for 16 of its rows, and only there
  const bool one_wins = kVectorBytes == 64 && (index.bm >= 8 || std::is_same_v<T, Word>);
  if (index.bn % (one_wins ? kLanes<T> : 2 * kLanes<T>) == 0) return by(ByRows<T>{});
  if constexpr (kRowGroups && sizeof(T) == 4) {
    if (index.bn % 8 == 0) return by(ByGroups<T, 2>{});
    if (index.bn % 4 == 0) return by(ByGroups<T, 4>{});
  }
  by(ByFeatures<T>{});
}

}  // namespace KRONBLOCKS_ISA
