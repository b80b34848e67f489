// Work memory of a thread, kept between calls, and the even division of work.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace KRONBLOCKS_ISA {

// An aligned buffer that grows and is never given back before its thread ends: the kernels run in the same few threads for ever.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }

  template <class T>
  T* take(std::size_t count) {
    std::size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
    if (bytes > size_) {
      std::free(memory_);
      memory_ = std::aligned_alloc(64, bytes);
      size_ = memory_ ? bytes : 0;
      if (!memory_) throw std::bad_alloc();
    }
    return static_cast<T*>(memory_);
  }

 private:
  void* memory_ = nullptr;
  std::size_t size_ = 0;
};

struct Range {
  std::int64_t begin, end;
};

// part `index` of `parts` nearly equal ones of 0 .. count-1
inline Range share(std::int64_t count, int parts, int index) { return {count * index / parts, count * (index + 1) / parts}; }

// rows of blocks, cut so that every part has about as many entries; `starts` has rows + 1 numbers
inline Range share_rows(const std::int32_t* starts, std::int64_t rows, int parts, int index) {
  auto cut = [&](int k) -> std::int64_t {
    if (k == 0) return 0;
    if (k == parts) return rows;
    // an empty row costs a little too: entries + rows
    std::int64_t wanted = (starts[rows] + rows) * k / parts, low = 0, high = rows;
    while (low < high) {
      std::int64_t middle = (low + high) / 2;
      if (starts[middle] + middle < wanted)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  };
  return {cut(index), cut(index + 1)};
}

}  // namespace KRONBLOCKS_ISA
