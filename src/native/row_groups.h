// dvalues of narrow blocks, as outer products of groups of rows of x: with 8 or 4 columns a vector of 16 numbers holds a block's
// columns for 2 or 4 rows of x, those of a column side by side. Only where vectors have 16 numbers.
//
// E: what a group is made of, float or Word.
#pragma once

#include "bf16.h"
#include "scratch.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace KRONBLOCKS_ISA {

constexpr bool kRowGroups = kVectorBytes == 64;

// P rows of one feature
template <class E, int P>
struct Grouped {
  E of[P];
};
template <class E, int P>
constexpr int kNumbers<Grouped<E, P>> = P * kNumbers<E>;

// one group in all lanes
template <class E, int P>
inline Vec<E> repeated(const Grouped<E, P>& group) {
  if constexpr (P == 2) {
    std::int64_t both;
    std::memcpy(&both, &group, sizeof(both));
    return (Vec<E>)(Vec<std::int64_t>{} + both);
  }
#if defined(__AVX512F__)
  if constexpr (P == 4) return (Vec<E>)_mm512_broadcast_i32x4(load<__m128i>(&group));
#endif
  Vec<E> all{};
  for (int i = 0; i < kLanes<E>; ++i) all[i] = group.of[i % P];
  return all;
}

template <class T, int First, std::size_t... I>
inline Vec<T> alternating(Vec<T> a, Vec<T> b, std::index_sequence<I...>) {
  return pick<T, (First + int(I) / 2 + int(I) % 2 * kLanes<T>)...>(a, b);
}

// a vector of columns of P rows, as P vectors of fewer columns
template <int P, class E, class X>
[[gnu::always_inline]] inline void load_groups(const X* from, std::int64_t step, Vec<E>* out) {
  constexpr int n = kLanes<E>;
#pragma GCC unroll 4
  for (int i = 0; i < P; ++i)
    if constexpr (kNumbers<E> == 2)
      out[i] = load_halves(from + 2 * i * step) | load_halves(from + (2 * i + 1) * step) << 16;
    else if constexpr (std::is_same_v<X, Bf16>)
      out[i] = (Vec<E>)(load_halves(from + i * step) << 16);
    else
      out[i] = load<Vec<E>>(from + i * step);
  if constexpr (P == 2) {
    const Vec<E> first = out[0], second = out[1];
    out[0] = alternating<E, 0>(first, second, std::make_index_sequence<n>());
    out[1] = alternating<E, n / 2>(first, second, std::make_index_sequence<n>());
  } else {
    exchange<E, 1>(out[0], out[1]), exchange<E, 1>(out[2], out[3]);
    exchange<E, 2>(out[0], out[2]), exchange<E, 2>(out[1], out[3]);  // vector i has columns i, i + 4, i + 8, i + 12
    exchange<E, 4>(out[0], out[1]), exchange<E, 4>(out[2], out[3]);
    exchange<E, 8>(out[0], out[2]), exchange<E, 8>(out[1], out[3]);
  }
}

template <int P, std::size_t... I>
inline Vec<float> row_by_row(Vec<float> merged, std::index_sequence<I...>) {
  constexpr int n = kLanes<float>, wide = n / P;
  return pick<float, (int(I) % wide * P + merged_lane(int(I) / wide, P, P))...>(merged, merged);
}

// sums of P rows of a block, each over the groups' rows in neighbouring lanes, one row after another
template <int P>
inline Vec<float> group_sums(Vec<float>* sum) {
  return row_by_row<P>(merge_sums<float, P, P / 2>(sum), std::make_index_sequence<kLanes<float>>());
}

// As ByRows in packed_gradient.h
template <class E, int P>
struct ByGroups {
  using Panel = Grouped<E, P>;
  static constexpr int unit = 1, most = 64, row_unit = 1, most_blocks = 2;
  static constexpr int n = kLanes<E>, wide = n / P;  // columns of a vector

  template <class X>
  static void pack(const X* from, std::int64_t step, int rows, Range own, int width, Range features, Panel* to,
                   std::int64_t to_step) {
    constexpr int per = kNumbers<Panel>;
    for (std::int64_t t = own.begin; t < own.end && t * per < rows; ++t) {
      const X* corner = from + t * per * step;
      const int here = int(std::min<std::int64_t>(per, rows - t * per));
      Panel* block = to + features.begin * to_step + t * width;
      std::int64_t c = features.begin;
      int inside = 0;
      auto move = [&](int columns) {
        inside += columns;
        if (inside == width) block += width * to_step, inside = 0;
      };
      if (here == per && width % wide == 0)
        for (; c + n <= features.end; c += n) {
          Vec<E> groups[P];
          load_groups<P, E>(corner + c, step, groups);
#pragma GCC unroll 4
          for (int i = 0; i < P; ++i, move(wide)) store(block + inside, groups[i]);
        }
      for (; c < features.end; ++c, move(1)) {
        std::conditional_t<kNumbers<E> == 2, X, E> group[per] = {};
        for (int i = 0; i < here; ++i) convert(corner + i * step + c, 1, group + i);
        std::memcpy(block + inside, group, sizeof(group));
      }
    }
  }

  // R rows and `wide` columns of B blocks of one block row
  template <int R, int B>
  static void products(const Panel* dy, int dy_step, const Panel* const* x, int column, int x_step, int groups, float* const* blocks,
                       std::ptrdiff_t place, int block_step, bool add) {
    constexpr int chains = R > 4 ? 1 : 2;  // of sums, so that one need not wait for another
    Vec<float> sum[chains][B][R] = {};
    const Panel* right[B];
    for (int b = 0; b < B; ++b) right[b] = x[b] + column;
    auto step = [&](int chain) {
      Vec<E> columns[B];
#pragma GCC unroll 2
      for (int b = 0; b < B; ++b) {
        columns[b] = load<Vec<E>>(right[b]);
        right[b] += x_step;
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec<E> left = repeated(dy[r]);
#pragma GCC unroll 2
        for (int b = 0; b < B; ++b) sum[chain][b][r] = multiply_add<E>(sum[chain][b][r], columns[b], left);
      }
      dy += dy_step;
    };
    for (int g = 0; g + chains <= groups; g += chains)
#pragma GCC unroll 2
      for (int chain = 0; chain < chains; ++chain) step(chain);
    if (groups % chains) step(0);
#pragma GCC unroll 2
    for (int b = 0; b < B; ++b)
#pragma GCC unroll 8
      for (int r = 0; r < R; r += P) {
        Vec<float> part[P];
#pragma GCC unroll 4
        for (int i = 0; i < P; ++i) {
          part[i] = r + i < R ? sum[0][b][r + i] : Vec<float>{};
          if (chains > 1 && r + i < R) part[i] += sum[chains - 1][b][r + i];
        }
        put_rows(group_sums<P>(part), std::min(P, R - r), blocks[b] + place + r * block_step, block_step, add);
      }
  }

  // some rows of `wide` numbers, the first ones of P
  static void put_rows(Vec<float> sums, int count, float* to, int step, bool add) {
    if (step == wide && count == P) return store(to, add ? sums + load<Vec<float>>(to) : sums);
    float rows[n];
    store(rows, sums);
    for (int i = 0; i < count; ++i)
      for (int q = 0; q < wide; ++q) to[i * step + q] = rows[i * wide + q] + (add ? to[i * step + q] : 0.0f);
  }

  template <int B, int R = 8>
  static void rows_of(int first, int bm, const Panel* dy, const Panel* const* x, int column, int bn, int groups, float* const* blocks,
                      bool add) {
    for (; bm - first >= R; first += R)
      products<R, B>(dy + first, bm, x, column, bn, groups, blocks, std::ptrdiff_t(first) * bn + column, bn, add);
    if constexpr (R > 1) rows_of<B, R / 2>(first, bm, dy, x, column, bn, groups, blocks, add);
  }

  static void blocks(int count, const Panel* dy, const Panel* const* x, std::int64_t, int, int groups, int bm, int bn,
                     float* const* to, bool add) {
    for (int q = 0; q < bn; q += wide)
      if (count == 2)
        rows_of<2>(0, bm, dy, x, q, bn, groups, to, add);
      else
        rows_of<1>(0, bm, dy, x, q, bn, groups, to, add);
  }
};

}  // namespace KRONBLOCKS_ISA
