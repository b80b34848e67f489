// The three products with packed blocks: y = x W^T, dx = dy W, and dvalues = the live blocks of dy^T x.
//
// The first two work on panels: some rows of x, transposed, so that one vector holds one feature of several rows. Every block
// size runs at full width then, since vectors never run along a block. Few rows of x take another way, see packed_few.h.
#pragma once

#include "api.h"
#include "packed_few.h"
#include "scratch.h"
#include "simd.h"

namespace KRONBLOCKS_ISA {

constexpr int kMaxVectors = 3;                          // of one panel row, in registers at once
constexpr int kMaxRows = kRegisters == 32 ? 8 : 4;      // of a block, in registers at once: 8 x 3 + 3 or 4 x 3 + 3 registers
constexpr int kLineBytes = 64;                          // of the caches
constexpr std::size_t kPanelBytes = 512 << 10;          // a panel should stay in the second-level cache

// The blocks as one product sees them. W: rows of W are outputs. W^T: its columns are, and `order` lists the entries.
template <class T, bool Transposed>
struct Blocks {
  const T* values;
  const std::int32_t *starts, *order, *source, *slot;
  int out, in;  // sides of a block, seen from this product
  std::int64_t out_blocks, in_blocks;

  std::int32_t entry(std::int32_t k) const { return Transposed ? order[k] : k; }
  const T* block(std::int32_t entry) const { return values + std::int64_t(slot[entry]) * out * in; }
};

// Ask for values that are wanted soon: the next R rows of a block of W; of W^T, whose blocks lie apart, the block after the next.
template <int R, class T>
[[gnu::always_inline]] inline void fetch_ahead(const Blocks<T, false>& w, std::int32_t, int, const T* rows) {
#pragma GCC unroll 8
  for (int r = R; r < 2 * R; ++r) __builtin_prefetch(rows + r * w.in);
}

template <int R, class T>
[[gnu::always_inline]] inline void fetch_ahead(const Blocks<T, true>& w, std::int32_t k, int first, const T*) {
  constexpr int line = kLineBytes / int(sizeof(T)), most = 16 * line;
  if (first > 0) return;  // its values are here already
  const T* next = w.block(w.order[std::min(k + 2, w.starts[w.out_blocks] - 1)]);
  for (int i = 0; i < std::min(w.in * w.out, most); i += line) __builtin_prefetch(next + i);
}

// R outputs of one block row, for V vectors of rows of x
template <class T, int R, int V, bool Transposed>
inline void multiply_rows(const Blocks<T, Transposed>& w, std::int64_t row, int first, const T* panel, std::ptrdiff_t step,
                          const T* bias, T* out, std::ptrdiff_t out_step) {
  constexpr int n = kLanes<T>;
  Vec<T> sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) sum[r][v] = bias ? Vec<T>{} + bias[r] : Vec<T>{};
  const std::ptrdiff_t row_step = Transposed ? 1 : w.in, col_step = Transposed ? w.out : 1;
  for (std::int32_t k = w.starts[row]; k < w.starts[row + 1]; ++k) {
    const std::int32_t entry = w.entry(k);
    const T* block = w.block(entry) + first * row_step;
    const T* x = panel + std::int64_t(w.source[entry]) * w.in * step;
    fetch_ahead<R>(w, k, first, block);
    for (int p = 0; p < w.in; ++p, x += step, block += col_step) {
      Vec<T> lanes[V];
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) lanes[v] = load<Vec<T>>(x + v * n);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
        for (int v = 0; v < V; ++v) sum[r][v] += lanes[v] * block[r * row_step];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) store(out + r * out_step + v * n, sum[r][v]);
}

template <class T, int V, bool Transposed, int R = kMaxRows>
inline void multiply_rows_of(int rows, const Blocks<T, Transposed>& w, std::int64_t row, int first, const T* panel,
                             std::ptrdiff_t step, const T* bias, T* out, std::ptrdiff_t out_step) {
  if (rows == R)
    multiply_rows<T, R, V, Transposed>(w, row, first, panel, step, bias, out, out_step);
  else if constexpr (R > 1)
    multiply_rows_of<T, V, Transposed, R - 1>(rows, w, row, first, panel, step, bias, out, out_step);
}

// Block rows [rows.begin, rows.end) for one panel of V vectors. Finished features wait until they fill whole lines of y.
template <class T, int V, bool Transposed>
void multiply_panel(const Blocks<T, Transposed>& w, Range rows, const T* panel, std::ptrdiff_t step, const T* bias, int count,
                    T* y, std::ptrdiff_t y_step, T* waiting) {
  constexpr int n = kLanes<T>, line = kLineBytes / int(sizeof(T));
  constexpr std::ptrdiff_t out_step = V * n;
  const int parts = (w.out + kMaxRows - 1) / kMaxRows;
  int have = 0;
  T* to = y + rows.begin * w.out;
  for (std::int64_t row = rows.begin; row < rows.end; ++row) {
    for (int part = 0; part < parts; ++part) {
      const Range chunk = share(w.out, parts, part);
      const int first = int(chunk.begin), height = int(chunk.end - chunk.begin);
      const T* own_bias = bias ? bias + row * w.out + first : nullptr;
      multiply_rows_of<T, V, Transposed>(height, w, row, first, panel, step, own_bias, waiting + have * out_step, out_step);
      have += height;
    }
    const int ready = row + 1 == rows.end ? have : have / line * line;
    if (ready) {
      unpack_transposed(waiting, out_step, count, ready, to, y_step);
      to += ready;
      have -= ready;
      std::memmove(waiting, waiting + ready * out_step, have * out_step * sizeof(T));
    }
  }
}

template <class T, bool Transposed>
void multiply_panel(int vectors, const Blocks<T, Transposed>& w, Range rows, const T* panel, std::ptrdiff_t step, const T* bias,
                    int count, T* y, std::ptrdiff_t y_step, T* waiting) {
  switch (vectors) {
    case 1: return multiply_panel<T, 1, Transposed>(w, rows, panel, step, bias, count, y, y_step, waiting);
    case 2: return multiply_panel<T, 2, Transposed>(w, rows, panel, step, bias, count, y, y_step, waiting);
    default: return multiply_panel<T, 3, Transposed>(w, rows, panel, step, bias, count, y, y_step, waiting);
  }
}

// y (count, out_blocks * out) = x (count, in_blocks * in) W^T + bias. Threads share the rows of x; where those are few, the
// rows of blocks.
template <class T, bool Transposed>
void multiply(const Blocks<T, Transposed>& w, const T* x, std::int64_t count, const T* bias, T* y, int threads) {
  constexpr int n = kLanes<T>;
  if (count == 0) return;
  const std::int64_t inputs = w.in_blocks * w.in, outputs = w.out_blocks * w.out, vectors = (count + n - 1) / n;
  const int widest = int(std::max<std::int64_t>(1, std::min<std::int64_t>(kMaxVectors, kPanelBytes / (inputs * n * sizeof(T)))));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int team = omp_get_num_threads(), self = omp_get_thread_num();
    const int bands = int(std::min<std::int64_t>(team, vectors)), helpers = team / bands;
    if (self < bands * helpers) {
      static thread_local Scratch panels, outs;
      T* panel = panels.take<T>(std::size_t(inputs) * widest * n);
      T* waiting = outs.take<T>(std::size_t(w.out + kLineBytes / sizeof(T)) * kMaxVectors * n);
      const Range band = share(vectors, bands, self / helpers);
      const Range rows = share_rows(w.starts, w.out_blocks, helpers, self % helpers);
      const std::int64_t tiles = (band.end - band.begin + widest - 1) / widest;
      for (std::int64_t tile = 0; tile < tiles; ++tile) {
        const Range part = share(band.end - band.begin, int(tiles), int(tile));
        const int width = int(part.end - part.begin);
        const std::int64_t first = (band.begin + part.begin) * n;
        const int here = int(std::min<std::int64_t>(count - first, width * n));
        pack_transposed(x + first * inputs, inputs, here, int(inputs), panel, width * n, width * n);
        multiply_panel<T, Transposed>(width, w, rows, panel, width * n, bias, here, y + first * outputs, outputs, waiting);
      }
    }
  }
}

template <class T>
void packed_linear(const PackedIndex& index, const T* x, std::int64_t count, const T* values, const T* bias, T* y, int threads) {
  if (packed_few(index, x, count, values, bias, y, threads)) return;
  multiply<T, false>({values, index.crow, nullptr, index.col, index.slot, int(index.bm), int(index.bn), index.m1, index.n1}, x,
                     count, bias, y, threads);
}

template <class T>
void packed_grad_input(const PackedIndex& index, const T* dy, std::int64_t count, const T* values, T* dx, int threads) {
  multiply<T, true>({values, index.ccol, index.order, index.row, index.slot, int(index.bn), int(index.bm), index.n1, index.m1},
                    dy, count, nullptr, dx, threads);
}

// Inner products over rows of x of R features of dy with Q features of x, added to or stored in an R x Q corner of a block
template <class T, int R, int Q>
inline void inner_products(const T* dy, const T* x, std::ptrdiff_t step, int lanes, T* block, int block_step, bool add) {
  constexpr int n = kLanes<T>;
  Vec<T> sum[R * Q] = {};
  for (int t = 0; t < lanes; t += n) {
    Vec<T> right[Q];
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) right[q] = load<Vec<T>>(x + q * step + t);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec<T> left = load_once<Vec<T>>(dy + r * step + t);
#pragma GCC unroll 8
      for (int q = 0; q < Q; ++q) sum[r * Q + q] += left * right[q];
    }
  }
  T result[R * Q];
  lane_sums<T, R * Q>(sum, result);
  for (int r = 0; r < R; ++r)
    for (int q = 0; q < Q; ++q) block[r * block_step + q] = result[r * Q + q] + (add ? block[r * block_step + q] : T(0));
}

constexpr int kDotRows = 4, kDotCols = kRegisters == 32 ? 4 : 3;

template <class T, int R = kDotRows, int Q = kDotCols>
inline void inner_products_of(int rows, int cols, const T* dy, const T* x, std::ptrdiff_t step, int lanes, T* block,
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
inline void outer_products(const T* dy, int dy_step, const T* x, int x_step, int rows, T* block, int block_step, bool add) {
  constexpr int n = kLanes<T>;
  Vec<T> sum[R][V] = {};
  for (int t = 0; t < rows; ++t, dy += dy_step, x += x_step) {
    Vec<T> right[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) right[v] = load<Vec<T>>(x + v * n);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[r][v] += right[v] * dy[r];
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      T* to = block + r * block_step + v * n;
      store(to, add ? sum[r][v] + load<Vec<T>>(to) : sum[r][v]);
    }
}

template <class T, int V, int R>
inline void outer_products_of(int count, const T* dy, int dy_step, const T* x, int x_step, int rows, T* block, int block_step,
                              bool add) {
  for (; count >= R; count -= R, dy += R, block += R * block_step)
    outer_products<T, R, V>(dy, dy_step, x, x_step, rows, block, block_step, add);
  if constexpr (R > 1) {
    if (count) outer_products_of<T, V, (R + 1) / 2>(count, dy, dy_step, x, x_step, rows, block, block_step, add);
  }
}

// How a block's gradient is summed over rows of x: as inner products of features, for which dy and x are transposed (every block
// size), or as outer products of rows, for which blocks of columns are copied together.
template <class T>
struct ByFeatures {
  static constexpr int unit = kLanes<T>;

  static void pack(const T* from, std::int64_t step, int rows, int lanes, int, std::int64_t begin, std::int64_t end, T* to,
                   std::int64_t to_step) {
    pack_transposed(from + begin, step, rows, int(end - begin), to + begin * to_step, to_step, lanes);
  }

  static void block(const T* dy, const T* x, std::int64_t step, int lanes, int, int bm, int bn, T* block, bool add) {
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
  static constexpr int unit = 1;

  // features [begin, end) are whole blocks of `width`; a block's rows stand one after another
  static void pack(const T* from, std::int64_t step, int rows, int, int width, std::int64_t begin, std::int64_t end, T* to,
                   std::int64_t to_step) {
    for (int t = 0; t < rows; ++t)
      for (std::int64_t c = begin; c < end; c += width)
        std::memcpy(to + c * to_step + std::int64_t(t) * width, from + t * step + c, width * sizeof(T));
  }

  static void block(const T* dy, const T* x, std::int64_t, int, int rows, int bm, int bn, T* block, bool add) {
    constexpr int n = kLanes<T>;
    int q = 0;
    for (; q + 2 * n <= bn; q += 2 * n)
      outer_products_of<T, 2, (kRegisters == 32 ? 8 : 6)>(bm, dy, bm, x + q, bn, rows, block + q, bn, add);
    if (q < bn) outer_products_of<T, 1, (kRegisters == 32 ? 16 : 12)>(bm, dy, bm, x + q, bn, rows, block + q, bn, add);
  }
};

// Some hundreds of rows of x and dy at a time go into panels that all threads share; then each thread owns rows of blocks, so no
// two write the same values, and the result does not depend on how many there are.
template <class T, class Way>
void grad_values(const PackedIndex& index, const T* dy, const T* x, std::int64_t count, T* dvalues, int threads) {
  constexpr int n = kLanes<T>, most = Way::unit == 1 ? 128 : 512;
  constexpr std::int64_t stripe_bytes = 192 << 10;
  static thread_local Scratch left_scratch, right_scratch;
  const int bm = int(index.bm), bn = int(index.bn), area = bm * bn;
  const std::int64_t outputs = index.m1 * bm, inputs = index.n1 * bn, vectors = (count + n - 1) / n;
  // a vector more than the rows, so that features are not all a power of two apart, in few sets of the cache
  const std::int64_t chunks = (vectors * n + most - 1) / most, widest = ((vectors + chunks - 1) / chunks + 1) * n;
  T* left = left_scratch.take<T>(std::size_t(outputs) * widest);
  T* right = right_scratch.take<T>(std::size_t(inputs) * widest);
  const std::int64_t stripe = std::max<std::int64_t>(1, stripe_bytes / std::int64_t(sizeof(T)) / (widest * bn));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int team = omp_get_num_threads(), self = omp_get_thread_num();
    const Range own = share_rows(index.crow, index.m1, team, self);
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
      const Range part = share(vectors, int(chunks), int(chunk));
      const std::int64_t first = part.begin * n;
      const int lanes = int(part.end - part.begin) * n, here = int(std::min<std::int64_t>(count - first, lanes));
      auto pack = [&](const T* from, std::int64_t features, int width, T* to) {
        const std::int64_t unit = Way::unit == 1 ? width : Way::unit;
        const Range share_of = share((features + unit - 1) / unit, team, self);
        Way::pack(from + first * features, features, here, lanes, width, share_of.begin * unit,
                  std::min(features, share_of.end * unit), to, widest);
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
          for (const std::int32_t* k = begin; k < end; ++k)
            Way::block(left + row * bm * widest, right + std::int64_t(*k) * bn * widest, widest, lanes, here, bm, bn,
                       dvalues + std::int64_t(index.slot[k - index.col]) * area, chunk > 0);
        }
#pragma omp barrier
    }
  }
}

template <class T>
void packed_grad_values(const PackedIndex& index, const T* dy, const T* x, std::int64_t count, T* dvalues, std::int64_t capacity,
                        int threads) {
  if (capacity != index.crow[index.m1] || count == 0)
    std::memset(dvalues, 0, std::size_t(capacity) * index.bm * index.bn * sizeof(T));
  if (count == 0) return;
  if (index.bn % (2 * kLanes<T>) == 0)  // with one vector along a block, measured: now faster, now much slower
    grad_values<T, ByRows<T>>(index, dy, x, count, dvalues, threads);
  else
    grad_values<T, ByFeatures<T>>(index, dy, x, count, dvalues, threads);
}

}  // namespace KRONBLOCKS_ISA
