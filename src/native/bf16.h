// bfloat16: numbers widened to float32 and rounded back, and pairs of them as 32-bit words, which one instruction multiplies.
//
// A pair's first number is the low half of its word. Panels of pairs are made by the transposes of 32-bit numbers in simd.h.
#pragma once

#include <algorithm>
#include <type_traits>

#include "api.h"
#include "simd.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace KRONBLOCKS_ISA {

using Word = std::uint32_t;

#if defined(__AVX512BF16__)
constexpr bool kPairProducts = true;  // products of pairs take one instruction
#else
constexpr bool kPairProducts = false;
#endif

// Sum: what products of T are summed in. Wide: what numbers of type T are computed in, one by one. kNumbers: those in a T.
template <class T>
using Sum = std::conditional_t<std::is_same_v<T, Word>, float, T>;
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, Bf16>, float, T>;
template <class T>
constexpr int kNumbers = std::is_same_v<T, Word> ? 2 : 1;

template <int Bytes = kVectorBytes>
inline Vec<float, Bytes> low(Vec<Word, Bytes> pairs) {
  return (Vec<float, Bytes>)(pairs << 16);
}
template <int Bytes = kVectorBytes>
inline Vec<float, Bytes> high(Vec<Word, Bytes> pairs) {
  return (Vec<float, Bytes>)(pairs & 0xffff0000u);
}

inline float widened(Bf16 number) {
  const Word bits = Word(number.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}

// to the nearest bf16, to the even one of two; NaN stays NaN
inline Bf16 rounded(float number) {
  Word bits;
  std::memcpy(&bits, &number, sizeof(bits));
  if (number != number) return {std::uint16_t(bits >> 16 | 0x40)};
  return {std::uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// the same in the upper halves of words
template <int Bytes = kVectorBytes>
inline Vec<Word, Bytes> rounded_high(Vec<float, Bytes> numbers) {
  using Words = Vec<Word, Bytes>;
  const Words bits = (Words)numbers, nan = (Words)(numbers != numbers);
  return ((bits + 0x7fff + (bits >> 16 & 1)) & ~nan) | ((bits | 0x400000) & nan);
}

// pairs of rounded numbers
inline Vec<Word> rounded_pairs(Vec<float> first, Vec<float> second) {
#if defined(__AVX512BF16__)
  constexpr Word pair = 0x100000;  // lanes 0 and 16 of both halves
  Vec<Word> places;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<Word>; ++i) places[i] = pair + Word(i) * 0x10001;
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  return (Vec<Word>)_mm512_permutexvar_epi16((__m512i)places, both);
#else
  return rounded_high<>(first) >> 16 | (rounded_high<>(second) & 0xffff0000u);
#endif
}

// sum + a * b; of pairs: sum + a.first * b.first + a.second * b.second
template <class T, int Bytes = kVectorBytes>
inline Vec<Sum<T>, Bytes> multiply_add(Vec<Sum<T>, Bytes> sum, Vec<T, Bytes> a, Vec<T, Bytes> b) {
  if constexpr (!std::is_same_v<T, Word>) {
    return sum + a * b;
  } else {
#if defined(__AVX512BF16__)
    if constexpr (Bytes == 64) return (Vec<float, 64>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
    if constexpr (Bytes == 32) return (Vec<float, 32>)_mm256_dpbf16_ps((__m256)sum, (__m256bh)a, (__m256bh)b);
    if constexpr (Bytes == 16) return (Vec<float, 16>)_mm_dpbf16_ps((__m128)sum, (__m128bh)a, (__m128bh)b);
#endif
    sum += low<Bytes>(a) * low<Bytes>(b);
    return sum + high<Bytes>(a) * high<Bytes>(b);
  }
}

// the same with one b for all lanes
template <class T, int Bytes = kVectorBytes>
inline Vec<Sum<T>, Bytes> multiply_add(Vec<Sum<T>, Bytes> sum, Vec<T, Bytes> a, T b) {
  if constexpr (!std::is_same_v<T, Word>)
    return sum + a * b;
  else
    return multiply_add<T, Bytes>(sum, a, Vec<Word, Bytes>{} + b);
}

// n numbers of 16 bits as the low halves of n words
inline Vec<Word> load_halves(const Bf16* from) {
  return __builtin_convertvector(load<Vec<std::uint16_t, kVectorBytes / 2>>(from), Vec<Word>);
}

// numbers of one type to another, in whole vectors and then in ever narrower ones
template <int Bytes = kVectorBytes>
inline void convert(const Bf16* from, std::int64_t count, float* to) {
  constexpr int n = Bytes / 4;
  if constexpr (n > 2) {
    for (; count >= n; count -= n, from += n, to += n)
      store(to, __builtin_convertvector(load<Vec<std::uint16_t, 2 * n>>(from), Vec<Word, Bytes>) << 16);
    if (count) convert<Bytes / 2>(from, count, to);
  } else {
    for (; count > 0; --count) *to++ = widened(*from++);
  }
}

template <int Bytes = kVectorBytes>
inline void convert(const float* from, std::int64_t count, Bf16* to) {
  constexpr int n = Bytes / 4;
  if constexpr (n > 2) {
    for (; count >= n; count -= n, from += n, to += n) {
#if defined(__AVX512BF16__)
      if constexpr (Bytes == 64) {
        store(to, _mm512_cvtneps_pbh(load<__m512>(from)));
        continue;
      }
#endif
      store(to, __builtin_convertvector(rounded_high<Bytes>(load<Vec<float, Bytes>>(from)) >> 16, Vec<std::uint16_t, 2 * n>));
    }
    if (count) convert<Bytes / 2>(from, count, to);
  } else {
    for (; count > 0; --count) *to++ = rounded(*from++);
  }
}

template <class T>
inline void convert(const T* from, std::int64_t count, T* to) {
  using Number = std::conditional_t<std::is_same_v<T, Bf16>, std::uint16_t, T>;  // vectors have numbers only
  constexpr int n = kLanes<Number>;
  for (; count >= n; count -= n, from += n, to += n) store(to, load<Vec<Number>>(from));
  for (; count > 0; --count) *to++ = *from++;
}

// a vector of sums as the numbers that are kept of them
template <class T>
inline void put(T* to, Vec<T> numbers) {
  store(to, numbers);
}
inline void put(Bf16* to, Vec<float> numbers) {
#if defined(__AVX512BF16__)
  store(to, _mm512_cvtneps_pbh((__m512)numbers));
#else
  store(to, __builtin_convertvector(rounded_high<>(numbers) >> 16, Vec<std::uint16_t, kVectorBytes / 2>));
#endif
}

// pairs (first[i], second[i]); without a second row its numbers are 0
inline void interleave(const Bf16* first, const Bf16* second, int count, Word* to) {
  constexpr int n = kLanes<Word>;
  int i = 0;
  for (; i + n <= count; i += n) {
    const Vec<Word> halves = load_halves(first + i);
    store(to + i, second ? halves | load_halves(second + i) << 16 : halves);
  }
  for (; i < count; ++i) to[i] = Word(first[i].bits) | (second ? Word(second[i].bits) << 16 : 0);
}

// A square of words from rows of `from` t < rows, columns c < cols of them, transposed: vector i has columns 2i and 2i + 1
inline void load_square(const Bf16* from, std::ptrdiff_t from_step, int rows, int cols, Vec<Word>* square) {
  constexpr int n = kLanes<Word>;
  if (rows >= n && cols >= 2 * n) {
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) square[i] = load<Vec<Word>>(from + i * from_step);
  } else {
    for (int i = 0; i < n; ++i) {
      square[i] = Vec<Word>{};
      if (i < rows) std::memcpy(&square[i], from + i * from_step, std::min(cols, 2 * n) * sizeof(Bf16));
    }
  }
  transpose<Word>(square);
}

// to[c * to_step + t] = from[t * from_step + c] as in simd.h, widened
inline void pack_transposed(const Bf16* from, std::ptrdiff_t from_step, int rows, int cols, float* to, std::ptrdiff_t to_step,
                            int lanes) {
  constexpr int n = kLanes<Word>;
  for (int t = 0; t < lanes; t += n)
    for (int c = 0; c < cols; c += 2 * n) {
      Vec<Word> square[n];
      load_square(from + t * from_step + c, from_step, rows - t, cols - c, square);
      float* corner = to + c * to_step + t;
      if (c + 2 * n <= cols) {
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i) {
          store(corner + 2 * i * to_step, low(square[i]));
          store(corner + (2 * i + 1) * to_step, high(square[i]));
        }
      } else {
        for (int i = 0; i < cols - c; ++i) store(corner + i * to_step, i % 2 ? high(square[i / 2]) : low(square[i / 2]));
      }
    }
}

// pairs of columns: to[c / 2 * to_step + t] has columns c and c + 1 of row t; cols is even
inline void pack_transposed(const Bf16* from, std::ptrdiff_t from_step, int rows, int cols, Word* to, std::ptrdiff_t to_step,
                            int lanes) {
  constexpr int n = kLanes<Word>;
  for (int t = 0; t < lanes; t += n)
    for (int c = 0; c < cols; c += 2 * n) {
      Vec<Word> square[n];
      load_square(from + t * from_step + c, from_step, rows - t, cols - c, square);
      Word* corner = to + c / 2 * to_step + t;
      if (c + 2 * n <= cols) {
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i) store(corner + i * to_step, square[i]);
      } else {
        for (int i = 0; i < (cols - c) / 2; ++i) store(corner + i * to_step, square[i]);
      }
    }
}

// Pairs of rows: to[c * to_step + t] has column c of two rows, `lanes` of them: t and t + n of every 2n. What no row fills is 0.
inline void pack_row_pairs(const Bf16* from, std::ptrdiff_t from_step, int rows, int cols, Word* to, std::ptrdiff_t to_step,
                           int lanes) {
  constexpr int n = kLanes<Word>;
  for (int t = 0; t < lanes; t += n)
    for (int c = 0; c < cols; c += 2 * n) {
      Vec<Word> first[n], second[n];
      const Bf16* corner = from + 2 * t * from_step + c;
      load_square(corner, from_step, rows - 2 * t, cols - c, first);
      load_square(corner + n * from_step, from_step, rows - 2 * t - n, cols - c, second);
      const int here = std::min(cols - c, 2 * n);
      for (int i = 0; i < here; ++i) {
        const Vec<Word> a = first[i / 2], b = second[i / 2];
        store(to + (c + i) * to_step + t, i % 2 ? a >> 16 | (b & 0xffff0000u) : (a & 0xffffu) | b << 16);
      }
    }
}

// to[t * to_step + c] = from[c * from_step + t] as in simd.h, rounded
inline void unpack_transposed(const float* from, std::ptrdiff_t from_step, int rows, int cols, Bf16* to, std::ptrdiff_t to_step) {
  constexpr int n = kLanes<Word>;
  for (int t = 0; t < rows; t += n)
    for (int c = 0; c < cols; c += 2 * n) {
      Vec<Word> square[n];
      const float* corner = from + c * from_step + t;
      const int here = std::min(cols - c, 2 * n);
      auto column = [&](int i) { return i < here ? load<Vec<float>>(corner + i * from_step) : Vec<float>{}; };
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) square[i] = rounded_pairs(column(2 * i), column(2 * i + 1));
      transpose<Word>(square);
      Bf16* out = to + t * to_step + c;
      if (t + n <= rows && here == 2 * n) {
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i) store(out + i * to_step, square[i]);
      } else {
        for (int i = 0; t + i < rows && i < n; ++i) std::memcpy(out + i * to_step, &square[i], here * sizeof(Bf16));
      }
    }
}

}  // namespace KRONBLOCKS_ISA
