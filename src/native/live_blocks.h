// The live blocks of W = sum_i A_i kron B_i, one after another as the packed index lists them, and the way back.
#pragma once

#include <vector>

#include "api.h"
#include "scratch.h"
#include "small_gemm.h"

namespace KRONBLOCKS_ISA {

// (entries of a block row, rank): its live coefficients, one after another
template <class T>
void gather_coefficients(const PackedIndex& index, std::int64_t row, std::int64_t rank, const T* coeff, T* to) {
  for (std::int32_t e = index.crow[row]; e < index.crow[row + 1]; ++e, to += rank)
    std::copy_n(coeff + (row * index.n1 + index.col[e]) * rank, rank, to);
}

template <class T>
void live_blocks(const PackedIndex& index, const KronShape& k, const T* coeff, const T* tiles, T* values, std::int64_t capacity,
                 int threads) {
  const int area = int(k.bm * k.bn), rank = int(k.rank);
  const std::int64_t live = index.crow[k.m1], per_bank = k.m1 / k.groups;
  std::fill(values + live * area, values + capacity * area, T(0));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<T> own(std::size_t(k.n1) * rank);
    const Range rows = share_rows(index.crow, k.m1, omp_get_num_threads(), omp_get_thread_num());
    for (std::int64_t row = rows.begin; row < rows.end; ++row) {
      gather_coefficients(index, row, k.rank, coeff, own.data());
      small_gemm<T>(index.crow[row + 1] - index.crow[row], area, rank, {own.data(), rank, 1}, tiles + row / per_bank * rank * area,
                    area, values + std::int64_t(index.crow[row]) * area, area, false);
    }
  }
}

// dcoeff is 0 for dead blocks. Each thread sums dtiles for itself; the sums are added in the order of the threads.
template <class T>
void live_blocks_backward(const PackedIndex& index, const KronShape& k, const T* dvalues, const T* coeff, const T* tiles, T* dcoeff,
                          T* dtiles, int threads) {
  const int area = int(k.bm * k.bn), rank = int(k.rank);
  const std::int64_t per_bank = k.m1 / k.groups, size = k.groups * rank * area;
  std::vector<T> transposed(size), sums(size * threads);
  for (std::int64_t g = 0; g < k.groups; ++g)
    for (int i = 0; i < rank; ++i)
      for (int p = 0; p < area; ++p) transposed[g * rank * area + p * rank + i] = tiles[(g * rank + i) * area + p];
  std::fill_n(dcoeff, k.m1 * k.n1 * rank, T(0));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int team = omp_get_num_threads(), self = omp_get_thread_num();
    std::vector<T> own(std::size_t(k.n1) * rank), down(std::size_t(k.n1) * rank);
    const Range rows = share_rows(index.crow, k.m1, team, self);
    for (std::int64_t row = rows.begin; row < rows.end; ++row) {
      const int entries = index.crow[row + 1] - index.crow[row];
      const std::int64_t bank = row / per_bank * rank * area;
      const T* blocks = dvalues + std::int64_t(index.crow[row]) * area;
      gather_coefficients(index, row, k.rank, coeff, own.data());
      small_gemm<T>(rank, area, entries, {own.data(), 1, rank}, blocks, area, sums.data() + self * size + bank, area, true);
      small_gemm<T>(entries, rank, area, {blocks, area, 1}, transposed.data() + bank, rank, down.data(), rank, false);
      for (int e = 0; e < entries; ++e)
        std::copy_n(down.data() + e * rank, rank, dcoeff + (row * k.n1 + index.col[index.crow[row] + e]) * rank);
    }
#pragma omp barrier
    const Range part = share(size, team, self);
    for (std::int64_t i = part.begin; i < part.end; ++i) {
      T total = sums[i];
      for (int other = 1; other < team; ++other) total += sums[other * size + i];
      dtiles[i] = total;
    }
  }
}

}  // namespace KRONBLOCKS_ISA
