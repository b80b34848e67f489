// Panels of rows of x or dy, cut into pieces, and the sums over them that the coefficients ask for.
//
// A panel holds some rows t of M, cut in pieces of `piece` numbers of the running index (t, c) of a block, c its column:
// panel[piece][s][number]. Mixing treats all these numbers alike, so it runs at full width for every block size.
#pragma once

#include <cstring>

#include "bf16.h"
#include "factored_sides.h"

namespace KRONBLOCKS_ISA {

constexpr int kDotSources = kRegisters == 32 ? 4 : 2;

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

template <int W, class T, class X>
inline void copy_run(T* to, const X* from, int length) {
  if constexpr (W > 0 && std::is_same_v<T, X>)
    std::memcpy(to, from, W * sizeof(T));
  else
    convert(from, W > 0 ? W : length, to);
}

// runs of so many numbers, `rows` of them, from one spacing to another
template <class T, class X>
inline void copy_rows(int rows, int width, const X* from, std::ptrdiff_t from_step, T* to, std::ptrdiff_t to_step) {
  with_width(width, [&](auto w) {
    for (int t = 0; t < rows; ++t) copy_run<decltype(w)::value>(to + t * to_step, from + t * from_step, width);
  });
}

// panel[piece][s][number] from rows of M, whose row has row_step numbers; what no row fills becomes 0
template <class T, class X>
void pack_pieces(const Pieces& p, int rows, std::int64_t sources, std::int64_t panel_rows, const X* from, std::ptrdiff_t row_step,
                 T* panel) {
  const std::int64_t piece_step = panel_rows * p.size, filled = std::int64_t(rows) * p.width, all = p.count() * p.size;
  with_width(p.size % p.width ? 0 : p.width, [&](auto w) {
    for_runs(p, rows, [&](int t, int c, std::int64_t piece, int inside, int length) {
      T* to = panel + piece * piece_step + inside;
      const X* source = from + t * row_step + c;
      for (std::int64_t s = 0; s < sources; ++s) copy_run<decltype(w)::value>(to + s * p.size, source + s * p.width, length);
    });
  });
  for (std::int64_t place = filled; place < all; ++place)
    for (std::int64_t s = 0; s < sources; ++s) panel[place / p.size * piece_step + s * p.size + place % p.size] = T{};
}

// R sums over entries, V vectors wide: sum_e coef[e][r] * in[source[e]], given to keep(r, vectors). `repeat` numbers of coefficients
// per entry go with as many consecutive inputs (collect), or one input serves all (mix: Once).
template <class T, int R, int V, bool Once, class Keep>
inline void weighted_sums(const MixLists<T>& lists, std::int64_t group, int first, int repeat, const T* in, std::ptrdiff_t in_step,
                          Keep keep) {
  if constexpr (Once) repeat = 1;
  constexpr int n = kLanes<T>;
  Vec<Sum<T>> sum[R][V] = {};
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
        for (int v = 0; v < V; ++v) sum[r][v] = multiply_add<T>(sum[r][v], lanes[v], coef[r]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) keep(r, sum[r]);
}

template <class T, int V, bool Once, int R = kMixRows, class Keep>
inline void weighted_sums_of(int rows, const MixLists<T>& lists, std::int64_t group, int first, int repeat, const T* in,
                             std::ptrdiff_t in_step, Keep keep) {
  if (rows == R)
    weighted_sums<T, R, V, Once>(lists, group, first, repeat, in, in_step, keep);
  else if constexpr (R > 1)
    weighted_sums_of<T, V, Once, R - 1>(rows, lists, group, first, repeat, in, in_step, keep);
}

// keep for weighted_sums: vectors of row r one after another at to + r * step
template <int V, class Out>
inline auto keep_at(Out* to, std::ptrdiff_t step) {
  return [=](int r, const auto* sums) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) put(to + r * step + v * int(sizeof(*sums) / sizeof((*sums)[0])), sums[v]);
  };
}

// R mixtures against up to S sources: sums over all pieces of products, added to out[source][row]
template <class T, int R, int S>
inline void dots(std::int64_t pieces, int size, const T* left, std::ptrdiff_t left_piece, const T* const* right,
                 std::ptrdiff_t right_piece, Sum<T>* const* out) {
  constexpr int n = kLanes<T>;
  Vec<Sum<T>> sum[R * S] = {};
  for (std::int64_t piece = 0; piece < pieces; ++piece)
    for (int k = 0; k < size; k += n) {
      Vec<T> sources[S];
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) sources[s] = load<Vec<T>>(right[s] + piece * right_piece + k);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec<T> own = load_once<Vec<T>>(left + piece * left_piece + r * size + k);
#pragma GCC unroll 4
        for (int s = 0; s < S; ++s) sum[s * R + r] = multiply_add<T>(sum[s * R + r], own, sources[s]);
      }
    }
  Sum<T> total[R * S];
  lane_sums<Sum<T>, R * S>(sum, total);
  if constexpr (R * sizeof(Sum<T>) == 16) {
    using Row = Vec<Sum<T>, 16>;
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) store(out[s], load<Row>(out[s]) + load<Row>(total + s * R));
  } else {
    for (int s = 0; s < S; ++s)
      for (int r = 0; r < R; ++r) out[s][r] += total[s * R + r];
  }
}

template <class T, int R = kMixRows, int S = kDotSources>
inline void dots_of(int rows, int sources, std::int64_t pieces, int size, const T* left, std::ptrdiff_t left_piece,
                    const T* const* right, std::ptrdiff_t right_piece, Sum<T>* const* out) {
  if (rows == R && sources == S)
    dots<T, R, S>(pieces, size, left, left_piece, right, right_piece, out);
  else if constexpr (R > 1) {
    if (rows < R) return dots_of<T, R - 1, S>(rows, sources, pieces, size, left, left_piece, right, right_piece, out);
    if constexpr (S > 1) dots_of<T, R, S - 1>(rows, sources, pieces, size, left, left_piece, right, right_piece, out);
  } else if constexpr (S > 1)
    dots_of<T, R, S - 1>(rows, sources, pieces, size, left, left_piece, right, right_piece, out);
}

}  // namespace KRONBLOCKS_ISA
