// The live blocks of W = sum_i A_i kron B_i, one after another as the packed index lists them, and the way back.
#pragma once

#include <vector>

#include "factored_sides.h"
#include "small_gemm.h"

namespace KRONBLOCKS_ISA {

constexpr int kBlocksAtOnce = 32;  // of bf16: what is wider than the operands stays in cache

// (entries of a block row, rank): its live coefficients, one after another
template <class X>
void gather_coefficients(const PackedIndex& index, std::int64_t row, std::int64_t rank, const X* coeff, Wide<X>* to) {
  for (std::int32_t e = index.crow[row]; e < index.crow[row + 1]; ++e, to += rank)
    convert(coeff + (row * index.n1 + index.col[e]) * rank, rank, to);
}

// some entries of one block row: call(first, number of them)
template <class X, class Call>
void for_entries(const PackedIndex& index, std::int64_t row, Call call) {
  const int all = index.crow[row + 1] - index.crow[row], most = std::is_same_v<X, Wide<X>> ? std::max(all, 1) : kBlocksAtOnce;
  for (int first = 0; first < all; first += most) call(first, std::min(most, all - first));
}

template <class X>
void live_blocks(const PackedIndex& index, const KronShape& k, const X* coeff, const X* own_tiles, X* values, std::int64_t capacity,
                 int threads) {
  using T = Wide<X>;
  static thread_local Scratch tiles_scratch;
  const int area = int(k.bm * k.bn), rank = int(k.rank);
  const std::int64_t live = index.crow[k.m1], per_bank = k.m1 / k.groups;
  const T* tiles = wide_copy(own_tiles, k.groups * rank * area, tiles_scratch);
  std::fill(values + live * area, values + capacity * area, X{});
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<T> own(std::size_t(k.n1) * rank), blocks(std::is_same_v<X, T> ? 0 : kBlocksAtOnce * area);
    const Range rows = share_rows(index.crow, k.m1, omp_get_num_threads(), omp_get_thread_num());
    for (std::int64_t row = rows.begin; row < rows.end; ++row) {
      gather_coefficients(index, row, k.rank, coeff, own.data());
      for_entries<X>(index, row, [&](int first, int count) {
        X* to = values + std::int64_t(index.crow[row] + first) * area;
        auto build = [&](T* out) {
          small_gemm<T>(count, area, rank, {own.data() + first * rank, rank, 1}, tiles + row / per_bank * rank * area, area, out, area,
                        false);
        };
        if constexpr (std::is_same_v<X, T>) {
          build(to);
        } else {
          build(blocks.data());
          convert(blocks.data(), std::int64_t(count) * area, to);
        }
      });
    }
  }
}

// dcoeff is 0 for dead blocks. Each thread sums dtiles for itself; the sums are added in the order of the threads.
template <class X>
void live_blocks_backward(const PackedIndex& index, const KronShape& k, const X* dvalues, const X* coeff, const X* tiles, X* dcoeff,
                          X* dtiles, int threads) {
  using T = Wide<X>;
  const int area = int(k.bm * k.bn), rank = int(k.rank);
  const std::int64_t per_bank = k.m1 / k.groups, size = k.groups * rank * area;
  std::vector<T> transposed(size), sums(size * threads);
  for (std::int64_t g = 0; g < k.groups; ++g)
    for (int i = 0; i < rank; ++i)
      for (int p = 0; p < area; ++p)
        convert(&tiles[(g * rank + i) * area + p], 1, &transposed[g * rank * area + p * rank + i]);
  std::fill_n(dcoeff, k.m1 * k.n1 * rank, X{});
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int team = omp_get_num_threads(), self = omp_get_thread_num();
    std::vector<T> own(std::size_t(k.n1) * rank), down(std::size_t(k.n1) * rank);
    std::vector<T> wide(std::is_same_v<X, T> ? 0 : kBlocksAtOnce * area);
    const Range rows = share_rows(index.crow, k.m1, team, self);
    for (std::int64_t row = rows.begin; row < rows.end; ++row) {
      const std::int64_t bank = row / per_bank * rank * area;
      gather_coefficients(index, row, k.rank, coeff, own.data());
      for_entries<X>(index, row, [&](int first, int count) {
        const X* from = dvalues + std::int64_t(index.crow[row] + first) * area;
        const T* blocks = wide.data();
        if constexpr (std::is_same_v<X, T>)
          blocks = from;
        else
          convert(from, std::int64_t(count) * area, wide.data());
        small_gemm<T>(rank, area, count, {own.data() + first * rank, 1, rank}, blocks, area, sums.data() + self * size + bank, area,
                      true);
        small_gemm<T>(count, rank, area, {blocks, area, 1}, transposed.data() + bank, rank, down.data(), rank, false);
        for (int e = 0; e < count; ++e)
          convert(down.data() + e * rank, rank, dcoeff + (row * k.n1 + index.col[index.crow[row] + first + e]) * rank);
      });
    }
#pragma omp barrier
    const Range part = share(size, team, self);
    for (std::int64_t i = part.begin; i < part.end; ++i) {
      T total = sums[i];
      for (int other = 1; other < team; ++other) total += sums[other * size + i];
      convert(&total, 1, dtiles + i);
    }
  }
}

}  // namespace KRONBLOCKS_ISA
