// y = x W^T for very few rows of x, where reading the weights is all the time there is: vectors run along a block's values.
#pragma once

#include "api.h"
#include "bf16.h"
#include "scratch.h"

namespace KRONBLOCKS_ISA {

constexpr int kFewRows = 4;

template <class T, class X>
inline Vec<T> load_values(const X* from) {
  if constexpr (std::is_same_v<T, float> && std::is_same_v<X, Bf16>)
    return (Vec<T>)(load_halves(from) << 16);
  else
    return load<Vec<T>>(from);
}

// Vectors [first, first + V) of a block row's sums, for N rows of x. A vector holds n / bn rows of a block (bn <= n), for which `x`
// has been repeated, or the sums of one row, whose `parts` vectors are added up. Of pairs, bn is the number.
template <class T, int N, int V, class X>
inline void few_vectors(const PackedIndex& index, std::int64_t area, int parts, std::int64_t row, int first, const T* x,
                        std::int64_t x_step, const X* values, Sum<T>* sums, std::ptrdiff_t sums_step) {
  constexpr int n = kLanes<T>;
  constexpr int per = std::is_same_v<T, X> || !std::is_same_v<T, Word> ? 1 : 2;  // X in a T
  Vec<Sum<T>> sum[V][N] = {};
  for (std::int32_t k = index.crow[row]; k < index.crow[row + 1]; ++k) {
    const X* block = values + index.slot[k] * area + std::int64_t(first) * parts * n * per;
    const T* source = x + std::int64_t(index.col[k]) * parts * n;
    for (int part = 0; part < parts; ++part, block += n * per, source += n) {
      Vec<T> right[N];
#pragma GCC unroll 4
      for (int t = 0; t < N; ++t) right[t] = load<Vec<T>>(source + t * x_step);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) {
        const Vec<T> w = load_values<T>(block + std::ptrdiff_t(v) * parts * n * per);
#pragma GCC unroll 4
        for (int t = 0; t < N; ++t) sum[v][t] = multiply_add<T>(sum[v][t], w, right[t]);
      }
    }
  }
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v)
#pragma GCC unroll 4
    for (int t = 0; t < N; ++t) store(sums + t * sums_step + (first + v) * n, sum[v][t]);
}

template <class T, int N, class X, int V = (kRegisters == 32 ? 16 : 8) / (N == 3 ? 4 : N)>
void few_block_row(const PackedIndex& index, std::int64_t area, int vectors, int parts, std::int64_t row, int first, const T* x,
                   std::int64_t x_step, const X* values, Sum<T>* sums) {
  for (; first + V <= vectors; first += V)
    few_vectors<T, N, V>(index, area, parts, row, first, x, x_step, values, sums, std::ptrdiff_t(vectors) * kLanes<T>);
  if constexpr (V > 1) few_block_row<T, N, X, V / 2>(index, area, vectors, parts, row, first, x, x_step, values, sums);
}

// T: what is multiplied. False: this block size or so many rows want the other way.
template <class T, class X>
bool packed_few_as(const PackedIndex& index, const X* x, std::int64_t count, const X* values, const X* bias, X* y, int threads) {
  constexpr int n = kLanes<T>, per = kNumbers<T>;
  const int bm = int(index.bm), bn = int(index.bn) / per;
  const bool fits = index.bn % per == 0 && (bn % n == 0 || n % bn == 0) && (bm * bn) % n == 0;
  const int most_rows = bm * bn == n ? 2 : kFewRows;  // measured: with one vector a block, the other way is as fast from 3 rows on
  if (count < 1 || count > most_rows || !fits) return false;
  const int lanes = std::min(bn, n), parts = bn / lanes, repeats = n / lanes, vectors = bm * lanes / n;
  static thread_local Scratch inputs_scratch;
  const std::int64_t inputs = index.n1 * index.bn, outputs = index.m1 * bm, x_step = index.n1 * parts * n, area = index.bm * index.bn;
  T* repeated = inputs_scratch.take<T>(std::size_t(count) * x_step);
  for (std::int64_t t = 0; t < count; ++t)
    for (std::int64_t col = 0; col < index.n1; ++col)
      for (int k = 0; k < repeats; ++k) {
        T* to = repeated + t * x_step + col * parts * n + k * bn;
        if constexpr (std::is_same_v<T, Word>)
          std::memcpy(to, x + t * inputs + col * index.bn, bn * sizeof(T));
        else
          convert(x + t * inputs + col * index.bn, bn, to);
      }
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    static thread_local Scratch sums_scratch;
    Sum<T>* sums = sums_scratch.take<Sum<T>>(std::size_t(count) * vectors * n);
    const Range own = share_rows(index.crow, index.m1, omp_get_num_threads(), omp_get_thread_num());
    for (std::int64_t row = own.begin; row < own.end; ++row) {
      auto run = [&](auto rows) {
        few_block_row<T, decltype(rows)::value>(index, area, vectors, parts, row, 0, repeated, x_step, values, sums);
      };
      switch (count) {
        case 1: run(std::integral_constant<int, 1>()); break;
        case 2: run(std::integral_constant<int, 2>()); break;
        case 3: run(std::integral_constant<int, 3>()); break;
        default: run(std::integral_constant<int, 4>());
      }
      for (std::int64_t t = 0; t < count; ++t)
        for (int a = 0; a < bm; ++a) {  // the sums of row a stand together, whatever vectors they are in
          const Sum<T>* own_sums = sums + (t * bm + a) * lanes;
          Sum<T> total(0);
          if (bias) convert(bias + row * bm + a, 1, &total);
          for (int q = 0; q < lanes; ++q) total += own_sums[q];
          convert(&total, 1, y + t * outputs + row * bm + a);
        }
    }
  }
  return true;
}

template <class X>
bool packed_few(const PackedIndex& index, const X* x, std::int64_t count, const X* values, const X* bias, X* y, int threads) {
  if constexpr (std::is_same_v<X, Bf16>)
    if (packed_few_as<Word>(index, x, count, values, bias, y, threads)) return true;
  return packed_few_as<Wide<X>>(index, x, count, values, bias, y, threads);
}

}  // namespace KRONBLOCKS_ISA
