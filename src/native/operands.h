// What every operator does with its operands: check them, bring them into the type in which they are computed with, and hold the index.
#pragma once

#include <algorithm>

#include "api.h"
#include "torch_abi.h"
#include "watched.h"

namespace kronblocks {

using std::int64_t;
using Sizes = std::vector<int64_t>;

inline void require(bool fine, const char* what) {
  if (!fine) throw std::runtime_error(std::string("kronblocks: ") + what);
}

inline Watched& watched() {
  static Watched all;
  return all;
}

// The type that kernels are called for, as torch names it: there are some for float64, float32 and bfloat16; float16 is widened to
// float32, and its results are rounded.
inline std::int32_t computed_in(std::int32_t dtype) {
  if (dtype == aoti_torch_dtype_float16()) return aoti_torch_dtype_float32();
  require(dtype == aoti_torch_dtype_float64() || dtype == aoti_torch_dtype_float32() || dtype == aoti_torch_dtype_bfloat16(),
          "operands must be float64, float32, bfloat16 or float16");
  return dtype;
}

template <class Compute>
void in_type(std::int32_t type, Compute compute) {
  if (type == aoti_torch_dtype_float64())
    compute(double());
  else if (type == aoti_torch_dtype_bfloat16())
    compute(Bf16());
  else
    compute(float());
}

// Operands, all of one dtype, become contiguous, and of the type in which they are computed with
template <class... Tensors>
void prepare(std::int32_t dtype, std::int32_t type, Tensors&... operands) {
  for (Tensor* each : {&operands...}) {
    require(!*each || each->dtype() == dtype, "operands must be of one dtype");
    *each = std::move(*each).to(type).contiguous();
  }
}

// How many threads a product of so many multiply-adds is worth; starting a second one takes about two microseconds
inline int threads_for(int64_t multiply_adds) {
  constexpr int64_t kWorthwhile = 1 << 16;
  return int(std::max<int64_t>(1, std::min<int64_t>(threads(), multiply_adds / kWorthwhile)));
}

inline Sizes with_last(const Tensor& like, int64_t last) {
  Sizes sizes(like.sizes(), like.sizes() + like.dim());
  sizes.back() = last;
  return sizes;
}

inline int64_t rows_of(const Tensor& x) {
  int64_t rows = 1;
  for (int d = 0; d + 1 < x.dim(); ++d) rows *= x.size(d);
  return rows;
}

// Where the live blocks are: the six tensors of BlockIndex, held as long as their numbers are read.
class Index {
 public:
  explicit Index(Arguments& arguments) {
    for (Tensor& t : tensors_) {
      t = arguments.tensor();
      require(t.dtype() == aoti_torch_dtype_int32() && t.dim() == 1, "the tensors of an index must be int32, of one dimension");
      t = std::move(t).contiguous();
    }
  }

  PackedIndex of(int64_t bm, int64_t bn) const {
    return {part(0), part(1), part(2), part(3), part(4), part(5), block_rows(), block_cols(), bm, bn};
  }

  int64_t block_rows() const { return tensors_[0].numel() - 1; }
  int64_t block_cols() const { return tensors_[4].numel() - 1; }
  int64_t capacity() const { return tensors_[3].numel(); }

  // Write the index again if it is of a mask or positions that have changed since; `values` may be none.
  void look(const Tensor& values) const {
    if (watched().is_current(part(0))) return;
    StableIValue stack[2] = {tensors_[0].again().release(), optional_value(values ? values.again() : Tensor())};
    check(torch_call_dispatcher("kronblocks::refresh_index", "", stack, kBuiltFor));
  }

 private:
  const std::int32_t* part(int i) const { return tensors_[i].data<std::int32_t>(); }

  Tensor tensors_[6];
};

}  // namespace kronblocks
