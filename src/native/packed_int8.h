// y = x W^T with int8 values: exact sums of integers on panels as in packed.h, whose words hold several features (int8.h).
//
// Every row of x is quantised by itself. A sum times its row's factor and its output's scale, plus the bias, is y. Few rows of x take
// another way, see packed_int8_few.h.
#pragma once

#include "packed.h"
#include "packed_int8_few.h"

namespace KRONBLOCKS_ISA {

// What makes y of sums, for every output
struct Rescale {
  const float *scales, *bias;  // bias may be null
  const Word* offsets;         // null where there is none
};

// R outputs of one block row, for V vectors of rows of x
template <int R, int V>
inline void multiply_int8_rows(const Blocks<Word, false>& w, std::int64_t row, int first, const Word* panel, std::ptrdiff_t step,
                               const Rescale& rescale, const float* factors, float* out, std::ptrdiff_t out_step) {
  constexpr int n = kLanes<Word>;
  const std::int64_t outputs = row * w.out + first;
  Vec<Word> sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) sum[r][v] = kOffset ? Vec<Word>{} - rescale.offsets[outputs + r] : Vec<Word>{};
  for (std::int32_t k = w.starts[row]; k < w.starts[row + 1]; ++k) {
    const Word* block = w.block(k) + first * w.in;
    const Word* x = panel + std::int64_t(w.source[k]) * w.in * step;
    fetch_ahead<R>(w, k, first, block);
    int left = w.in;
    do {  // at least once: GCC would keep the sums of a loop that may be empty apart
      Vec<Word> lanes[V];
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) lanes[v] = load<Vec<Word>>(x + v * n);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
        for (int v = 0; v < V; ++v) sum[r][v] = dot<kVectorBytes>(sum[r][v], lanes[v], Vec<Word>{} + block[r * w.in]);
      x += step, ++block;
    } while (--left > 0);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const float scale = rescale.scales[outputs + r], bias = rescale.bias ? rescale.bias[outputs + r] : 0.0f;
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) {
      const Vec<float> total = __builtin_convertvector((Vec<std::int32_t>)sum[r][v], Vec<float>);
      store(out + r * out_step + v * n, total * scale * load<Vec<float>>(factors + v * n) + bias);
    }
  }
}

template <int V, int R = kMaxRows>
inline void multiply_int8_rows_of(int rows, const Blocks<Word, false>& w, std::int64_t row, int first, const Word* panel,
                                  std::ptrdiff_t step, const Rescale& rescale, const float* factors, float* out,
                                  std::ptrdiff_t out_step) {
  if (rows == R)
    multiply_int8_rows<R, V>(w, row, first, panel, step, rescale, factors, out, out_step);
  else if constexpr (R > 1)
    multiply_int8_rows_of<V, R - 1>(rows, w, row, first, panel, step, rescale, factors, out, out_step);
}

// Block rows [rows.begin, rows.end) for one panel of V vectors. Finished features wait until they fill whole lines of y.
template <int V, class X>
void multiply_int8_panel(const Blocks<Word, false>& w, Range rows, const Word* panel, const Rescale& rescale, const float* factors,
                         int count, X* y, std::ptrdiff_t y_step, float* waiting) {
  constexpr int line = kLineBytes / int(sizeof(X));
  constexpr std::ptrdiff_t step = V * kLanes<Word>;
  const int parts = (w.out + kMaxRows - 1) / kMaxRows;
  int have = 0;
  X* to = y + rows.begin * w.out;
  for (std::int64_t row = rows.begin; row < rows.end; ++row) {
    for (int part = 0; part < parts; ++part) {
      const Range chunk = share(w.out, parts, part);
      const int first = int(chunk.begin), height = int(chunk.end - chunk.begin);
      multiply_int8_rows_of<V>(height, w, row, first, panel, step, rescale, factors, waiting + have * step, step);
      have += height;
    }
    const int ready = row + 1 == rows.end ? have : have / line * line;
    if (ready) {
      unpack_transposed(waiting, step, count, ready, to, y_step);
      to += ready;
      have -= ready;
      std::memmove(waiting, waiting + ready * step, have * step * sizeof(float));
    }
  }
}

// y of as many rows of x as a panel of `width` vectors holds
template <class X>
void multiply_int8_panel(int width, const Blocks<Word, false>& w, Range rows, const Word* panel, const Rescale& rescale,
                         const float* factors, int count, X* y, std::ptrdiff_t y_step, float* waiting) {
  switch (width) {
    case 1: return multiply_int8_panel<1>(w, rows, panel, rescale, factors, count, y, y_step, waiting);
    case 2: return multiply_int8_panel<2>(w, rows, panel, rescale, factors, count, y, y_step, waiting);
    default: return multiply_int8_panel<3>(w, rows, panel, rescale, factors, count, y, y_step, waiting);
  }
}

// What the offset of x adds to the sums of a block row: kOffset times the sums of its values
inline void offsets_of(const PackedIndex& index, std::int64_t row, const std::int8_t* values, Word* sums, Word* to) {
  const int bm = int(index.bm), bn = int(index.bn);
  if (const int bytes = few_int8_bytes(bm, bn)) {
    few_int8_row<0>(bytes, index, row, nullptr, 0, 1, values, sums, 0);
    return add_words(bn / kOfWord, sums, bm, to);
  }
  std::fill_n(to, bm, Word(0));
  for (std::int32_t k = index.crow[row]; k < index.crow[row + 1]; ++k) {
    const std::int8_t* block = values + std::int64_t(index.slot[k]) * bm * bn;
    for (int a = 0; a < bm; ++a)
      for (int b = 0; b < bn; ++b) to[a] += Word(kOffset * block[a * bn + b]);
  }
}

template <class X>
void packed_product_int8(const PackedIndex& index, const X* x, std::int64_t count, const std::int8_t* values, const float* scales,
                         const float* bias, X* y, int threads) {
  constexpr int n = kLanes<Word>;
  if (count == 0) return;
  static thread_local Scratch copies_scratch, offsets_scratch;
  const int bm = int(index.bm), bn = int(index.bn), words = (bn + kOfWord - 1) / kOfWord;
  const bool in_place = kOfWord == 4 && bn % 4 == 0;  // words of values are those of memory
  const std::int64_t outputs = index.m1 * bm, inputs = index.n1 * bn, live = index.crow[index.m1], area = std::int64_t(bm) * words;
  Word* copies = in_place ? nullptr : copies_scratch.take<Word>(std::size_t(live) * area);
  Word* offsets = kOffset ? offsets_scratch.take<Word>(outputs) : nullptr;
  const Blocks<Word, false> w = {in_place ? reinterpret_cast<const Word*>(values) : copies, index.crow, nullptr, index.col,
                                 in_place ? index.slot : nullptr, bm, words, index.m1, index.n1};
  const Rescale rescale = {scales, bias, offsets};
  const std::int64_t panel_rows = index.n1 * words, vectors = (count + n - 1) / n;
  const std::int64_t fitting = std::int64_t(kPanelBytes) / (panel_rows * n * std::int64_t(sizeof(Word)));
  const int widest = int(std::max<std::int64_t>(1, std::min<std::int64_t>(kMaxVectors, fitting)));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int team = omp_get_num_threads(), self = omp_get_thread_num();
    static thread_local Scratch panels, outs, quantised, row_scratch;
    const Range own = share_rows(index.crow, index.m1, team, self);
    if (!in_place)
      for (std::int64_t k = index.crow[own.begin]; k < index.crow[own.end]; ++k)
        for (int a = 0; a < bm; ++a)
          to_words(values + (std::int64_t(index.slot[k]) * bm + a) * bn, bn, copies + k * area + std::int64_t(a) * words);
    if constexpr (kOffset != 0) {
      Word* sums = row_scratch.take<Word>(area);
      for (std::int64_t row = own.begin; row < own.end; ++row) offsets_of(index, row, values, sums, offsets + row * bm);
    }
#pragma omp barrier
    const int bands = int(std::min<std::int64_t>(team, vectors)), helpers = team / bands;
    if (self < bands * helpers) {
      Word* panel = panels.take<Word>(std::size_t(panel_rows) * widest * n);
      float* waiting = outs.take<float>(std::size_t(bm + kLineBytes / sizeof(X)) * kMaxVectors * n);
      Word* rows_of_x = quantised.take<Word>(std::size_t(panel_rows) * widest * n);
      Small* row_of_x = row_scratch.take<Small>(inputs);
      float factors[kMaxVectors * n] = {};
      const Range band = share(vectors, bands, self / helpers), rows = share_rows(w.starts, w.out_blocks, helpers, self % helpers);
      const std::int64_t tiles = (band.end - band.begin + widest - 1) / widest;
      for (std::int64_t tile = 0; tile < tiles; ++tile) {
        const Range part = share(band.end - band.begin, int(tiles), int(tile));
        const int width = int(part.end - part.begin);
        const std::int64_t first = (band.begin + part.begin) * n;
        const int here = int(std::min<std::int64_t>(count - first, width * n));
        for (int t = 0; t < here; ++t)
          factors[t] = quantise_to_words(x + (first + t) * inputs, index.n1, bn, row_of_x, rows_of_x + t * panel_rows);
        pack_transposed(rows_of_x, panel_rows, here, int(panel_rows), panel, width * n, width * n);
        multiply_int8_panel(width, w, rows, panel, rescale, factors, here, y + first * outputs, outputs, waiting);
      }
    }
  }
}

template <class X>
void packed_linear_int8(const PackedIndex& index, const X* x, std::int64_t count, const std::int8_t* values, const float* scales,
                        const float* bias, X* y, int threads) {
  if (!packed_few_int8(index, x, count, values, scales, bias, y, threads))
    packed_product_int8(index, x, count, values, scales, bias, y, threads);
}

}  // namespace KRONBLOCKS_ISA
