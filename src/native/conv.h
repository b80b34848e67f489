// Convolutions of stride 1 with packed blocks, which read images in place: no patches are copied.
//
// Images (channels, height, width) go channel by channel into a frame of zeros. There the input of a kernel position is the
// input of another one, some places further on. So vectors run along positions as they do along rows of x in packed.h, and all
// that is new for a block is where its first channel begins. What stands between the rows of a frame is computed and dropped.
#pragma once

#include "frame.h"
#include "packed.h"
#include "packed_gradient.h"

namespace KRONBLOCKS_ISA {

constexpr std::int64_t kSumsBytes = 16 << 10;  // of finished positions that wait in the first-level cache

// Blocks whose features lie where a list says
template <class T, bool Transposed>
struct Placed : Blocks<T, Transposed> {
  const std::int64_t* places;
  std::int64_t place(std::int32_t k, std::ptrdiff_t) const { return places[k]; }
};

// From where the first channel begins to where a block column's (i, j, channels) begin; dx reads from the other end
inline std::int64_t place_of(const ConvShape& c, const Frame& f, bool transposed, std::int64_t channels, std::int64_t column,
                             std::int64_t channel) {
  const std::int64_t position = column / channels;
  std::int64_t i = position / c.kernel_width, j = position % c.kernel_width;
  if (transposed) i = c.kernel_height - 1 - i, j = c.kernel_width - 1 - j;
  return channel * f.step + i * c.dilation_height * f.below + j * c.dilation_width;
}

// The columns of W^T: for dx, those of all kernel positions of the same channels are one row of blocks
struct Gathered {
  std::int32_t *starts, *order;

  static Gathered of(const PackedIndex& index, std::int64_t blocks, Scratch& scratch) {
    std::int32_t* starts = scratch.take<std::int32_t>(blocks + 1 + index.ccol[index.n1]);
    Gathered g{starts, starts + blocks + 1};
    std::int32_t have = 0;
    for (std::int64_t block = 0; block < blocks; ++block) {
      g.starts[block] = have;
      for (std::int64_t q = block; q < index.n1; q += blocks)
        for (std::int32_t k = index.ccol[q]; k < index.ccol[q + 1]; ++k) g.order[have++] = index.order[k];
    }
    g.starts[blocks] = have;
    return g;
  }
};

// Where part `number` of `parts` begins, if rows of blocks, each for `tiles` tiles of positions, are cut into equal parts
struct Cut {
  std::int64_t row, tile;

  static Cut of(const std::int32_t* starts, std::int64_t rows, std::int64_t tiles, int parts, int number) {
    const std::int64_t wanted = (starts[rows] + rows) * tiles * number / parts;
    std::int64_t low = 0, high = rows;  // the last row that begins at or before it
    while (high - low > 1) {
      const std::int64_t middle = (low + high) / 2;
      (((starts[middle] + middle) * tiles <= wanted) ? low : high) = middle;
    }
    return {low, std::min(tiles, (wanted - (starts[low] + low) * tiles) / (starts[low + 1] - starts[low] + 1))};
  }
};

// One block row for positions [first, first + vectors * n): sums (w.out, vectors * n)
template <class T, class W>
void multiply_tile(int vectors, const W& w, std::int64_t row, const T* frame, std::ptrdiff_t step, const T* bias, T* sums,
                   std::ptrdiff_t sums_step) {
  const int parts = (w.out + kMaxRows - 1) / kMaxRows;
  for (int part = 0; part < parts; ++part) {
    const Range chunk = share(w.out, parts, part);
    const int first = int(chunk.begin), height = int(chunk.end - chunk.begin);
    const T* own_bias = bias ? bias + row * w.out + first : nullptr;
    T* to = sums + first * sums_step;
    switch (vectors) {
      case 1: multiply_rows_of<T, 1>(height, w, row, first, frame, step, own_bias, to, sums_step); break;
      case 2: multiply_rows_of<T, 2>(height, w, row, first, frame, step, own_bias, to, sums_step); break;
      default: multiply_rows_of<T, 3>(height, w, row, first, frame, step, own_bias, to, sums_step);
    }
  }
}

// y from x, or dx from dy (Transposed). Threads share the images; where that is not even, they share rows of blocks and positions.
// Each number is one sum in the order of the entries, so it does not depend on the number of threads.
template <bool Transposed, class X>
void convolve(const PackedIndex& index, const ConvShape& c, const X* source, const X* own_values, const X* own_bias, X* to,
              int threads) {
  using T = Wide<X>;
  constexpr int n = kLanes<T>;
  const ConvSides s = sides_of(index, c, Transposed);
  if (c.images == 0 || s.out_height <= 0 || s.out_width <= 0) return;
  static thread_local Scratch frames_scratch, order_scratch, values_scratch, bias_scratch;
  Blocks<T, Transposed> blocks = blocks_of<Transposed>(index, static_cast<const T*>(nullptr), index.slot);
  const std::int64_t channels = Transposed ? s.outputs : s.channels;  // of x
  if (Transposed) {
    blocks.out_blocks = channels / index.bn;
    const Gathered gathered = Gathered::of(index, blocks.out_blocks, order_scratch);
    blocks.starts = gathered.starts, blocks.order = gathered.order;
  }
  const std::int64_t rows = blocks.out_blocks, live = blocks.starts[rows];
  const T* bias;
  if constexpr (std::is_same_v<X, T>) {
    blocks.values = own_values, bias = own_bias;
  } else {  // widened once, in the order in which they are read
    const std::int64_t area = index.bm * index.bn;
    T *copies = values_scratch.take<T>(live * area), *wide = bias_scratch.take<T>(s.outputs);
    for (std::int32_t k = 0; k < live; ++k) convert(own_values + index.slot[blocks.entry(k)] * area, area, copies + k * area);
    if (own_bias) convert(own_bias, s.outputs, wide);
    blocks.values = copies, blocks.slot = nullptr, bias = own_bias ? wide : nullptr;
  }
  const std::int64_t largest = largest_step<T>(s, c.images) * s.channels;
  T* frames = frames_scratch.take<T>(std::size_t(largest) * threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    static thread_local Scratch places_scratch, sums_scratch;
    const int team = omp_get_num_threads(), self = omp_get_thread_num();
    const int bands = c.images % team == 0 ? team : 1, helpers = team / bands, helper = self % helpers;
    T* frame = frames + (self / helpers) * largest;
    std::int64_t* places = places_scratch.take<std::int64_t>(std::size_t(live));
    const Placed<T, Transposed> w{blocks, places};
    Frame known{};
    for_frames<T>(s, share(c.images, bands, self / helpers), [&](const Frame& f) {
      fill_source(f, s, share(s.channels, helpers, helper), source, frame);
      const std::int64_t tiles = (f.vectors + kMaxVectors - 1) / kMaxVectors;
      const Cut begin = Cut::of(blocks.starts, rows, tiles, helpers, helper);
      const Cut end = helper + 1 == helpers ? Cut{rows - 1, tiles} : Cut::of(blocks.starts, rows, tiles, helpers, helper + 1);
      if (f.step != known.step || f.below != known.below || f.vectors != known.vectors)
        for (std::int32_t k = blocks.starts[begin.row]; k < blocks.starts[end.row + 1]; ++k) {
          const std::int32_t entry = blocks.entry(k);
          const std::int64_t column = index.col[entry] * index.bn;
          places[k] = place_of(c, f, Transposed, channels, column, Transposed ? index.row[entry] * index.bm : column % channels);
        }
      known = f;
      if (helpers > 1) {
#pragma omp barrier
      }
      const std::int64_t most = std::max<std::int64_t>(1, kSumsBytes / std::int64_t(sizeof(T)) / (blocks.out * kMaxVectors * n));
      const std::ptrdiff_t sums_step = std::min(most, tiles) * kMaxVectors * n;
      T* sums = sums_scratch.take<T>(std::size_t(blocks.out) * sums_step);
      for (std::int64_t row = begin.row; row <= end.row; ++row) {
        const std::int64_t last = row == end.row ? end.tile : tiles;
        for (std::int64_t tile = row == begin.row ? begin.tile : 0; tile < last; tile += most) {
          const std::int64_t first = share(f.vectors, int(tiles), int(tile)).begin * n;
          std::int64_t position = first;
          for (std::int64_t t = tile; t < std::min(last, tile + most); ++t) {
            const int width = int(share(f.vectors, int(tiles), int(t)).end - position / n);
            multiply_tile(width, w, row, frame + position, f.step, bias, sums + position - first, sums_step);
            position += width * n;
          }
          unframe(f, s, row, blocks.out, first, std::min(position, f.positions), sums, sums_step, to);
        }
      }
      if (helpers > 1) {
#pragma omp barrier
      }
    });
  }
}

template <class X>
void conv2d(const PackedIndex& index, const ConvShape& c, const X* x, const X* values, const X* bias, X* y, int threads) {
  convolve<false>(index, c, x, values, bias, y, threads);
}

template <class X>
void conv2d_grad_input(const PackedIndex& index, const ConvShape& c, const X* dy, const X* values, X* dx, int threads) {
  convolve<true>(index, c, dy, values, static_cast<const X*>(nullptr), dx, threads);
}

// dvalues: inner products over positions of dy, which is 0 between the rows of its frame, with x shifted. All threads fill the
// frames; then each owns rows of blocks, so that results do not depend on how many there are.
template <class X>
void conv2d_grad_values(const PackedIndex& index, const ConvShape& c, const X* dy, const X* x, X* dvalues, std::int64_t capacity,
                        int threads) {
  using T = Wide<X>;
  constexpr bool in_place = std::is_same_v<X, T>;
  static thread_local Scratch left_scratch, right_scratch, sums_scratch;
  const ConvSides s = sides_of(index, c, false);
  const int bm = int(index.bm), bn = int(index.bn), area = bm * bn;
  const bool none = c.images == 0 || s.out_height <= 0 || s.out_width <= 0;
  if (none || capacity != index.crow[index.m1]) std::memset(dvalues, 0, std::size_t(capacity) * area * sizeof(X));
  if (none) return;
  const std::int64_t largest = largest_step<T>(s, c.images);
  T* left = left_scratch.take<T>(std::size_t(largest) * s.outputs);
  T* right = right_scratch.take<T>(std::size_t(largest) * s.channels);
  T* sums = in_place ? nullptr : sums_scratch.take<T>(std::size_t(index.crow[index.m1]) * area);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int team = omp_get_num_threads(), self = omp_get_thread_num();
    const Range own = share_rows(index.crow, index.m1, team, self);
    bool add = false;
    for_frames<T>(s, {0, c.images}, [&](const Frame& f) {
      fill(f, share(s.outputs, team, self), dy, s.outputs, s.out_height, s.out_width, f.rows.begin, f.rows.end - f.rows.begin, 0,
           s.out_width, left);
      fill_source(f, s, share(s.channels, team, self), x, right);
#pragma omp barrier
      for (std::int64_t row = own.begin; row < own.end; ++row)
        for (std::int32_t k = index.crow[row]; k < index.crow[row + 1]; ++k) {
          const std::int64_t column = index.col[k] * index.bn;
          const T* from = right + place_of(c, f, false, s.channels, column, column % s.channels);
          T* to;
          if constexpr (in_place)
            to = dvalues + std::int64_t(index.slot[k]) * area;
          else
            to = sums + std::int64_t(k) * area;
          ByFeatures<T>::block(left + row * bm * f.step, from, f.step, int(f.vectors) * kLanes<T>, bm, bn, to, add);
        }
      add = true;
#pragma omp barrier
    });
    if (!in_place)
      for (std::int32_t k = index.crow[own.begin]; k < index.crow[own.end]; ++k)
        convert(sums + std::int64_t(k) * area, area, dvalues + std::int64_t(index.slot[k]) * area);
  }
}

}  // namespace KRONBLOCKS_ISA
