// y = x W^T with W = sum_i A_i kron B_i, and its gradients, without W and with the intermediate in cache only.
//
// Both orders are one scheme, seen from two sides. The coefficients *mix* blocks of one side (M: x in coeff_first, y in
// tile_first), and the tiles act between these mixtures and the blocks of the other side (N). For block o of N:
//   Q_o = sum_s C[o,s] M_s   (mix)         E_o = N_o B   (spread)
//   N_o = Q_o B^T            (apply)       M_s = sum_o C[o,s] E_o   (collect)
// coeff_first is mix + apply forward and spread + collect for dx; tile_first is the other way round. In both, the gradients are
//   dC[o,s] = <E_o, M_s>   and   dB = sum_o N_o^T Q_o.
//
// A panel holds some rows t of M, cut in pieces of `piece` numbers of the running index (t, c) of a block, c its column:
// panel[piece][s][number]. Mixing treats all these numbers alike, so it runs at full width for every block size.
#pragma once

#include <numeric>
#include <vector>

#include "api.h"
#include "scratch.h"
#include "simd.h"
#include "small_gemm.h"

namespace KRONBLOCKS_ISA {

constexpr std::size_t kTileBytes = 448 << 10;       // what a tile of rows works on should stay in the second-level cache
constexpr int kMixRows = kRegisters == 32 ? 4 : 6;  // sums of mixtures in registers at once, each of kMixVectors
constexpr int kMixVectors = kRegisters == 32 ? 4 : 2;
constexpr int kDotSources = kRegisters == 32 ? 4 : 2;

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
// coefficients (i, s in group), for collect.
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
        if (f.live && !f.live[at + k * out_step]) continue;
        const T* from = f.coeff + (at + k * out_step) * f.rank;
        for (int i = 0; i < f.rank; ++i) to[i * spread_i + k * spread_k] = from[i];
      }
    }
    lists.starts.push_back(std::int32_t(lists.source.size()));
  }
  return lists;
}

// How the running index (t, c) of `rows` rows of a block of `width` columns is cut into pieces
struct Pieces {
  int rows, width, size;
  std::int64_t count() const { return (std::int64_t(rows) * width + size - 1) / size; }
};

// runs of contiguous numbers: move(t, c, piece, place in piece, length)
template <class Move>
inline void for_runs(const Pieces& p, int rows, Move move) {
  std::int64_t place = 0;
  for (int t = 0; t < rows; ++t)
    for (int c = 0; c < p.width;) {
      const int inside = int(place % p.size), length = std::min(p.width - c, p.size - inside);
      move(t, c, place / p.size, inside, length);
      c += length;
      place += length;
    }
}

// body(W): W is the width as a constant where it is a usual one and runs have that length, else 0
template <class Body>
inline void with_width(int width, Body body) {
  switch (width) {
    case 4: return body(std::integral_constant<int, 4>());
    case 8: return body(std::integral_constant<int, 8>());
    case 16: return body(std::integral_constant<int, 16>());
    case 32: return body(std::integral_constant<int, 32>());
    default: return body(std::integral_constant<int, 0>());
  }
}

template <int W, class T>
inline void copy_run(T* to, const T* from, int length) {
  if constexpr (W > 0) {
    (void)length;
    std::memcpy(to, from, W * sizeof(T));
  } else {
    constexpr int n = kLanes<T>;
    for (; length >= n; length -= n, from += n, to += n) store(to, load<Vec<T>>(from));
    for (; length > 0; --length) *to++ = *from++;
  }
}

// runs of so many numbers, `rows` of them, from one spacing to another
template <class T>
inline void copy_rows(int rows, int width, const T* from, std::ptrdiff_t from_step, T* to, std::ptrdiff_t to_step) {
  with_width(width, [&](auto w) {
    for (int t = 0; t < rows; ++t) copy_run<decltype(w)::value>(to + t * to_step, from + t * from_step, width);
  });
}

// panel[piece][s][number] from rows of M, whose row has row_step numbers; what no row fills becomes 0
template <class T>
void pack_pieces(const Pieces& p, int rows, std::int64_t sources, std::int64_t panel_rows, const T* from, std::ptrdiff_t row_step,
                 T* panel) {
  const std::int64_t piece_step = panel_rows * p.size, filled = std::int64_t(rows) * p.width, all = p.count() * p.size;
  with_width(p.size % p.width ? 0 : p.width, [&](auto w) {
    for_runs(p, rows, [&](int t, int c, std::int64_t piece, int inside, int length) {
      T* to = panel + piece * piece_step + inside;
      const T* source = from + t * row_step + c;
      for (std::int64_t s = 0; s < sources; ++s) copy_run<decltype(w)::value>(to + s * p.size, source + s * p.width, length);
    });
  });
  for (std::int64_t place = filled; place < all; ++place)
    for (std::int64_t s = 0; s < sources; ++s) panel[place / p.size * piece_step + s * p.size + place % p.size] = T(0);
}

// R sums over entries, V vectors wide: out[r] = sum_e coef[e][r] * in[source[e]]; `repeat` numbers of coefficients per entry
// go with as many consecutive inputs (collect), or one input serves all (mix: Once).
template <class T, int R, int V, bool Once>
inline void weighted_sums(const MixLists<T>& lists, std::int64_t group, int first, int repeat, const T* in, std::ptrdiff_t in_step,
                          T* out, std::ptrdiff_t out_step) {
  if constexpr (Once) repeat = 1;
  constexpr int n = kLanes<T>;
  Vec<T> sum[R][V] = {};
  const int coef_step = lists.width / repeat;
  for (std::int32_t e = lists.starts[group]; e < lists.starts[group + 1]; ++e) {
    const T* source = in + lists.source[e] * in_step * repeat;
    const T* coef = lists.coef(e) + first;
    for (int i = 0; i < repeat; ++i, source += in_step, coef += coef_step) {
      Vec<T> lanes[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) lanes[v] = load<Vec<T>>(source + v * n);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[r][v] += lanes[v] * coef[r];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(out + r * out_step + v * n, sum[r][v]);
}

template <class T, int V, bool Once, int R = kMixRows>
inline void weighted_sums_of(int rows, const MixLists<T>& lists, std::int64_t group, int first, int repeat, const T* in,
                             std::ptrdiff_t in_step, T* out, std::ptrdiff_t out_step) {
  if (rows == R)
    weighted_sums<T, R, V, Once>(lists, group, first, repeat, in, in_step, out, out_step);
  else if constexpr (R > 1)
    weighted_sums_of<T, V, Once, R - 1>(rows, lists, group, first, repeat, in, in_step, out, out_step);
}

// R mixtures against up to S sources: sums over all pieces of products, added to out[source][row]
template <class T, int R, int S>
inline void dots(std::int64_t pieces, int size, const T* left, std::ptrdiff_t left_piece, const T* const* right,
                 std::ptrdiff_t right_piece, T* const* out) {
  constexpr int n = kLanes<T>;
  Vec<T> sum[R * S] = {};
  for (std::int64_t piece = 0; piece < pieces; ++piece)
    for (int k = 0; k < size; k += n) {
      Vec<T> sources[S];
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) sources[s] = load<Vec<T>>(right[s] + piece * right_piece + k);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec<T> own = load_once<Vec<T>>(left + piece * left_piece + r * size + k);
#pragma GCC unroll 4
        for (int s = 0; s < S; ++s) sum[s * R + r] += own * sources[s];
      }
    }
  T total[R * S];
  lane_sums<T, R * S>(sum, total);
  for (int s = 0; s < S; ++s)
    for (int r = 0; r < R; ++r) out[s][r] += total[s * R + r];
}

template <class T, int R = kMixRows, int S = kDotSources>
inline void dots_of(int rows, int sources, std::int64_t pieces, int size, const T* left, std::ptrdiff_t left_piece,
                    const T* const* right, std::ptrdiff_t right_piece, T* const* out) {
  if (rows == R && sources == S)
    dots<T, R, S>(pieces, size, left, left_piece, right, right_piece, out);
  else if constexpr (R > 1) {
    if (rows < R) return dots_of<T, R - 1, S>(rows, sources, pieces, size, left, left_piece, right, right_piece, out);
    if constexpr (S > 1) dots_of<T, R, S - 1>(rows, sources, pieces, size, left, left_piece, right, right_piece, out);
  } else if constexpr (S > 1)
    dots_of<T, R, S - 1>(rows, sources, pieces, size, left, left_piece, right, right_piece, out);
}

// One tile of rows of the problem, with the work memory of one thread. V: vectors of a piece.
template <class T, int V>
struct Tile {
  static constexpr int size = V * kLanes<T>;
  const Sides<T>& f;
  Pieces pieces;
  int rows;     // in this tile, at most pieces.rows
  T* panel;     // M: [piece][s][size]
  T* spreads;   // E: [piece][o, i][size]
  T* mixed;     // Q of one group: [o in group, i][running index]
  T* by_rows;   // E or Q of one o: [t][i, c]
  T* block;     // N of one o: [t][n_width]

  // Q of a group of o, into `mixed`
  void mix(const MixLists<T>& lists, std::int64_t group) {
    const std::ptrdiff_t length = pieces.count() * size;
    for (std::int64_t piece = 0; piece < pieces.count(); ++piece)
      for (int first = 0; first < lists.width; first += lists.part)
        weighted_sums_of<T, V, true>(std::min(lists.part, lists.width - first), lists, group, first, 1,
                               panel + piece * f.panel_rows() * size, size, mixed + first * length + piece * size, length);
  }

  // Q of the k-th o of a group as rows [t][i, c]
  const T* mixture(int k) {
    const std::ptrdiff_t length = pieces.count() * size;
    const T* from = mixed + k * f.rank * length;
    if (f.rank == 1) return from;  // the running index is (t, c) already
    for (int i = 0; i < f.rank; ++i)
      copy_rows(rows, f.m_width, from + i * length, f.m_width, by_rows + i * f.m_width, f.spread());
    return by_rows;
  }

  // E of o from N's rows, to its place in `spreads`, of which a piece holds `stride` rows (o, i); `place`: the first of o's
  void spread(std::int64_t o, const T* n_rows, std::ptrdiff_t n_step, std::int64_t place, std::int64_t stride) {
    small_gemm<T>(rows, f.spread(), f.n_width, {n_rows, n_step, 1}, f.bank(o), f.spread(), by_rows, f.spread(), false);
    const std::int64_t filled = std::int64_t(rows) * f.m_width, all = pieces.count() * size, step = stride * size;
    T* to = spreads + place * size;
    if (f.rank == 1) {
      for (std::int64_t at = 0; at < filled; at += size, to += step) {
        if (filled - at >= size)
          std::memcpy(to, by_rows + at, size * sizeof(T));
        else
          copy_run<0>(to, by_rows + at, int(filled - at));
      }
    } else {
      with_width(size % f.m_width ? 0 : f.m_width, [&](auto w) {
        for_runs(pieces, rows, [&](int t, int c, std::int64_t piece, int inside, int length) {
          for (int i = 0; i < f.rank; ++i)
            copy_run<decltype(w)::value>(to + piece * step + i * size + inside, by_rows + t * f.spread() + i * f.m_width + c, length);
        });
      });
    }
    for (std::int64_t at = filled; at < all; ++at)
      for (int i = 0; i < f.rank; ++i) spreads[(at / size * stride + place + i) * size + at % size] = T(0);
  }

  // M = sum of C E, to rows of M, plus bias; needs all of `spreads`
  void collect(const MixLists<T>& lists, const T* bias, T* out, std::ptrdiff_t out_step) {
    alignas(64) T sums[kMixRows * size];
    for (std::int64_t piece = 0; piece < pieces.count(); ++piece) {
      const T* in = spreads + piece * f.spread_rows() * size;
      const std::int64_t first = piece * size, end = std::min(first + size, std::int64_t(rows) * f.m_width);
      for (std::int64_t group = 0; group < lists.groups(); ++group) {
        const int here = int(std::min<std::int64_t>(lists.per_group, f.sources - group * lists.per_group));
        if (f.rank == 1)
          weighted_sums_of<T, V, true>(lists.per_group, lists, group, 0, 1, in, size, sums, size);
        else
          weighted_sums_of<T, V, false>(lists.per_group, lists, group, 0, f.rank, in, size, sums, size);
        with_width(size % f.m_width ? 0 : f.m_width, [&](auto w) {
          for (std::int64_t at = first; at < end;) {
            const std::int64_t t = at / f.m_width;
            const int c = int(at % f.m_width), length = int(std::min<std::int64_t>(f.m_width - c, end - at));
            for (int k = 0; k < here; ++k) {
              const std::int64_t feature = (group * lists.per_group + k) * f.m_width + c;
              const T* from = sums + k * size + (at - first);
              T* to = out + t * out_step + feature;
              if (bias)
                for (int j = 0; j < length; ++j) to[j] = from[j] + bias[feature + j];
              else
                copy_run<decltype(w)::value>(to, from, length);
            }
            at += length;
          }
        });
      }
    }
  }

  // N_o = Q_o B^T, stored in or added to rows of N; tiles_t: banks of (rank * m_width, n_width)
  void apply(std::int64_t o, const T* mixture, const T* tiles_t, const T* bias, T* out, std::ptrdiff_t out_step, bool add) {
    T* to = out + o * f.n_width;
    if (bias) {
      for (int t = 0; t < rows; ++t) std::memcpy(to + t * out_step, bias + o * f.n_width, f.n_width * sizeof(T));
      add = true;
    }
    small_gemm<T>(rows, f.n_width, f.spread(), {mixture, f.spread(), 1}, tiles_t + f.bank_number(o) * f.n_width * f.spread(),
                  f.n_width, to, out_step, add);
  }

  // dC of a group from its E and the panel of M, added to dcoefs as the lists order them
  void coefficient_gradients(const MixLists<T>& lists, std::int64_t group, std::int64_t place, std::int64_t stride, T* dcoefs) {
    for (std::int32_t e = lists.starts[group]; e < lists.starts[group + 1]; e += kDotSources) {
      const int here = std::min(kDotSources, lists.starts[group + 1] - e);
      const T* right[kDotSources];
      T* out[kDotSources];
      for (int first = 0; first < lists.width; first += lists.part) {
        for (int s = 0; s < here; ++s) {
          right[s] = panel + lists.source[e + s] * size;
          out[s] = dcoefs + std::int64_t(e + s) * lists.width + first;
        }
        dots_of<T>(std::min(lists.part, lists.width - first), here, pieces.count(), size, spreads + (place + first) * size,
                   stride * size, right, f.panel_rows() * size, out);
      }
    }
  }
};

// (g, r, bm, bn) -> banks of (rows, r * cols) for the side whose N has bm (coeff_first) or bn (tile_first) columns
template <class T>
std::vector<T> arranged_tiles(const KronShape& k, const T* tiles, bool transposed, bool inner_first) {
  const std::int64_t n_width = transposed ? k.bn : k.bm, m_width = transposed ? k.bm : k.bn;
  std::vector<T> out(std::size_t(k.groups * k.rank * k.bm * k.bn));
  for (std::int64_t g = 0; g < k.groups; ++g)
    for (std::int64_t i = 0; i < k.rank; ++i)
      for (std::int64_t a = 0; a < k.bm; ++a)
        for (std::int64_t q = 0; q < k.bn; ++q) {
          const std::int64_t n = transposed ? q : a, m = transposed ? a : q;
          const std::int64_t base = g * k.rank * k.bm * k.bn;
          const std::int64_t at = inner_first ? (i * m_width + m) * n_width + n : n * k.rank * m_width + i * m_width + m;
          out[base + at] = tiles[base + (i * k.bm + a) * k.bn + q];
        }
  return out;
}

template <class T>
Sides<T> sides(const KronShape& k, bool tile_first, std::int64_t group, const T* coeff, const std::uint8_t* live, const T* tiles) {
  const std::int64_t per_group = k.m1 / k.groups;
  const int bm = int(k.bm), bn = int(k.bn), rank = int(k.rank);
  if (tile_first)
    return {k.n1, per_group, group * per_group, bn, bm, rank, coeff, live, 1, k.n1, tiles + group * rank * bm * bn, k.n1};
  return {k.m1, k.n1, 0, bm, bn, rank, coeff, live, k.n1, 1, tiles, per_group};
}

// Rows of a tile: as many as the cache takes, given the bytes that each needs, but equally many tiles for every thread. Rows fill
// whole pieces where they can: their number is a multiple of size / gcd(size, m_width) then.
inline int tile_rows(std::int64_t count, std::size_t bytes_per_row, int threads, int m_width, int size) {
  const std::int64_t most = std::max<std::int64_t>(1, std::min<std::int64_t>(128, std::int64_t(kTileBytes / bytes_per_row)));
  const std::int64_t rounds = (count + most * threads - 1) / (most * threads);
  const std::int64_t rows = (count + rounds * threads - 1) / (rounds * threads), step = size / std::gcd(size, m_width);
  return int(rows < step ? rows : (rows + step - 1) / step * step);
}

// Work memory of one thread for tiles of the given rows
template <class T, int V>
Tile<T, V> make_tile(const Sides<T>& f, int rows, int per_group, bool all_spreads) {
  static thread_local Scratch panel, spreads, mixed, by_rows, block;
  const Pieces pieces{rows, f.m_width, Tile<T, V>::size};
  const std::size_t length = std::size_t(pieces.count()) * pieces.size;
  return {f,
          pieces,
          0,
          panel.take<T>(length * f.panel_rows()),
          spreads.take<T>(length * (all_spreads ? f.spread_rows() : f.rank * per_group) + per_group * f.rank * pieces.size),
          mixed.take<T>(length * f.rank * per_group),
          by_rows.take<T>(std::size_t(rows) * f.spread()),
          block.take<T>(std::size_t(rows) * f.n_width)};
}

template <class T>
int widest_piece(std::int64_t rows, int width) {  // vectors of a piece, so that few rows do not fill it with zeros
  int vectors = kMixVectors;
  while (vectors > 1 && std::int64_t(vectors) * kLanes<T> > rows * width) vectors /= 2;
  return vectors;
}

template <class T, class Call>
void with_pieces(int vectors, Call call) {
  if constexpr (kMixVectors >= 4)
    if (vectors >= 4) return call(std::integral_constant<int, 4>());
  if (vectors >= 2) return call(std::integral_constant<int, 2>());
  call(std::integral_constant<int, 1>());
}

template <class T, int V>
void kron_forward_group(const Sides<T>& f, const MixLists<T>& lists, bool tile_first, const T* x, std::int64_t count, const T* tiles_t,
                        const T* bias, T* y, std::int64_t inputs, std::int64_t outputs, std::int64_t y_first, int threads) {
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
      const T* from = x + first * inputs;
      T* to = y + first * outputs + y_first;
      if (tile_first) {
        for (std::int64_t o = 0; o < f.outer; ++o)
          tile.spread(o, from + o * f.n_width, inputs, o * f.rank, f.spread_rows());
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

template <class T>
void kron_linear(const KronShape& k, bool tile_first, const T* x, std::int64_t count, const T* coeff, const T* tiles,
                 const std::uint8_t* live, const T* bias, T* y, int threads) {
  if (count == 0) return;
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

// One bank's gradients (tile_first) or all (coeff_first); dtiles is arranged as f.tiles is. Each thread sums for itself; the sums
// are added in the order of the threads, so that results are the same from run to run.
template <class T, int V>
void kron_backward_group(const KronShape& k, const Sides<T>& f, bool tile_first, std::int64_t group, const T* dy, const T* x,
                         std::int64_t count, const T* tiles_t, T* dx, T* dcoeff, T* dtiles, int threads) {
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
      const T* x_rows = x + first * inputs;
      const T* dy_rows = dy + first * outputs;
      const T* m_rows = tile_first ? dy_rows + f.first_source * k.bm : x_rows;
      const T* n_rows = tile_first ? x_rows : dy_rows;
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
  std::copy(dbanks.begin(), dbanks.begin() + tiles_size, dtiles);
  for (std::int64_t g = 0; g < mixes.groups(); ++g)
    for (std::int32_t e = mixes.starts[g]; e < mixes.starts[g + 1]; ++e)
      for (int j = 0; j < mixes.per_group && g * mixes.per_group + j < f.outer; ++j) {
        const std::int64_t o = g * mixes.per_group + j;
        if (!f.alive(o, mixes.source[e])) continue;
        std::copy_n(dcoefs.data() + std::int64_t(e) * mixes.width + j * f.rank, f.rank, dcoeff + f.at(o, mixes.source[e]) * f.rank);
      }
}

template <class T>
void kron_backward(const KronShape& k, bool tile_first, const T* dy, const T* x, std::int64_t count, const T* coeff, const T* tiles,
                   const std::uint8_t* live, T* dx, T* dcoeff, T* dtiles, int threads) {
  const std::size_t tiles_size = std::size_t(k.groups * k.rank * k.bm * k.bn);
  std::fill_n(dcoeff, k.m1 * k.n1 * k.rank, T(0));
  std::fill_n(dtiles, tiles_size, T(0));
  if (count == 0) return;
  const std::vector<T> arranged = arranged_tiles(k, tiles, tile_first, false);
  const std::vector<T> arranged_t = tile_first ? arranged_tiles(k, tiles, tile_first, true) : std::vector<T>();
  std::vector<T> darranged(tiles_size);
  for (std::int64_t group = 0; group < (tile_first ? k.groups : 1); ++group) {
    const Sides<T> f = sides(k, tile_first, group, coeff, live, arranged.data());
    const std::int64_t bank = group * k.rank * k.bm * k.bn;
    with_pieces<T>(widest_piece<T>((count + threads - 1) / threads, f.m_width), [&](auto v) {
      kron_backward_group<T, decltype(v)::value>(k, f, tile_first, group, dy, x, count, arranged_t.data() + (tile_first ? bank : 0), dx,
                                                 dcoeff, darranged.data() + bank, threads);
    });
  }
  const std::int64_t n_width = tile_first ? k.bn : k.bm, m_width = tile_first ? k.bm : k.bn;
  for (std::int64_t g = 0; g < k.groups; ++g)
    for (std::int64_t n = 0; n < n_width; ++n)
      for (std::int64_t i = 0; i < k.rank; ++i)
        for (std::int64_t m = 0; m < m_width; ++m) {
          const std::int64_t a = tile_first ? m : n, q = tile_first ? n : m, base = g * k.rank * k.bm * k.bn;
          dtiles[base + (i * k.bm + a) * k.bn + q] = darranged[base + n * k.rank * m_width + i * m_width + m];
        }
}

}  // namespace KRONBLOCKS_ISA
