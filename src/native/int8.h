// Small integers: rows of x quantised to [-127, 127], and words of several integers, whose products one instruction adds up.
//
// With VNNI a word holds four bytes: of x they hold x + 128, since `vpdpbusd` takes unsigned numbers times signed ones, and 128
// times the sum of the values is taken off again. Elsewhere it holds two numbers of 16 bits: products of bytes (`vpmaddubsw`)
// would be added in 16 bits, where two of them may not fit. Sums are exact up to 2^17 products.
#pragma once

#include "bf16.h"
#include "simd.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace KRONBLOCKS_ISA {

#if defined(__AVX512VNNI__)
constexpr int kOffset = 128;  // of x in words
using Small = std::uint8_t;
#else
constexpr int kOffset = 0;
using Small = std::int16_t;
#endif
constexpr int kOfWord = int(sizeof(Word) / sizeof(Small));
constexpr Word kOffsets = kOffset * 0x01010101u;  // what holds x = 0

// sum + x . w in every lane; sums are numbers modulo 2^32
template <int Bytes>
inline Vec<Word, Bytes> dot(Vec<Word, Bytes> sum, Vec<Word, Bytes> x, Vec<Word, Bytes> w) {
#if defined(__AVX512VNNI__)
  // not its intrinsic, for which GCC 12 keeps copies of sums
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
  return sum;
#else
#if defined(__AVX512BW__)
  if constexpr (Bytes == 64) return sum + (Vec<Word, Bytes>)_mm512_madd_epi16((__m512i)x, (__m512i)w);
#endif
#if defined(__AVX2__)
  if constexpr (Bytes == 32) return sum + (Vec<Word, Bytes>)_mm256_madd_epi16((__m256i)x, (__m256i)w);
#endif
#if defined(__x86_64__)
  if constexpr (Bytes == 16) return sum + (Vec<Word, Bytes>)_mm_madd_epi16((__m128i)x, (__m128i)w);
#endif
  using Signed = Vec<std::int32_t, Bytes>;
  const Signed first = ((Signed)(x << 16) >> 16) * ((Signed)(w << 16) >> 16), second = ((Signed)x >> 16) * ((Signed)w >> 16);
  return sum + (Vec<Word, Bytes>)(first + second);
#endif
}

// as many values as a vector of words holds
template <int Bytes>
inline Vec<Word, Bytes> load_words(const std::int8_t* values) {
  if constexpr (kOfWord == 4)
    return load<Vec<Word, Bytes>>(values);
  else
    return (Vec<Word, Bytes>)__builtin_convertvector(load<Vec<std::int8_t, Bytes / 2>>(values), Vec<std::int16_t, Bytes>);
}

// values of a row, each Small wide, with zeros behind them to the end of a word
inline void to_words(const std::int8_t* values, int count, Word* to) {
  using Number = std::conditional_t<kOfWord == 4, std::int8_t, std::int16_t>;
  to[(count - 1) / kOfWord] = 0;
  for (int i = 0; i < count; ++i) store(reinterpret_cast<char*>(to) + i * sizeof(Number), Number(values[i]));
}

inline Vec<float> load_wide(const float* from) { return load<Vec<float>>(from); }
inline Vec<float> load_wide(const Bf16* from) { return low(load_halves(from)); }

// numbers of magnitude below 2^22, rounded to whole ones, to the even one of two
inline Vec<std::int32_t> nearest(Vec<float> product) {
#if defined(__x86_64__)
  __asm__("" : "+v"(product));  // it is rounded before it is added to: not one fused operation
#elif defined(__aarch64__)
  __asm__("" : "+w"(product));
#endif
  return (Vec<std::int32_t>)(product + 0x1.8p23f) - 0x4b400000;
}

// One row of x as small integers, and the factor that brings them back: x is about to * factor. It is 0 for a row of zeros (of
// numbers below 2^-100, too), and NaN where a number of the row is not finite.
template <class X>
float quantise(const X* from, std::int64_t count, Small* to) {
  constexpr int n = kLanes<float>;
  using Smalls = Vec<Small, n * int(sizeof(Small))>;
  const std::int64_t whole = count / n * n;
  const int rest = int(count - whole);
  X tail[n] = {};
  std::copy_n(from + whole, rest, tail);
  auto magnitudes = [](const X* at) { return (Vec<std::int32_t>)load_wide(at) & 0x7fffffff; };  // ordered as the numbers are
  Vec<std::int32_t> most = magnitudes(tail);
  for (std::int64_t i = 0; i < whole; i += n) {
    const Vec<std::int32_t> here = magnitudes(from + i);
    most = here > most ? here : most;
  }
  std::int32_t bits = 0;
  for (int i = 0; i < n; ++i) bits = std::max(bits, most[i]);
  float largest;
  std::memcpy(&largest, &bits, sizeof(largest));
  const bool finite = bits < 0x7f800000, some = finite && largest >= 0x1p-100f;
  if (!some) {
    std::memset(to, kOffset, count * sizeof(Small));
    return finite ? 0.0f : __builtin_nanf("");
  }
  const float by = 127.0f / largest;
  auto small = [&](const X* at) { return __builtin_convertvector(nearest(load_wide(at) * by) + kOffset, Smalls); };
  for (std::int64_t i = 0; i < whole; i += n) store(to + i, small(from + i));
  const Smalls last = small(tail);
  std::memcpy(to + whole, &last, rest * sizeof(Small));
  return largest / 127.0f;
}

// The words of one row of x, whose blocks begin at words of their own: `own` has room for the row as it is.
template <class X>
float quantise_to_words(const X* from, std::int64_t blocks, int width, Small* own, Word* to) {
  const int words = (width + kOfWord - 1) / kOfWord;
  if (width % kOfWord == 0) return quantise(from, blocks * width, reinterpret_cast<Small*>(to));
  const float factor = quantise(from, blocks * width, own);
  for (std::int64_t block = 0; block < blocks; ++block) {
    to[block * words + words - 1] = 0;
    std::memcpy(to + block * words, own + block * width, width * sizeof(Small));
  }
  return factor;
}

}  // namespace KRONBLOCKS_ISA
