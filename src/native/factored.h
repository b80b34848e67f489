// y = x W^T with W = sum_i A_i kron B_i, and its gradients, without W and with the intermediate in cache only.
//
// Both orders are one scheme, seen from two sides. The coefficients *mix* blocks of one side (M: x in coeff_first, y in
// tile_first), and the tiles act between these mixtures and the blocks of the other side (N). For block o of N:
//   Q_o = sum_s C[o,s] M_s   (mix)         E_o = N_o B   (spread)
//   N_o = Q_o B^T            (apply)       M_s = sum_o C[o,s] E_o   (collect)
// coeff_first is mix + apply forward and spread + collect for dx; tile_first is the other way round. In both, the gradients are
//   dC[o,s] = <E_o, M_s>   and   dB = sum_o N_o^T Q_o.
#pragma once

#include <algorithm>
#include <vector>

#include "factored_pairs.h"

namespace KRONBLOCKS_ISA {

template <class T, int V, class X>
void kron_forward_group(const Sides<T>& f, const MixLists<T>& lists, bool tile_first, const X* x, std::int64_t count, const T* tiles_t,
                        const T* bias, X* y, std::int64_t inputs, std::int64_t outputs, std::int64_t y_first, int threads) {
  const std::size_t per_row = sizeof(T) * std::size_t(tile_first ? f.outer * f.spread() : f.sources * f.m_width + lists.width * f.m_width);
  const int rows = tile_rows(count, per_row, threads, f.m_width, Tile<T, V>::size);
  const std::int64_t tiles = (count + rows - 1) / rows;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Tile<T, V> tile = make_tile<T, V>(f, rows, tile_first ? 1 : lists.per_group, tile_first);
    const Range own = share(tiles, omp_get_num_threads(), omp_get_thread_num());
    for (std::int64_t number = own.begin; number < own.end; ++number) {
      const std::int64_t first = number * rows;
      tile.rows = int(std::min<std::int64_t>(rows, count - first));
      const X* from = x + first * inputs;
      X* to = y + first * outputs + y_first;
      if (tile_first) {
        for (std::int64_t o = 0; o < f.outer; ++o) {
          if constexpr (std::is_same_v<T, X>) {
            tile.spread(o, from + o * f.n_width, inputs, o * f.rank, f.spread_rows());
          } else {
            copy_rows(tile.rows, f.n_width, from + o * f.n_width, inputs, tile.block, f.n_width);
            tile.spread(o, tile.block, f.n_width, o * f.rank, f.spread_rows());
          }
        }
        tile.collect(lists, bias, to, outputs);
        continue;
      }
      pack_pieces(tile.pieces, tile.rows, f.sources, f.panel_rows(), from, inputs, tile.panel);
      for (std::int64_t group = 0; group < lists.groups(); ++group) {
        tile.mix(lists, group);
        for (int k = 0; k < lists.per_group && group * lists.per_group + k < f.outer; ++k) {
          tile.apply(group * lists.per_group + k, tile.mixture(k), tiles_t, bias, to, outputs, false);
        }
      }
    }
  }
}

template <class X>
void kron_linear(const KronShape& k, bool tile_first, const X* x, std::int64_t count, const X* own_coeff, const X* tiles,
                 const std::uint8_t* live, const X* own_bias, X* y, int threads) {
  using T = Wide<X>;
  if (count == 0) return;
  if constexpr (std::is_same_v<X, Bf16> && kPairProducts)
    if (pairs_fit(k, tile_first)) return pairs_linear(k, x, count, own_coeff, tiles, live, own_bias, y, threads);
  static thread_local Scratch coeff_scratch, bias_scratch;
  const T* coeff = wide_copy(own_coeff, k.m1 * k.n1 * k.rank, coeff_scratch);
  const T* bias = wide_copy(own_bias, k.m1 * k.bm, bias_scratch);
  const std::vector<T> arranged = arranged_tiles(k, tiles, tile_first, false);
  const std::vector<T> arranged_t = tile_first ? std::vector<T>() : arranged_tiles(k, tiles, tile_first, true);
  for (std::int64_t group = 0; group < (tile_first ? k.groups : 1); ++group) {
    const Sides<T> f = sides(k, tile_first, group, coeff, live, arranged.data());
    const MixLists<T> lists = mix_lists(f, tile_first, f.density());
    const std::int64_t y_first = f.first_source * k.bm;
    with_pieces<T>(widest_piece<T>((count + threads - 1) / threads, f.m_width), [&](auto v) {
      kron_forward_group<T, decltype(v)::value>(f, lists, tile_first, x, count, arranged_t.data(), bias ? bias + y_first : nullptr, y,
                                                k.n1 * k.bn, k.m1 * k.bm, y_first, threads);
    });
  }
}

// One bank's gradients (tile_first) or all (coeff_first); dtiles is arranged as f.tiles is; it and dcoeff are added to. Each thread sums for itself; the sums
// are added in the order of the threads, so that results are the same from run to run.
template <class T, int V, class X, class DX>
void kron_backward_group(const KronShape& k, const Sides<T>& f, bool tile_first, std::int64_t group, const X* dy, const X* x,
                         std::int64_t count, const T* tiles_t, DX* dx, T* dcoeff, T* dtiles, int threads) {
  const double density = f.density();
  const MixLists<T> mixes = mix_lists(f, false, density);
  const MixLists<T> collects = !tile_first && dx ? mix_lists(f, true, density) : MixLists<T>();
  const bool collecting = !tile_first && dx;
  const std::int64_t inputs = k.n1 * k.bn, outputs = k.m1 * k.bm, banks = (f.outer + f.outer_per_bank - 1) / f.outer_per_bank;
  const std::size_t bank_size = std::size_t(f.n_width) * f.spread(), tiles_size = bank_size * banks;
  const std::size_t per_row =
      sizeof(T) * std::size_t(f.sources * f.m_width + (collecting ? f.outer * f.spread() : mixes.width * f.m_width));
  const int rows = tile_rows(count, per_row, threads, f.m_width, Tile<T, V>::size);
  const std::int64_t tiles = (count + rows - 1) / rows;
  std::vector<T> dcoefs(mixes.coefs.size() * threads), dbanks(tiles_size * threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int team = omp_get_num_threads(), self = omp_get_thread_num();
    Tile<T, V> tile = make_tile<T, V>(f, rows, mixes.per_group, collecting);
    T *own_dcoefs = dcoefs.data() + self * mixes.coefs.size(), *own_banks = dbanks.data() + self * tiles_size;
    const Range own = share(tiles, team, self);
    for (std::int64_t number = own.begin; number < own.end; ++number) {
      const std::int64_t first = number * rows;
      tile.rows = int(std::min<std::int64_t>(rows, count - first));
      const X* x_rows = x + first * inputs;
      const X* dy_rows = dy + first * outputs;
      const X* m_rows = tile_first ? dy_rows + f.first_source * k.bm : x_rows;
      const X* n_rows = tile_first ? x_rows : dy_rows;
      const std::int64_t m_step = tile_first ? outputs : inputs, n_step = tile_first ? inputs : outputs;
      pack_pieces(tile.pieces, tile.rows, f.sources, f.panel_rows(), m_rows, m_step, tile.panel);
      for (std::int64_t g = 0; g < mixes.groups(); ++g) {
        const int here = int(std::min<std::int64_t>(mixes.per_group, f.outer - g * mixes.per_group));
        const std::int64_t place = collecting ? g * mixes.per_group * f.rank : 0;
        const std::int64_t stride = collecting ? f.spread_rows() : std::int64_t(mixes.width);
        tile.mix(mixes, g);
        for (int j = 0; j < here; ++j) {
          const std::int64_t o = g * mixes.per_group + j;
          copy_rows(tile.rows, f.n_width, n_rows + o * f.n_width, n_step, tile.block, f.n_width);
          const T* mixture = tile.mixture(j);
          small_gemm<T>(f.n_width, f.spread(), tile.rows, {tile.block, 1, f.n_width}, mixture, f.spread(),
                        own_banks + f.bank_number(o) * bank_size, f.spread(), true);
          if (tile_first && dx) tile.apply(o, mixture, tiles_t, nullptr, dx + first * inputs, inputs, group > 0);
          tile.spread(o, tile.block, f.n_width, place + j * f.rank, stride);
        }
        // the last group may want more rows than there are; what it reads of others or of old ones is never used
        tile.coefficient_gradients(mixes, g, place, stride, own_dcoefs);
      }
      if (collecting) tile.collect(collects, nullptr, dx + first * inputs, inputs);
    }
#pragma omp barrier
    auto add_up = [&](T* sums, std::size_t size) {
      const Range part = share(std::int64_t(size), team, self);
      for (int other = 1; other < team; ++other)
        for (std::int64_t i = part.begin; i < part.end; ++i) sums[i] += sums[other * size + i];
    };
    add_up(dcoefs.data(), mixes.coefs.size());
    add_up(dbanks.data(), tiles_size);
  }
  for (std::size_t i = 0; i < tiles_size; ++i) dtiles[i] += dbanks[i];
  scatter_coefficients(f, mixes, dcoefs.data(), dcoeff);
}

// All gradients of some rows, added to dcoeff and to the arranged dtiles; dx is written.
template <class T, class X, class DX>
void kron_backward_rows(const KronShape& k, bool tile_first, const X* dy, const X* x, std::int64_t count, const T* coeff,
                        const std::vector<T>& tiles, const std::vector<T>& tiles_t, const std::uint8_t* live, DX* dx, T* dcoeff,
                        T* dtiles, int threads) {
  for (std::int64_t group = 0; group < (tile_first ? k.groups : 1); ++group) {
    const Sides<T> f = sides(k, tile_first, group, coeff, live, tiles.data());
    const std::int64_t bank = group * k.rank * k.bm * k.bn;
    with_pieces<T>(widest_piece<T>((count + threads - 1) / threads, f.m_width), [&](auto v) {
      kron_backward_group<T, decltype(v)::value>(k, f, tile_first, group, dy, x, count, tiles_t.data() + (tile_first ? bank : 0), dx,
                                                 dcoeff, dtiles + bank, threads);
    });
  }
}

template <class X>
void kron_backward(const KronShape& k, bool tile_first, const X* dy, const X* x, std::int64_t count, const X* own_coeff,
                   const X* tiles, const std::uint8_t* live, X* dx, X* own_dcoeff, X* dtiles, int threads) {
  using T = Wide<X>;
  constexpr bool same = std::is_same_v<T, X>;
  static thread_local Scratch coeff_scratch, dcoeff_scratch, dx_scratch;
  const std::int64_t coeffs = k.m1 * k.n1 * k.rank, inputs = k.n1 * k.bn, outputs = k.m1 * k.bm;
  T* dcoeff;
  if constexpr (same)
    dcoeff = own_dcoeff;
  else
    dcoeff = dcoeff_scratch.take<T>(coeffs);
  std::fill_n(dcoeff, coeffs, T(0));
  std::vector<T> darranged(std::size_t(k.groups * k.rank * k.bm * k.bn));
  const bool pairs = !same && pairs_fit(k, tile_first);
  const T* coeff = pairs ? nullptr : wide_copy(own_coeff, coeffs, coeff_scratch);
  const std::vector<T> arranged = pairs ? std::vector<T>() : arranged_tiles(k, tiles, tile_first, false);
  const std::vector<T> arranged_t = tile_first ? arranged_tiles(k, tiles, tile_first, true) : std::vector<T>();
  if (pairs) {
    if constexpr (!same && kPairProducts)
      if (count > 0) pairs_backward(k, dy, x, count, own_coeff, tiles, live, dx, dcoeff, darranged.data(), threads);
  } else if (!same && tile_first && dx && k.groups > 1) {  // every bank adds to dx: some rows at a time wait for all of them
    const std::int64_t most = std::min<std::int64_t>(count, std::int64_t(threads) * 128);
    T* sums = dx_scratch.take<T>(most * inputs);
    for (std::int64_t first = 0; first < count; first += most) {
      const std::int64_t here = std::min(most, count - first);
      kron_backward_rows(k, tile_first, dy + first * outputs, x + first * inputs, here, coeff, arranged, arranged_t, live, sums, dcoeff,
                         darranged.data(), threads);
      convert(sums, here * inputs, dx + first * inputs);
    }
  } else if (count > 0) {
    kron_backward_rows(k, tile_first, dy, x, count, coeff, arranged, arranged_t, live, dx, dcoeff, darranged.data(), threads);
  }
  if constexpr (!same) convert(dcoeff, coeffs, own_dcoeff);
  const std::int64_t n_width = tile_first ? k.bn : k.bm, m_width = tile_first ? k.bm : k.bn;
  for (std::int64_t g = 0; g < k.groups; ++g)
    for (std::int64_t n = 0; n < n_width; ++n)
      for (std::int64_t i = 0; i < k.rank; ++i)
        for (std::int64_t m = 0; m < m_width; ++m) {
          const std::int64_t a = tile_first ? m : n, q = tile_first ? n : m, base = g * k.rank * k.bm * k.bn;
          convert(&darranged[base + n * k.rank * m_width + i * m_width + m], 1, &dtiles[base + (i * k.bm + a) * k.bn + q]);
        }
}

}  // namespace KRONBLOCKS_ISA
