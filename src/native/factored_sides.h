// The factored problem seen from one side (factored.h says which), and which blocks are mixed with which coefficients.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "api.h"
#include "bf16.h"
#include "scratch.h"

namespace KRONBLOCKS_ISA {

constexpr int kMixRows = kRegisters == 32 ? 4 : 6;  // sums of mixtures in registers at once, each of kMixVectors
constexpr int kMixVectors = kRegisters == 32 ? 4 : 2;

// Which blocks a group of outputs is made of, and with which coefficients: `width` numbers per entry.
template <class T>
struct MixLists {
  int per_group, width, part;  // part: of the width, in registers at once
  std::vector<std::int32_t> starts, source;
  std::vector<T> coefs;

  std::int64_t groups() const { return std::int64_t(starts.size()) - 1; }
  const T* coef(std::int64_t entry) const { return coefs.data() + entry * width; }
};

// The problem from one side. Block o of N and block s of M meet in coefficient (o, s).
template <class T>
struct Sides {
  std::int64_t outer, sources;  // blocks of N and of M
  std::int64_t first_source;    // of this bank of tiles (tile_first); 0 otherwise
  int n_width, m_width, rank;
  const T* coeff;
  const std::uint8_t* live;               // one per coefficient vector, or null: all
  std::int64_t outer_step, source_step;   // of coefficient vectors
  const T* tiles;                         // banks of (n_width, rank * m_width)
  std::int64_t outer_per_bank;            // o / outer_per_bank is the bank

  std::int64_t at(std::int64_t o, std::int64_t s) const { return o * outer_step + (first_source + s) * source_step; }
  bool alive(std::int64_t o, std::int64_t s) const { return !live || live[at(o, s)]; }
  int spread() const { return rank * m_width; }
  // rows of a piece of a panel and of all spreads: odd, since pieces a power of two apart share few sets of the cache
  std::int64_t panel_rows() const { return sources | 1; }
  std::int64_t spread_rows() const { return (outer * rank) | 1; }
  const T* bank(std::int64_t o) const { return tiles + bank_number(o) * n_width * spread(); }
  std::int64_t bank_number(std::int64_t o) const { return o / outer_per_bank; }
  double density() const {
    if (!live) return 1;
    std::int64_t count = 0;
    for (std::int64_t o = 0; o < outer; ++o)
      for (std::int64_t s = 0; s < sources; ++s) count += alive(o, s);
    return double(count) / double(std::max<std::int64_t>(1, outer * sources));
  }
};

// How many outputs of so many rows each go together. Groups fill the registers and share loads of a source, at the price of
// multiplying by the zeros of those that do not want it.
inline int group_size(int rows_each, double density) {
  const int most = kMixRows / std::gcd(rows_each, kMixRows);
  if (2 * rows_each > kMixRows) return density > 0.8 ? most : 1;
  return density >= 0.5 ? most : density >= 0.3 ? std::min(most, 2) : 1;
}

// For mix: groups of o, entries s, coefficients (o in group, i). With an empty list where `transposed`: groups of s, entries o,
// coefficients (i, s in group), for collect. Without coefficients they are 0.
template <class T>
MixLists<T> mix_lists(const Sides<T>& f, bool transposed, double density) {
  MixLists<T> lists;
  lists.per_group = group_size(transposed ? 1 : f.rank, density);
  lists.width = lists.per_group * f.rank;
  const int parts = (lists.width + kMixRows - 1) / kMixRows;
  lists.part = (lists.width + parts - 1) / parts;
  const std::int64_t outputs = transposed ? f.sources : f.outer, inputs = transposed ? f.outer : f.sources;
  const std::size_t expected = std::size_t(double(outputs * inputs) / lists.per_group * std::min(1.0, density * lists.per_group)) + 64;
  lists.source.reserve(expected);
  lists.coefs.reserve(expected * lists.width);
  lists.starts.push_back(0);
  const std::int64_t out_step = (transposed ? f.source_step : f.outer_step), in_step = (transposed ? f.outer_step : f.source_step);
  const int spread_k = transposed ? 1 : f.rank, spread_i = transposed ? lists.per_group : 1;
  for (std::int64_t first = 0; first < outputs; first += lists.per_group) {
    const int here = int(std::min<std::int64_t>(lists.per_group, outputs - first));
    const std::int64_t base = f.first_source * f.source_step + first * out_step;
    for (std::int64_t in = 0; in < inputs; ++in) {
      const std::int64_t at = base + in * in_step;
      bool any = !f.live;
      for (int k = 0; k < here && !any; ++k) any = f.live[at + k * out_step];
      if (!any) continue;
      lists.source.push_back(std::int32_t(in));
      lists.coefs.resize(lists.coefs.size() + lists.width);
      T* to = lists.coefs.data() + lists.coefs.size() - lists.width;
      for (int k = 0; k < here; ++k) {
        if (!f.coeff || (f.live && !f.live[at + k * out_step])) continue;
        const T* from = f.coeff + (at + k * out_step) * f.rank;
        for (int i = 0; i < f.rank; ++i) to[i * spread_i + k * spread_k] = from[i];
      }
    }
    lists.starts.push_back(std::int32_t(lists.source.size()));
  }
  return lists;
}

// Sums in the order of lists for mix, added to the coefficients that are alive
template <class T>
void scatter_coefficients(const Sides<T>& f, const MixLists<T>& lists, const T* sums, T* dcoeff) {
  for (std::int64_t g = 0; g < lists.groups(); ++g)
    for (std::int32_t e = lists.starts[g]; e < lists.starts[g + 1]; ++e)
      for (int j = 0; j < lists.per_group && g * lists.per_group + j < f.outer; ++j) {
        const std::int64_t o = g * lists.per_group + j;
        if (!f.alive(o, lists.source[e])) continue;
        const T* from = sums + std::int64_t(e) * lists.width + j * f.rank;
        T* to = dcoeff + f.at(o, lists.source[e]) * f.rank;
        for (int i = 0; i < f.rank; ++i) to[i] += from[i];
      }
}

// The numbers themselves, or a wider copy of them in work memory; null stays null
template <class X>
const Wide<X>* wide_copy(const X* numbers, std::int64_t count, Scratch& memory) {
  if constexpr (std::is_same_v<X, Wide<X>>) {
    return numbers;
  } else {
    if (!numbers) return nullptr;
    Wide<X>* copy = memory.take<Wide<X>>(std::size_t(count));
    convert(numbers, count, copy);
    return copy;
  }
}

// (g, r, bm, bn) -> banks of (rows, r * cols) for the side whose N has bm (coeff_first) or bn (tile_first) columns
template <class X>
std::vector<Wide<X>> arranged_tiles(const KronShape& k, const X* tiles, bool transposed, bool inner_first) {
  const std::int64_t n_width = transposed ? k.bn : k.bm, m_width = transposed ? k.bm : k.bn;
  std::vector<Wide<X>> out(std::size_t(k.groups * k.rank * k.bm * k.bn));
  for (std::int64_t g = 0; g < k.groups; ++g)
    for (std::int64_t i = 0; i < k.rank; ++i)
      for (std::int64_t a = 0; a < k.bm; ++a)
        for (std::int64_t q = 0; q < k.bn; ++q) {
          const std::int64_t n = transposed ? q : a, m = transposed ? a : q;
          const std::int64_t base = g * k.rank * k.bm * k.bn;
          const std::int64_t at = inner_first ? (i * m_width + m) * n_width + n : n * k.rank * m_width + i * m_width + m;
          convert(&tiles[base + (i * k.bm + a) * k.bn + q], 1, &out[base + at]);
        }
  return out;
}

// Not inlined: GCC 12.2 vectorises the two widths with -mavx512f so that in a loop over groups all but the first get 0.
template <class T>
[[gnu::noinline]] Sides<T> sides(const KronShape& k, bool tile_first, std::int64_t group, const T* coeff, const std::uint8_t* live, const T* tiles) {
  const std::int64_t per_group = k.m1 / k.groups;
  const int bm = int(k.bm), bn = int(k.bn), rank = int(k.rank);
  if (tile_first)
    return {k.n1, per_group, group * per_group, bn, bm, rank, coeff, live, 1, k.n1, tiles + group * rank * bm * bn, k.n1};
  return {k.m1, k.n1, 0, bm, bn, rank, coeff, live, k.n1, 1, tiles, per_group};
}

}  // namespace KRONBLOCKS_ISA
