// Vectors of one instruction set, in the vector extensions of GCC and Clang: loads, transposes, sums over lanes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

namespace KRONBLOCKS_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kRegisters = 32;
#else
constexpr int kVectorBytes = 16;
constexpr int kRegisters = 16;
#endif

template <class T, int Bytes = kVectorBytes>
struct Vector {
  typedef T type __attribute__((vector_size(Bytes)));
};
template <class T, int Bytes = kVectorBytes>
using Vec = typename Vector<T, Bytes>::type;

template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

template <class V, class T>
inline V load(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

template <class V, class T>
inline void store(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

// a load that stays one: GCC would read memory again at each use of what it can put into the instruction that uses it
template <class V, class T>
inline V load_once(const T* p) {
  V v = load<V>(p);
#if defined(__x86_64__)
  __asm__("" : "+v"(v));
#endif
  return v;
}

template <class T>
struct LaneIndex;
template <>
struct LaneIndex<float> {
  using type = std::int32_t;
};
template <>
struct LaneIndex<std::uint32_t> {
  using type = std::int32_t;
};
template <>
struct LaneIndex<double> {
  using type = std::int64_t;
};

// lanes of (a, b) picked by a constant list: index i < N is a[i], N + i is b[i]
template <class T, int... I>
inline Vec<T> pick(Vec<T> a, Vec<T> b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, Vec<typename LaneIndex<T>::type>{I...});
#endif
}

template <class T, int D, std::size_t... I>
inline void exchange(Vec<T>& a, Vec<T>& b, std::index_sequence<I...>) {
  constexpr int n = kLanes<T>;
  Vec<T> low = pick<T, ((int(I) & D) ? n + int(I) - D : int(I))...>(a, b);
  Vec<T> high = pick<T, ((int(I) & D) ? n + int(I) : int(I) + D)...>(a, b);
  a = low;
  b = high;
}

// swaps the lanes of a that have bit D with the lanes of b that have not
template <class T, int D>
inline void exchange(Vec<T>& a, Vec<T>& b) {
  exchange<T, D>(a, b, std::make_index_sequence<kLanes<T>>());
}

// a square of kLanes vectors becomes its transpose
template <class T, int D = kLanes<T> / 2>
inline void transpose(Vec<T>* rows) {
  if constexpr (D > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i)
      if (!(i & D)) exchange<T, D>(rows[i], rows[i + D]);
    transpose<T, D / 2>(rows);
  }
}

template <class T, int N, int D>
inline Vec<T> merge_sums(Vec<T>* v) {
  if constexpr (N > 1) {
#pragma GCC unroll 16
    for (int i = 0; i < N / 2; ++i) {
      exchange<T, D>(v[2 * i], v[2 * i + 1]);
      v[i] = v[2 * i] + v[2 * i + 1];
    }
    return merge_sums<T, N / 2, D / 2>(v);
  } else if constexpr (D > 0) {
    Vec<T> copy = v[0];
    exchange<T, D>(v[0], copy);
    v[0] += copy;
    return merge_sums<T, 1, D / 2>(v);
  } else {
    return v[0];
  }
}

constexpr int power_above(int n) { return n <= 1 ? 1 : 2 * power_above((n + 1) / 2); }

// the lane in which merge_sums of so many vectors leaves the sum of vector i: its highest bit is i's lowest, and so on
constexpr int merged_lane(int i, int vectors, int lanes) {
  int place = 0;
  for (int bit = 1, half = lanes / 2; bit < vectors; bit *= 2, half /= 2)
    if (i & bit) place += half;
  return place;
}

template <class T, std::size_t... I>
inline Vec<T> in_order(Vec<T> merged, std::index_sequence<I...>) {
  return pick<T, merged_lane(int(I), kLanes<T>, kLanes<T>)...>(merged, merged);
}

// out[i] = sum over the lanes of v[i], for N vectors
template <class T, int N>
inline void lane_sums(const Vec<T>* v, T* out) {
  constexpr int lanes = kLanes<T>;
  if constexpr (N > lanes) {
    lane_sums<T, lanes>(v, out);
    lane_sums<T, N - lanes>(v + lanes, out + lanes);
  } else {
    constexpr int padded = power_above(N);
    Vec<T> work[padded];
    for (int i = 0; i < padded; ++i) work[i] = i < N ? v[i] : Vec<T>{};
    Vec<T> sums = merge_sums<T, padded, lanes / 2>(work);
    if constexpr (N == lanes) {
      store(out, in_order<T>(sums, std::make_index_sequence<N>()));
    } else {
      T lane[lanes];
      store(lane, sums);
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) out[i] = lane[merged_lane(i, padded, lanes)];
    }
  }
}

// to[c * to_step + t] = from[t * from_step + c] for rows of `from` t < rows and columns c < cols; lanes t >= rows become 0
template <class T>
inline void pack_transposed(const T* from, std::ptrdiff_t from_step, int rows, int cols, T* to, std::ptrdiff_t to_step, int lanes) {
  constexpr int n = kLanes<T>;
  for (int t = 0; t < lanes; t += n) {
    int c = 0;
    for (; c + n <= cols; c += n) {
      Vec<T> square[n];
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) square[i] = t + i < rows ? load<Vec<T>>(from + (t + i) * from_step + c) : Vec<T>{};
      transpose<T>(square);
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) store(to + (c + i) * to_step + t, square[i]);
    }
    for (; c < cols; ++c)
      for (int i = 0; i < n; ++i) to[c * to_step + t + i] = t + i < rows ? from[(t + i) * from_step + c] : T(0);
  }
}

// to[t * to_step + c] = from[c * from_step + t] for t < rows, c < cols; `from` has whole vectors in t
template <class T>
inline void unpack_transposed(const T* from, std::ptrdiff_t from_step, int rows, int cols, T* to, std::ptrdiff_t to_step) {
  constexpr int n = kLanes<T>;
  const int whole = cols / n * n;
  for (int t = 0; t < rows; t += n)
    for (int c = 0; c < whole; c += n) {
      Vec<T> square[n];
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) square[i] = load<Vec<T>>(from + (c + i) * from_step + t);
      transpose<T>(square);
      if (t + n <= rows) {
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i) store(to + (t + i) * to_step + c, square[i]);
      } else {
        for (int i = 0; t + i < rows; ++i) store(to + (t + i) * to_step + c, square[i]);
      }
    }
  for (int c = whole; c < cols; ++c)
    for (int t = 0; t < rows; ++t) to[t * to_step + c] = from[c * from_step + t];
}

}  // namespace KRONBLOCKS_ISA
