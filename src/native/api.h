// What the kernels of every instruction set offer, as one table of functions.
#pragma once

#include <cstdint>

// The upper half of a float32: what torch calls bfloat16.
struct Bf16 {
  std::uint16_t bits;
};

// Where the live blocks of an (m1, n1) grid of (bm, bn) blocks are; the arrays are those of BlockIndex in ops/index.py.
struct PackedIndex {
  const std::int32_t *crow, *col, *row, *slot, *ccol, *order;
  std::int64_t m1, n1, bm, bn;
};

// W = sum_i A_i kron B_i: coefficients (m1, n1, rank), tiles (groups, rank, bm, bn).
struct KronShape {
  std::int64_t m1, n1, bm, bn, rank, groups;
};

// A convolution of stride 1, whose weight's columns are ordered by kernel position, then by channel.
struct ConvShape {
  std::int64_t images, height, width, out_height, out_width;  // of x, and of y
  std::int64_t kernel_height, kernel_width, top, left, dilation_height, dilation_width;
};

template <class T>
struct Kernels {
  void (*packed_linear)(const PackedIndex&, const T* x, std::int64_t rows, const T* values, const T* bias, T* y, int threads);
  void (*packed_grad_input)(const PackedIndex&, const T* dy, std::int64_t rows, const T* values, T* dx, int threads);
  void (*packed_grad_values)(const PackedIndex&, const T* dy, const T* x, std::int64_t rows, T* dvalues, std::int64_t capacity,
                             int threads);
  void (*kron_linear)(const KronShape&, bool tile_first, const T* x, std::int64_t rows, const T* coeff, const T* tiles,
                      const std::uint8_t* live, const T* bias, T* y, int threads);
  void (*kron_backward)(const KronShape&, bool tile_first, const T* dy, const T* x, std::int64_t rows, const T* coeff, const T* tiles,
                        const std::uint8_t* live, T* dx, T* dcoeff, T* dtiles, int threads);
  void (*live_blocks)(const PackedIndex&, const KronShape&, const T* coeff, const T* tiles, T* values, std::int64_t capacity,
                      int threads);
  void (*live_blocks_backward)(const PackedIndex&, const KronShape&, const T* dvalues, const T* coeff, const T* tiles, T* dcoeff,
                               T* dtiles, int threads);
  void (*conv2d)(const PackedIndex&, const ConvShape&, const T* x, const T* values, const T* bias, T* y, int threads);
  void (*conv2d_grad_input)(const PackedIndex&, const ConvShape&, const T* dy, const T* values, T* dx, int threads);
  void (*conv2d_grad_values)(const PackedIndex&, const ConvShape&, const T* dy, const T* x, T* dvalues, std::int64_t capacity,
                             int threads);
};

// x and y float32 or bfloat16, values int8; scales, one for each output, and the bias float32
template <class X>
using PackedLinearInt8 = void (*)(const PackedIndex&, const X* x, std::int64_t rows, const std::int8_t* values, const float* scales,
                                  const float* bias, X* y, int threads);

struct Int8Kernels {
  PackedLinearInt8<float> f32;
  PackedLinearInt8<Bf16> bf16;
};

struct KernelTable {
  const char* name;
  const Kernels<float>* f32;
  const Kernels<double>* f64;
  const Kernels<Bf16>* bf16;
  const Int8Kernels* int8;
};
