// C (+)= A B for small matrices in cache: A is read one number at a time, in any layout; B and C are rows of vectors. Of pairs
// (Word), the depth counts them, and C is float.
#pragma once

#include "bf16.h"

namespace KRONBLOCKS_ISA {

template <class T>
struct Matrix {  // element (i, k) is at data[i * row_step + k * col_step]
  const T* data;
  std::ptrdiff_t row_step, col_step;
};

template <class T, int Bytes, int R, int V>
inline void gemm_tile(int depth, const Matrix<T>& a, const T* b, std::ptrdiff_t b_step, Sum<T>* c, std::ptrdiff_t c_step,
                      bool add) {
  using Lanes = Vec<T, Bytes>;
  using Sums = Vec<Sum<T>, Bytes>;
  constexpr int n = Bytes / int(sizeof(T));
  Sums sum[R][V] = {};
  const T* left = a.data;
  for (int k = 0; k < depth; ++k, left += a.col_step, b += b_step) {
    Lanes right[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) right[v] = load<Lanes>(b + v * n);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] = multiply_add<T, Bytes>(sum[r][v], right[v], left[r * a.row_step]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      Sum<T>* to = c + r * c_step + v * n;
      store(to, add ? sum[r][v] + load<Sums>(to) : sum[r][v]);
    }
}

constexpr int kGemmRows = kRegisters == 32 ? 8 : 6;

template <class T, int Bytes, int V, int R = kGemmRows>
inline void gemm_rows(int rows, int depth, Matrix<T> a, const T* b, std::ptrdiff_t b_step, Sum<T>* c, std::ptrdiff_t c_step,
                      bool add) {
  if (rows >= R) {
    for (; rows >= R; rows -= R, a.data += R * a.row_step, c += R * c_step)
      gemm_tile<T, Bytes, R, V>(depth, a, b, b_step, c, c_step, add);
  }
  if constexpr (R > 1) {
    if (rows) gemm_rows<T, Bytes, V, R - 1>(rows, depth, a, b, b_step, c, c_step, add);
  }
}

// columns in whole vectors, two at a time, and the rest in ever narrower ones
template <class T, int Bytes = kVectorBytes>
inline void small_gemm(int rows, int cols, int depth, const Matrix<T>& a, const T* b, std::ptrdiff_t b_step, Sum<T>* c,
                       std::ptrdiff_t c_step, bool add) {
  constexpr int n = Bytes / int(sizeof(T));
  for (; cols >= 2 * n; cols -= 2 * n, b += 2 * n, c += 2 * n) gemm_rows<T, Bytes, 2>(rows, depth, a, b, b_step, c, c_step, add);
  if (cols >= n) {
    gemm_rows<T, Bytes, 1>(rows, depth, a, b, b_step, c, c_step, add);
    cols -= n, b += n, c += n;
  }
  if constexpr (n > 1) {
    if (cols) small_gemm<T, Bytes / 2>(rows, cols, depth, a, b, b_step, c, c_step, add);
  }
}

}  // namespace KRONBLOCKS_ISA
