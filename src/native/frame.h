// Frames: images, or some of their rows, as convolutions read them (see conv.h): channel by channel, with zeros around.
#pragma once

#include "bf16.h"
#include "scratch.h"

namespace KRONBLOCKS_ISA {

constexpr std::int64_t kFrameBytes = 384 << 10;  // of a frame, which should stay in the second-level cache

// y from x, or dx from dy, as one kind of product: `reach` rows and columns of the source behind a position's own are read, too.
struct ConvSides {
  std::int64_t channels, height, width;         // of the source
  std::int64_t outputs, out_height, out_width;  // of the result
  std::int64_t top, left;                       // rows and columns of zeros before the source; below 0: of it that nobody reads
  std::int64_t reach_height, reach_width;
};

inline ConvSides sides_of(const PackedIndex& index, const ConvShape& c, bool transposed) {
  const std::int64_t reach_height = (c.kernel_height - 1) * c.dilation_height, reach_width = (c.kernel_width - 1) * c.dilation_width;
  const std::int64_t channels = index.n1 * index.bn / (c.kernel_height * c.kernel_width), outputs = index.m1 * index.bm;
  if (transposed)
    return {outputs, c.out_height, c.out_width, channels, c.height, c.width, reach_height - c.top, reach_width - c.left,
            reach_height, reach_width};
  return {channels, c.height, c.width, outputs, c.out_height, c.out_width, c.top, c.left, reach_height, reach_width};
}

// Some images, or some rows of one, as they stand in memory: rows of all images, then their next rows. The zeros behind a row
// serve as those before the next one.
struct Frame {
  Range images, rows;         // of the result
  std::int64_t width, below;  // from one row to the one behind it in memory, and to the one below it in its image
  std::int64_t positions;     // from the first result to the last one, with what is dropped between rows
  std::int64_t vectors, step;  // of positions; from channel to channel

  std::int64_t lines() const { return (rows.end - rows.begin) * (images.end - images.begin); }
};

template <class T>
Frame frame_of(const ConvSides& s, Range images, Range rows) {
  constexpr int n = kLanes<T>;
  const std::int64_t count = images.end - images.begin, all = s.out_width + s.reach_width;
  Frame f{images, rows, 0, 0, 0, 0, 0};
  f.width = std::max(s.out_width, std::min(all, std::max(s.width + s.left, all - s.left)));
  f.below = count * f.width;
  f.positions = f.lines() * f.width - (f.width - s.out_width);
  f.vectors = (f.positions + n - 1) / n;
  const std::int64_t read = std::max(f.vectors * n, f.lines() * f.width) + s.reach_height * f.below + s.reach_width;
  f.step = ((read + n - 1) / n | 1) * n;  // an odd number of lines: channels are not all in few sets of the cache
  return f;
}

template <class T>
std::int64_t line_bytes(const ConvSides& s) {
  return (s.out_width + s.reach_width) * s.channels * std::int64_t(sizeof(T));
}

// how many images fit into the cache
template <class T>
std::int64_t fitting_images(const ConvSides& s) {
  return kFrameBytes / (line_bytes<T>(s) * (s.out_height + s.reach_height));
}

// body(frame) for all parts of these images
template <class T, class Body>
void for_frames(const ConvSides& s, Range images, Body body) {
  const std::int64_t count = images.end - images.begin, fitting = fitting_images<T>(s);
  if (fitting > 0) {
    const int groups = int((count + fitting - 1) / fitting);
    for (int g = 0; g < groups; ++g) {
      const Range group = share(count, groups, g);
      body(frame_of<T>(s, {images.begin + group.begin, images.begin + group.end}, {0, s.out_height}));
    }
    return;
  }
  const std::int64_t rows = std::max({std::int64_t(1), s.reach_height, kFrameBytes / line_bytes<T>(s) - s.reach_height});
  const int bands = int((s.out_height + rows - 1) / rows);
  for (std::int64_t image = images.begin; image < images.end; ++image)
    for (int band = 0; band < bands; ++band) body(frame_of<T>(s, {image, image + 1}, share(s.out_height, bands, band)));
}

// the most numbers of a channel that there can be
template <class T>
std::int64_t largest_step(const ConvSides& s, std::int64_t images) {
  std::int64_t step = 0;
  for_frames<T>(s, {0, std::min(images, std::max<std::int64_t>(1, fitting_images<T>(s)))},
                [&](const Frame& f) { step = std::max(step, f.step); });
  return step;
}

// as memcpy, for lengths that are often less than a few vectors: the last of them overlap
template <class T>
inline void copy_line(T* to, const T* from, std::int64_t count) {
  constexpr int n = kLanes<T>;
  if (count >= n) {
    for (std::int64_t i = 0; i + n <= count; i += n) store(to + i, load<Vec<T>>(from + i));
    store(to + count - n, load<Vec<T>>(from + count - n));
    return;
  }
  if constexpr (n >= 8) {
    using Half = Vec<T, kVectorBytes / 2>;
    if (count >= n / 2) {
      const Half first = load<Half>(from), last = load<Half>(from + count - n / 2);
      store(to, first);
      store(to + count - n / 2, last);
      return;
    }
  }
  if constexpr (n >= 16) {
    using Quarter = Vec<T, kVectorBytes / 4>;
    if (count >= n / 4) {
      const Quarter first = load<Quarter>(from), last = load<Quarter>(from + count - n / 4);
      store(to, first);
      store(to + count - n / 4, last);
      return;
    }
  }
  for (std::int64_t i = 0; i < count; ++i) to[i] = from[i];
}

inline void copy_line(float* to, const Bf16* from, std::int64_t count) { convert(from, count, to); }
inline void copy_line(Bf16* to, const float* from, std::int64_t count) { convert(from, count, to); }

template <class T>
inline void clear(T* to, T* end) {
  constexpr int n = kLanes<T>;
  for (; end - to >= n; to += n) store(to, Vec<T>{});
  for (; to < end; ++to) *to = T(0);
}

// Channels [own.begin, own.end) of the frame's images; what holds none of their numbers becomes 0. Line (v, image) of the frame
// has row v + first of the image, from its column `left` on.
template <class T, class X>
void fill(const Frame& f, Range own, const X* from, std::int64_t channels, std::int64_t height, std::int64_t width,
          std::int64_t first, std::int64_t rows, std::int64_t left, std::int64_t read_width, T* to) {
  const std::int64_t begin = std::max<std::int64_t>(0, left), skipped = std::max<std::int64_t>(0, -left);
  const std::int64_t length = std::max<std::int64_t>(0, std::min(width - skipped, read_width - begin));
  const std::int64_t images = f.images.end - f.images.begin;
  for (std::int64_t c = own.begin; c < own.end; ++c) {
    T *channel = to + c * f.step, *done = channel;
    for (std::int64_t v = std::max<std::int64_t>(0, -first); v < std::min(rows, height - first); ++v)
      for (std::int64_t i = 0; i < images; ++i) {
        T* line = channel + v * f.below + i * f.width + begin;
        clear(done, line);
        copy_line(line, from + (((f.images.begin + i) * channels + c) * height + v + first) * width + skipped, length);
        done = line + length;
      }
    clear(done, channel + f.step);
  }
}

// the source of a product
template <class T, class X>
void fill_source(const Frame& f, const ConvSides& s, Range own, const X* from, T* to) {
  fill(f, own, from, s.channels, s.height, s.width, f.rows.begin - s.top, f.rows.end - f.rows.begin + s.reach_height, s.left,
       s.out_width + s.reach_width, to);
}

// Positions [begin, end) of a block row's sums, to where they belong in the images of the result
template <class T, class X>
void unframe(const Frame& f, const ConvSides& s, std::int64_t row, int height, std::int64_t begin, std::int64_t end, const T* sums,
             std::ptrdiff_t sums_step, X* to) {
  const std::int64_t images = f.images.end - f.images.begin;
  for (int a = 0; a < height; ++a)
    for (std::int64_t line = begin / f.width; line * f.width < end; ++line) {
      const std::int64_t from = std::max<std::int64_t>(0, begin - line * f.width);
      const std::int64_t until = std::min(s.out_width, end - line * f.width);
      if (from >= until) continue;
      const std::int64_t image = f.images.begin + line % images, y = f.rows.begin + line / images;
      copy_line(to + ((image * s.outputs + row * height + a) * s.out_height + y) * s.out_width + from,
                sums + a * sums_step + line * f.width + from - begin, until - from);
    }
}

}  // namespace KRONBLOCKS_ISA
