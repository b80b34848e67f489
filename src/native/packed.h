// Two of the three products with packed blocks: y = x W^T and dx = dy W.
//
// They work on panels: some rows of x, transposed, so that one vector holds one feature of several rows. Every block size runs at
// full width then, since vectors never run along a block. Few rows of x take another way, see packed_few.h.
//
// T: what panels and values are made of, and X: what x and y are. They differ for bf16, whose panels are float, or pairs of features
// (Word; sides and steps count pairs then).
#pragma once

#include "api.h"
#include "bf16.h"
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
  const std::int32_t *starts, *order, *source, *slot;  // slot: null where the values lie as this product reads them
  int out, in;  // sides of a block, seen from this product
  std::int64_t out_blocks, in_blocks;

  static constexpr bool transposed = Transposed;
  std::int32_t entry(std::int32_t k) const { return Transposed ? order[k] : k; }
  const T* block(std::int32_t k) const { return values + std::int64_t(slot ? slot[entry(k)] : k) * out * in; }
  // where in a panel the features begin that a block multiplies
  std::int64_t place(std::int32_t k, std::ptrdiff_t step) const { return std::int64_t(source[entry(k)]) * in * step; }
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
  const T* next = w.block(std::min(k + 2, w.starts[w.out_blocks] - 1));
  for (int i = 0; i < std::min(w.in * w.out, most); i += line) __builtin_prefetch(next + i);
}

// R outputs of one block row, for V vectors of rows of x
template <class T, int R, int V, class W>
inline void multiply_rows(const W& w, std::int64_t row, int first, const T* panel, std::ptrdiff_t step,
                          const Sum<T>* bias, Sum<T>* out, std::ptrdiff_t out_step) {
  constexpr int n = kLanes<T>;
  using Sums = Vec<Sum<T>>;
  Sums sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) sum[r][v] = bias ? Sums{} + bias[r] : Sums{};
  const std::ptrdiff_t row_step = W::transposed ? 1 : w.in, col_step = W::transposed ? w.out : 1;
  for (std::int32_t k = w.starts[row]; k < w.starts[row + 1]; ++k) {
    const T* block = w.block(k) + first * row_step;
    const T* x = panel + w.place(k, step);
    fetch_ahead<R>(w, k, first, block);
    for (int p = 0; p < w.in; ++p, x += step, block += col_step) {
      Vec<T> lanes[V];
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) lanes[v] = load<Vec<T>>(x + v * n);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
        for (int v = 0; v < V; ++v) sum[r][v] = multiply_add<T>(sum[r][v], lanes[v], block[r * row_step]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) store(out + r * out_step + v * n, sum[r][v]);
}

template <class T, int V, class W, int R = kMaxRows>
inline void multiply_rows_of(int rows, const W& w, std::int64_t row, int first, const T* panel, std::ptrdiff_t step,
                             const Sum<T>* bias, Sum<T>* out, std::ptrdiff_t out_step) {
  if (rows == R)
    multiply_rows<T, R, V>(w, row, first, panel, step, bias, out, out_step);
  else if constexpr (R > 1)
    multiply_rows_of<T, V, W, R - 1>(rows, w, row, first, panel, step, bias, out, out_step);
}

// Block rows [rows.begin, rows.end) for one panel of V vectors. Finished features wait until they fill whole lines of y.
template <class T, int V, bool Transposed, class X>
void multiply_panel(const Blocks<T, Transposed>& w, Range rows, const T* panel, std::ptrdiff_t step, const Sum<T>* bias, int count,
                    X* y, std::ptrdiff_t y_step, Sum<T>* waiting) {
  constexpr int n = kLanes<T>, line = kLineBytes / int(sizeof(X));
  constexpr std::ptrdiff_t out_step = V * n;
  const int parts = (w.out + kMaxRows - 1) / kMaxRows;
  int have = 0;
  X* to = y + rows.begin * w.out;
  for (std::int64_t row = rows.begin; row < rows.end; ++row) {
    for (int part = 0; part < parts; ++part) {
      const Range chunk = share(w.out, parts, part);
      const int first = int(chunk.begin), height = int(chunk.end - chunk.begin);
      const Sum<T>* own_bias = bias ? bias + row * w.out + first : nullptr;
      multiply_rows_of<T, V>(height, w, row, first, panel, step, own_bias, waiting + have * out_step, out_step);
      have += height;
    }
    const int ready = row + 1 == rows.end ? have : have / line * line;
    if (ready) {
      unpack_transposed(waiting, out_step, count, ready, to, y_step);
      to += ready;
      have -= ready;
      std::memmove(waiting, waiting + ready * out_step, have * out_step * sizeof(Sum<T>));
    }
  }
}

template <class T, bool Transposed, class X>
void multiply_panel(int vectors, const Blocks<T, Transposed>& w, Range rows, const T* panel, std::ptrdiff_t step,
                    const Sum<T>* bias, int count, X* y, std::ptrdiff_t y_step, Sum<T>* waiting) {
  switch (vectors) {
    case 1: return multiply_panel<T, 1>(w, rows, panel, step, bias, count, y, y_step, waiting);
    case 2: return multiply_panel<T, 2>(w, rows, panel, step, bias, count, y, y_step, waiting);
    default: return multiply_panel<T, 3>(w, rows, panel, step, bias, count, y, y_step, waiting);
  }
}

// y (count, out_blocks * out) = x (count, in_blocks * in) W^T + bias. Threads share the rows of x; where those are few, the
// rows of blocks. `prepare` is called first, by every thread with the number of them and its own.
template <class T, bool Transposed, class X, class Prepare>
void multiply(const Blocks<T, Transposed>& w, const X* x, std::int64_t count, const Sum<T>* bias, X* y, int threads,
              Prepare prepare) {
  constexpr int n = kLanes<T>;
  if (count == 0) return;
  const std::int64_t outputs = w.out_blocks * w.out, vectors = (count + n - 1) / n;
  const std::int64_t panel_rows = w.in_blocks * w.in, inputs = panel_rows * kNumbers<T>;
  const std::int64_t fitting = std::int64_t(kPanelBytes) / (panel_rows * n * std::int64_t(sizeof(T)));
  const int widest = int(std::max<std::int64_t>(1, std::min<std::int64_t>(kMaxVectors, fitting)));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int team = omp_get_num_threads(), self = omp_get_thread_num();
    const int bands = int(std::min<std::int64_t>(team, vectors)), helpers = team / bands;
    prepare(team, self);
    if (self < bands * helpers) {
      static thread_local Scratch panels, outs;
      T* panel = panels.take<T>(std::size_t(panel_rows) * widest * n);
      Sum<T>* waiting = outs.take<Sum<T>>(std::size_t(w.out + kLineBytes / sizeof(X)) * kMaxVectors * n);
      const Range band = share(vectors, bands, self / helpers);
      const Range rows = share_rows(w.starts, w.out_blocks, helpers, self % helpers);
      const std::int64_t tiles = (band.end - band.begin + widest - 1) / widest;
      for (std::int64_t tile = 0; tile < tiles; ++tile) {
        const Range part = share(band.end - band.begin, int(tiles), int(tile));
        const int width = int(part.end - part.begin);
        const std::int64_t first = (band.begin + part.begin) * n;
        const int here = int(std::min<std::int64_t>(count - first, width * n));
        pack_transposed(x + first * inputs, inputs, here, int(inputs), panel, width * n, width * n);
        multiply_panel(width, w, rows, panel, width * n, bias, here, y + first * outputs, outputs, waiting);
      }
    }
  }
}

// The blocks of W (for y) or W^T (for dx) in elements of type T
template <bool Transposed, class T>
Blocks<T, Transposed> blocks_of(const PackedIndex& index, const T* values, const std::int32_t* slot) {
  const int bm = int(index.bm), bn = int(index.bn);
  if constexpr (Transposed)
    return {values, index.ccol, index.order, index.row, slot, bn, bm / kNumbers<T>, index.n1, index.m1};
  else
    return {values, index.crow, nullptr, index.col, slot, bm, bn / kNumbers<T>, index.m1, index.n1};
}

template <bool Transposed, class T>
void packed_product(const PackedIndex& index, const T* x, std::int64_t count, const T* values, const T* bias, T* y, int threads) {
  multiply(blocks_of<Transposed>(index, values, index.slot), x, count, bias, y, threads, [](int, int) {});
}

// With bf16: copies of the live blocks are made first, in the order in which they are wanted, widened or as pairs of what is summed
// over. Pairs that lie together already are read where they are.
template <bool Transposed>
void packed_product(const PackedIndex& index, const Bf16* x, std::int64_t count, const Bf16* values, const Bf16* bias, Bf16* y,
                    int threads) {
  static thread_local Scratch copies_scratch, bias_scratch;
  const std::int64_t bm = index.bm, bn = index.bn, outputs = index.m1 * bm, live = index.crow[index.m1];
  float* wide_bias = bias ? bias_scratch.take<float>(outputs) : nullptr;
  if (bias) convert(bias, outputs, wide_bias);
  auto run = [&](auto* copies, auto copy_block) {
    const auto blocks = blocks_of<Transposed>(index, copies, nullptr);
    multiply(blocks, x, count, wide_bias, y, threads, [&](int team, int self) {
      const Range own = share(live, team, self);
      for (std::int64_t k = own.begin; k < own.end; ++k) {
        const std::int32_t entry = blocks.entry(std::int32_t(k));
        copy_block(values + index.slot[entry] * bm * bn, copies + k * (blocks.in * blocks.out));
      }
#pragma omp barrier
    });
  };
  if constexpr (kPairProducts) {
    if (!Transposed && bn % 2 == 0) {
      const auto* pairs = reinterpret_cast<const Word*>(values);
      return multiply(blocks_of<false>(index, pairs, index.slot), x, count, wide_bias, y, threads, [](int, int) {});
    }
    if (Transposed && bm % 2 == 0)
      return run(copies_scratch.take<Word>(live * bm * bn / 2), [&](const Bf16* from, Word* to) {
        for (std::int64_t a = 0; a < bm; a += 2, from += 2 * bn, to += bn) interleave(from, from + bn, int(bn), to);
      });
  }
  run(copies_scratch.take<float>(live * bm * bn), [&](const Bf16* from, float* to) { convert(from, bm * bn, to); });
}

template <class T>
void packed_linear(const PackedIndex& index, const T* x, std::int64_t count, const T* values, const T* bias, T* y, int threads) {
  if (!packed_few(index, x, count, values, bias, y, threads))
    packed_product<false>(index, x, count, values, bias, y, threads);
}

template <class T>
void packed_grad_input(const PackedIndex& index, const T* dy, std::int64_t count, const T* values, T* dx, int threads) {
  packed_product<true>(index, dy, count, values, static_cast<const T*>(nullptr), dx, threads);
}

}  // namespace KRONBLOCKS_ISA
