// y = x W^T with int8 values for very few rows of x, where reading the values is all the time there is: vectors run along a block's
// values. Its sums of the values themselves serve more rows, too.
#pragma once

#include "api.h"
#include "int8.h"
#include "packed_few.h"
#include "scratch.h"

namespace KRONBLOCKS_ISA {

// of so many rows of x, and of the values if x has an offset
template <int N>
constexpr int kSums = std::max(1, N + (kOffset ? 1 : 0));

// V vectors of every block of a block row, beginning with vector `first`, times N rows of x. `x` has been repeated so that its
// words meet their values, `width` vectors for a block. U blocks are read at a time, so that sums do not wait for each other.
template <int N, int Bytes, int V>
void few_int8_vectors(const PackedIndex& index, std::int64_t row, int first, const Word* x, std::ptrdiff_t x_step, int width,
                      const std::int8_t* values, Word* sums, std::ptrdiff_t sums_step) {
  constexpr int n = Bytes / int(sizeof(Word)), all = kSums<N>;
  constexpr int room = (kRegisters == 32 ? 20 : 10) / (V * all), U = room >= 4 && V == 1 ? 4 : room >= 2 && V <= 2 ? 2 : 1;
  using Words = Vec<Word, Bytes>;
  const std::int64_t area = index.bm * index.bn;
  const std::int32_t end = index.crow[row + 1];
  Words sum[U][V][all] = {};
  auto add = [&](std::int32_t k, Words(&to)[V][all]) {
    const std::int8_t* block = values + index.slot[k] * area + std::int64_t(first) * n * kOfWord;
    const Word* source = x + std::int64_t(index.col[k]) * width * n;
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const Words w = load_words<Bytes>(block + v * n * kOfWord);
      const int part = width == 1 ? 0 : (first + v) % width;
#pragma GCC unroll 4
      for (int t = 0; t < N; ++t) to[v][t] = dot<Bytes>(to[v][t], load<Words>(source + t * x_step + part * n), w);
      if constexpr (kOffset != 0) to[v][N] = dot<Bytes>(to[v][N], Words{} + kOffsets, w);
    }
  };
  std::int32_t k = index.crow[row];
  for (; k + U <= end; k += U)
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) add(k + u, sum[u]);
  for (; k < end; ++k) add(k, sum[0]);
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
#pragma GCC unroll 5
    for (int t = 0; t < all; ++t)
#pragma GCC unroll 4
      for (int u = 1; u < U; ++u) sum[0][v][t] += sum[u][v][t];
    if constexpr (N == 0) store(sums + (first + v) * n, sum[0][v][0]);
#pragma GCC unroll 4
    for (int t = 0; t < N; ++t) store(sums + t * sums_step + (first + v) * n, sum[0][v][t] - (kOffset ? sum[0][v][N] : Words{}));
  }
}

// All vectors of a block row; sums[t * sums_step + i] is word i of a block, added up over the row's blocks
template <int N, int Bytes>
void few_int8_row(const PackedIndex& index, std::int64_t row, const Word* x, std::ptrdiff_t x_step, int width,
                  const std::int8_t* values, Word* sums, std::ptrdiff_t sums_step) {
  constexpr int n = Bytes / int(sizeof(Word)), room = (kRegisters == 32 ? 20 : 10) / kSums<N>;
  const int vectors = int(index.bm * index.bn) / (n * kOfWord);
  auto run = [&](auto count, int first) {
    few_int8_vectors<N, Bytes, count>(index, row, first, x, x_step, width, values, sums, sums_step);
    return first + count;
  };
  int first = 0;
  if constexpr (room >= 8)
    while (vectors - first >= 8) first = run(std::integral_constant<int, 8>(), first);
  if constexpr (room >= 4)
    while (vectors - first >= 4) first = run(std::integral_constant<int, 4>(), first);
  while (vectors - first >= 2) first = run(std::integral_constant<int, 2>(), first);
  while (vectors - first >= 1) first = run(std::integral_constant<int, 1>(), first);
}

// The widest vectors, in bytes, that a block's values fill, each with whole rows of the block or a part of one row; 0: none do
inline int few_int8_bytes(std::int64_t bm, std::int64_t bn) {
  if (bn % kOfWord) return 0;
  for (int bytes = kVectorBytes; bytes >= 16; bytes /= 2) {
    const std::int64_t n = bytes / int(sizeof(Word)), words = bn / kOfWord;
    if ((words % n == 0 || n % words == 0) && bm * words % n == 0) return bytes;
  }
  return 0;
}

template <int N>
void few_int8_row(int bytes, const PackedIndex& index, std::int64_t row, const Word* x, std::ptrdiff_t x_step, int width,
                  const std::int8_t* values, Word* sums, std::ptrdiff_t sums_step) {
  if (bytes == 16) return few_int8_row<N, 16>(index, row, x, x_step, width, values, sums, sums_step);
  if constexpr (kVectorBytes >= 32)
    if (bytes == 32) return few_int8_row<N, 32>(index, row, x, x_step, width, values, sums, sums_step);
  if constexpr (kVectorBytes >= 64) return few_int8_row<N, 64>(index, row, x, x_step, width, values, sums, sums_step);
}

// W words of every block, as often as they fit into a vector: 1, 2, 4 or 8
template <int W>
void repeat_words(const Word* from, std::int64_t blocks, int times, Word* to) {
  for (std::int64_t block = 0; block < blocks; ++block, from += W)
    for (int k = 0; k < times; ++k, to += W) std::memcpy(to, from, W * sizeof(Word));
}

inline void repeat_words(int words, const Word* from, std::int64_t blocks, int times, Word* to) {
  switch (words) {
    case 1: return repeat_words<1>(from, blocks, times, to);
    case 2: return repeat_words<2>(from, blocks, times, to);
    case 4: return repeat_words<4>(from, blocks, times, to);
    default: return repeat_words<8>(from, blocks, times, to);
  }
}

// to[a] = the sum of W words from a * W on
template <int W>
void add_words(const Word* from, std::int64_t rows, Word* to) {
  for (std::int64_t a = 0; a < rows; ++a, from += W) {
    Word total = 0;
    for (int q = 0; q < W; ++q) total += from[q];
    to[a] = total;
  }
}

inline void add_words(int words, const Word* from, std::int64_t rows, Word* to) {
  switch (words) {
    case 1: return add_words<1>(from, rows, to);
    case 2: return add_words<2>(from, rows, to);
    case 4: return add_words<4>(from, rows, to);
    case 8: return add_words<8>(from, rows, to);
    case 16: return add_words<16>(from, rows, to);
  }
  for (std::int64_t a = 0; a < rows; ++a, from += words) {
    to[a] = 0;
    for (int q = 0; q < words; ++q) to[a] += from[q];
  }
}

// false: this block size or so many rows want the other way
template <class X>
bool packed_few_int8(const PackedIndex& index, const X* x, std::int64_t count, const std::int8_t* values, const float* scales,
                     const float* bias, X* y, int threads) {
  const int bytes = few_int8_bytes(index.bm, index.bn), bm = int(index.bm);
  if (count < 1 || count > kFewRows || !bytes) return false;
  const int n = bytes / int(sizeof(Word)), words = int(index.bn) / kOfWord;
  const int width = words > n ? words / n : 1, times = words > n ? 1 : n / words;
  static thread_local Scratch own_scratch, repeated_scratch;
  const std::int64_t inputs = index.n1 * index.bn, outputs = index.m1 * bm, x_step = index.n1 * width * n;
  Word* own = own_scratch.take<Word>(std::size_t(index.n1) * words);
  Word* repeated = repeated_scratch.take<Word>(std::size_t(count) * x_step);
  float factors[kFewRows];
  for (std::int64_t t = 0; t < count; ++t) {
    Word* to = repeated + t * x_step;
    factors[t] = quantise(x + t * inputs, inputs, reinterpret_cast<Small*>(times == 1 ? to : own));
    if (times > 1) repeat_words(words, own, index.n1, times, to);
  }
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    static thread_local Scratch sums_scratch, totals_scratch, results_scratch;
    const std::int64_t sums_step = std::int64_t(bm) * words;
    Word* sums = sums_scratch.take<Word>(std::size_t(count) * sums_step);
    Word* totals = totals_scratch.take<Word>(bm);
    float* results = results_scratch.take<float>(bm);
    const Range rows = share_rows(index.crow, index.m1, omp_get_num_threads(), omp_get_thread_num());
    for (std::int64_t row = rows.begin; row < rows.end; ++row) {
      switch (count) {
        case 1: few_int8_row<1>(bytes, index, row, repeated, x_step, width, values, sums, sums_step); break;
        case 2: few_int8_row<2>(bytes, index, row, repeated, x_step, width, values, sums, sums_step); break;
        case 3: few_int8_row<3>(bytes, index, row, repeated, x_step, width, values, sums, sums_step); break;
        default: few_int8_row<4>(bytes, index, row, repeated, x_step, width, values, sums, sums_step);
      }
      for (std::int64_t t = 0; t < count; ++t) {
        add_words(words, sums + t * sums_step, bm, totals);
        const float *own_scales = scales + row * bm, *own_bias = bias ? bias + row * bm : nullptr, factor = factors[t];
        for (int a = 0; a < bm; ++a)
          results[a] = float(std::int32_t(totals[a])) * own_scales[a] * factor + (own_bias ? own_bias[a] : 0.0f);
        convert(results, bm, y + t * outputs + row * bm);
      }
    }
  }
  return true;
}

}  // namespace KRONBLOCKS_ISA
