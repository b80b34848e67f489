// y = x W^T for very few rows of x, where reading the weights is all the time there is: vectors run along a block's values.
#pragma once

#include "api.h"
#include "bf16.h"
#include "scratch.h"

namespace KRONBLOCKS_ISA {

constexpr int kFewRows = 4;

// One block row for N rows of x. A vector of a block's values holds n / bn rows of it (bn < n) or a part of one row; `x` has
// been repeated accordingly. Vectors v of a block belong to rows v * n / bn and behind. Of pairs, bn is the number.
template <class T, int N>
void few_block_row(const PackedIndex& index, int bn, std::int64_t row, const T* x, std::int64_t x_step, const T* values,
                   Sum<T>* sums) {
  constexpr int n = kLanes<T>, most = kRegisters == 32 ? 16 / N : 8 / N;
  const int area = int(index.bm) * bn;
  const int width = bn > n ? bn / n : 1;  // vectors of x per block, each repeated down the block's rows
  const std::int32_t begin = index.crow[row], end = index.crow[row + 1];
  const int vectors = area / n;
  for (int first = 0; first < vectors; first += most) {
    const int here = std::min(most, vectors - first);
    Vec<Sum<T>> sum[most][N] = {};
    auto run = [&](auto count) {
      for (std::int32_t k = begin; k < end; ++k) {
        const T* block = values + std::int64_t(index.slot[k]) * area + first * n;
        const T* source = x + std::int64_t(index.col[k]) * width * n;
        for (int v = 0; v < count; ++v) {
          const Vec<T> w = load<Vec<T>>(block + v * n);
          const int part = width == 1 ? 0 : (first + v) % width;
#pragma GCC unroll 4
          for (int t = 0; t < N; ++t) sum[v][t] = multiply_add<T>(sum[v][t], w, load<Vec<T>>(source + t * x_step + part * n));
        }
      }
    };
    if (here == most)
      run(std::integral_constant<int, most>());
    else
      run(here);
    for (int v = 0; v < here; ++v)
      for (int t = 0; t < N; ++t) store(sums + (t * vectors + first + v) * n, sum[v][t]);
  }
}

// false: this block size or so many rows want the other way
template <class X>
bool packed_few(const PackedIndex& index, const X* x, std::int64_t count, const X* own_values, const X* bias, X* y, int threads) {
  using T = std::conditional_t<std::is_same_v<X, Bf16>, Word, X>;
  constexpr int n = kLanes<T>;
  const int bm = int(index.bm), bn = int(index.bn) / kNumbers<T>;
  const bool fits = index.bn % kNumbers<T> == 0 && (bn % n == 0 || n % bn == 0) && (bm * bn) % n == 0;
  if (count < 1 || count > kFewRows || !fits) return false;
  const int width = bn > n ? bn : n, repeats = bn > n ? 1 : n / bn, vectors = bm * bn / n;
  static thread_local Scratch inputs_scratch;
  const std::int64_t inputs = index.n1 * index.bn, outputs = index.m1 * bm, x_step = index.n1 * width;
  const T* values = reinterpret_cast<const T*>(own_values);
  T* repeated = inputs_scratch.take<T>(std::size_t(count) * x_step);
  for (std::int64_t t = 0; t < count; ++t)
    for (std::int64_t col = 0; col < index.n1; ++col)
      for (int k = 0; k < repeats; ++k)
        std::memcpy(repeated + t * x_step + col * width + k * bn, x + t * inputs + col * index.bn, bn * sizeof(T));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    static thread_local Scratch sums_scratch;
    Sum<T>* sums = sums_scratch.take<Sum<T>>(std::size_t(count) * vectors * n);
    const Range own = share_rows(index.crow, index.m1, omp_get_num_threads(), omp_get_thread_num());
    for (std::int64_t row = own.begin; row < own.end; ++row) {
      switch (count) {
        case 1: few_block_row<T, 1>(index, bn, row, repeated, x_step, values, sums); break;
        case 2: few_block_row<T, 2>(index, bn, row, repeated, x_step, values, sums); break;
        case 3: few_block_row<T, 3>(index, bn, row, repeated, x_step, values, sums); break;
        default: few_block_row<T, 4>(index, bn, row, repeated, x_step, values, sums);
      }
      for (std::int64_t t = 0; t < count; ++t)
        for (int a = 0; a < bm; ++a) {  // the values of row a stand together, whatever vectors they are in
          const Sum<T>* own_sums = sums + t * vectors * n + a * bn;
          Sum<T> total(0);
          if (bias) convert(bias + row * bm + a, 1, &total);
          for (int q = 0; q < bn; ++q) total += own_sums[q];
          convert(&total, 1, y + t * outputs + row * bm + a);
        }
    }
  }
  return true;
}

}  // namespace KRONBLOCKS_ISA
