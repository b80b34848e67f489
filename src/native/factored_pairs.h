// coeff_first in bf16 as products of pairs: the four steps of factored.h, tile by tile, on one side only (M: x, N: y). Rank and
// sides of a block must be even.
#pragma once

#include "factored_pair_tile.h"

namespace KRONBLOCKS_ISA {

inline bool pairs_fit(const KronShape& k, bool tile_first) {
  return kPairProducts && !tile_first && k.rank % 2 == 0 && k.bm % 2 == 0 && k.bn % 2 == 0;
}

template <class Call>
void with_pair_pieces(std::int64_t numbers, Call call) {
  if (kMixVectors >= 4 && numbers > 2 * kLanes<float>) return call(std::integral_constant<int, kMixVectors >= 4 ? 4 : 2>());
  call(std::integral_constant<int, 2>());
}

// X: Bf16. These are templates so that builds without products of pairs do not compile them.
template <class X>
void pairs_linear(const KronShape& k, const X* x, std::int64_t count, const X* coeff, const X* tiles,
                  const std::uint8_t* live, const X* bias, X* y, int threads) {
  const PairProblem f(k, coeff, tiles, live);
  const MixLists<Word> mixes = mix_pairs(f, group_size(int(k.rank), live ? 0.4 : 1.0));
  with_pair_pieces((count + threads - 1) / threads * k.bn, [&](auto v) {
    using Own = PairTile<decltype(v)::value>;
    const std::size_t per_row = sizeof(X) * std::size_t(k.n1 * k.bn + mixes.width * k.bn);
    const int rows = tile_rows(count, per_row, threads, int(k.bn), Own::size);
    const std::int64_t all = (count + rows - 1) / rows;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      Own tile = make_pair_tile<decltype(v)::value>(f, rows, mixes.per_group, false, false);
      const Range own = share(all, omp_get_num_threads(), omp_get_thread_num());
      for (std::int64_t number = own.begin; number < own.end; ++number) {
        const std::int64_t first = number * rows;
        tile.rows = int(std::min<std::int64_t>(rows, count - first));
        tile.pack(x + first * k.n1 * k.bn, false);
        for (std::int64_t group = 0; group < mixes.groups(); ++group) {
          tile.mix_rows(mixes, group);
          for (int j = 0; j < mixes.per_group && group * mixes.per_group + j < k.m1; ++j)
            tile.apply(group * mixes.per_group + j, j, bias, y + first * k.m1 * k.bm);
        }
      }
    }
  });
}

// dcoeff (m1, n1, rank) and dbanks (g, bm, r * bn) are float sums, added to; dx may be null. Each thread sums for itself; the sums
// are added in the order of the threads.
template <class X>
void pairs_backward(const KronShape& k, const X* dy, const X* x, std::int64_t count, const X* coeff, const X* tiles,
                    const std::uint8_t* live, X* dx, float* dcoeff, float* dbanks, int threads) {
  const PairProblem f(k, coeff, tiles, live);
  const Sides<float> plain_sides = sides<float>(k, false, 0, nullptr, live, nullptr);
  const double density = plain_sides.density();
  const MixLists<float> singles = mix_lists(plain_sides, false, density);
  const MixLists<Word> mixes = mix_pairs(f, singles.per_group);
  const MixLists<Word> collects = dx ? collect_pairs(f, group_size(1, density)) : MixLists<Word>();
  const std::size_t coefs = singles.coefs.size(), bank_sizes = std::size_t(k.groups * k.bm * f.width());
  std::vector<float> own_coefs(coefs * threads), own_banks(bank_sizes * threads);
  with_pair_pieces((count + threads - 1) / threads * k.bn, [&](auto v) {
    using Own = PairTile<decltype(v)::value>;
    const std::size_t per_row = sizeof(X) * std::size_t(2 * k.n1 * k.bn + (dx ? k.m1 : 1) * k.rank * k.bn);
    const int rows = tile_rows(count, per_row, threads, int(k.bn), Own::size, kPairTileBytes);
    const std::int64_t all = (count + rows - 1) / rows;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      const int team = omp_get_num_threads(), self = omp_get_thread_num();
      Own tile = make_pair_tile<decltype(v)::value>(f, rows, mixes.per_group, true, dx != nullptr);
      const Range own = share(all, team, self);
      for (std::int64_t number = own.begin; number < own.end; ++number) {
        const std::int64_t first = number * rows;
        const X* dy_rows = dy + first * k.m1 * k.bm;
        tile.rows = int(std::min<std::int64_t>(rows, count - first));
        tile.pack(x + first * k.n1 * k.bn, true);
        for (std::int64_t group = 0; group < mixes.groups(); ++group) {
          tile.mix_row_pairs(mixes, group);
          for (int j = 0; j < mixes.per_group && group * mixes.per_group + j < k.m1; ++j) {
            tile.tile_gradients(group * mixes.per_group + j, j, dy_rows, own_banks.data() + self * bank_sizes);
            tile.spread(group * mixes.per_group + j, j, dy_rows, dx != nullptr);
          }
          // the last group may want more rows than there are; what it reads of others or of old ones is never used
          tile.coefficient_gradients(singles, group, own_coefs.data() + self * coefs);
        }
        if (dx) tile.collect(collects, dx + first * k.n1 * k.bn);
      }
#pragma omp barrier
      auto add_up = [&](float* sums, std::size_t size) {
        const Range part = share(std::int64_t(size), team, self);
        for (int other = 1; other < team; ++other)
          for (std::int64_t i = part.begin; i < part.end; ++i) sums[i] += sums[other * size + i];
      };
      add_up(own_coefs.data(), coefs);
      add_up(own_banks.data(), bank_sizes);
    }
  });
  for (std::size_t i = 0; i < bank_sizes; ++i) dbanks[i] += own_banks[i];
  scatter_coefficients(plain_sides, singles, own_coefs.data(), dcoeff);
}

}  // namespace KRONBLOCKS_ISA
