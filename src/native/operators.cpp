// The operators `kronblocks::...` on the CPU: from torch's dispatcher to the kernels, without Python.
//
// Python defines the same operators (kronblocks/ops/packed.py and factored.py, with their fake, autograd and autocast rules), and
// computes on other devices. A program without Python lets this library define them.
#include <omp.h>

#include <iterator>

#include "conv_operators.h"
#include "dispatch.h"
#include "operands.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace kronblocks {
namespace {

// (Tensor x, Tensor values, Tensor? bias, *index, bool look) -> Tensor
void packed_linear(StableIValue* stack, std::uint64_t, std::uint64_t) {
  Arguments arguments(stack);
  Tensor x = arguments.tensor(), values = arguments.tensor(), bias = arguments.optional_tensor();
  const Index index(arguments);
  if (arguments.flag()) index.look(values);
  require(values.dim() == 3 && values.size(0) == index.capacity(), "values must be (capacity, bm, bn)");
  const PackedIndex where = index.of(values.size(1), values.size(2));
  require(x.dim() >= 1 && x.size(-1) == where.n1 * where.bn, "x must have as many features as the index's columns");
  require(!bias || (bias.dim() == 1 && bias.size(0) == where.m1 * where.bm), "bias must be (out_features,)");
  const std::int32_t dtype = x.dtype(), type = computed_in(dtype);
  prepare(dtype, type, x, values, bias);
  const int64_t rows = rows_of(x);
  Tensor y = empty(with_last(x, where.m1 * where.bm), type);
  in_type(type, [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().packed_linear(where, x.data<T>(), rows, values.data<T>(), bias.data<T>(), y.data<T>(),
                               threads_for(rows * values.numel()));
  });
  stack[0] = std::move(y).to(dtype).release();
}

// (Tensor x, Tensor values, Tensor scales, Tensor? bias, *index) -> Tensor: values int8, scales and bias float32
void packed_linear_int8(StableIValue* stack, std::uint64_t, std::uint64_t) {
  Arguments arguments(stack);
  Tensor x = arguments.tensor(), values = arguments.tensor(), scales = arguments.tensor(), bias = arguments.optional_tensor();
  const Index index(arguments);
  require(values.dtype() == aoti_torch_dtype_int8() && values.dim() == 3 && values.size(0) == index.capacity(),
          "values must be int8, (capacity, bm, bn)");
  const PackedIndex where = index.of(values.size(1), values.size(2));
  const int64_t outputs = where.m1 * where.bm, inputs = where.n1 * where.bn;
  require(x.dim() >= 1 && x.size(-1) == inputs, "x must have as many features as the index's columns");
  require(inputs <= 1 << 17, "sums of more than 131072 products of int8 may not fit into int32");
  require(scales.dim() == 1 && scales.size(0) == outputs, "scales must be (out_features,)");
  require(!bias || (bias.dim() == 1 && bias.size(0) == outputs), "bias must be (out_features,)");
  const std::int32_t dtype = x.dtype(), f32 = aoti_torch_dtype_float32(), bf16 = aoti_torch_dtype_bfloat16();
  const std::int32_t type = computed_in(dtype) == bf16 ? bf16 : f32;
  x = std::move(x).to(type).contiguous();
  values = std::move(values).contiguous();
  scales = std::move(scales).to(f32).contiguous();
  bias = std::move(bias).to(f32).contiguous();
  const int64_t rows = rows_of(x);
  Tensor y = empty(with_last(x, outputs), type);
  auto run = [&](auto zero) {
    using X = decltype(zero);
    int8_kernel<X>()(where, x.data<X>(), rows, values.data<std::int8_t>(), scales.data<float>(),
                                        bias.data<float>(), y.data<X>(), threads_for(rows * values.numel() / 4));
  };
  if (type == bf16)
    run(Bf16());
  else
    run(float());
  stack[0] = std::move(y).to(dtype).release();
}

// (Tensor dy, Tensor values, *index) -> Tensor
void packed_grad_input(StableIValue* stack, std::uint64_t, std::uint64_t) {
  Arguments arguments(stack);
  Tensor dy = arguments.tensor(), values = arguments.tensor();
  const Index index(arguments);
  require(values.dim() == 3 && values.size(0) == index.capacity(), "values must be (capacity, bm, bn)");
  const PackedIndex where = index.of(values.size(1), values.size(2));
  require(dy.dim() >= 1 && dy.size(-1) == where.m1 * where.bm, "dy must have as many features as the index's rows");
  const std::int32_t dtype = dy.dtype(), type = computed_in(dtype);
  prepare(dtype, type, dy, values);
  const int64_t rows = rows_of(dy);
  Tensor dx = empty(with_last(dy, where.n1 * where.bn), type);
  in_type(type, [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().packed_grad_input(where, dy.data<T>(), rows, values.data<T>(), dx.data<T>(),
                                   threads_for(rows * values.numel()));
  });
  stack[0] = std::move(dx).to(dtype).release();
}

// (Tensor dy, Tensor x, *index) -> Tensor
void packed_grad_values(StableIValue* stack, std::uint64_t, std::uint64_t) {
  Arguments arguments(stack);
  Tensor dy = arguments.tensor(), x = arguments.tensor();
  const Index index(arguments);
  const int64_t m1 = index.block_rows(), n1 = index.block_cols();
  require(dy.dim() >= 1 && x.dim() >= 1 && dy.size(-1) % m1 == 0 && x.size(-1) % n1 == 0 && rows_of(dy) == rows_of(x),
          "dy and x must have the features of the index's blocks, and equally many rows");
  const PackedIndex where = index.of(dy.size(-1) / m1, x.size(-1) / n1);
  const std::int32_t dtype = dy.dtype(), type = computed_in(dtype);
  prepare(dtype, type, dy, x);
  const int64_t rows = rows_of(x);
  Tensor dvalues = empty({index.capacity(), where.bm, where.bn}, type);
  in_type(type, [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().packed_grad_values(where, dy.data<T>(), x.data<T>(), rows, dvalues.data<T>(), index.capacity(),
                                    threads_for(rows * dvalues.numel()));
  });
  stack[0] = std::move(dvalues).to(dtype).release();
}

KronShape kron_shape(const Tensor& coeff, const Tensor& tiles) {
  require(coeff.dim() == 3 && tiles.dim() == 4, "coeff must be (m1, n1, r) and tiles (g, r, bm, bn)");
  require(coeff.size(2) == tiles.size(1), "coeff and tiles must be of one rank");
  require(tiles.size(0) > 0 && coeff.size(0) % tiles.size(0) == 0, "the banks of tiles must divide the block rows");
  return {coeff.size(0), coeff.size(1), tiles.size(2), tiles.size(3), tiles.size(1), tiles.size(0)};
}

const std::uint8_t* mask_of(const Tensor& live, const KronShape& shape) {
  require(!live || (live.dtype() == aoti_torch_dtype_bool() && live.numel() == shape.m1 * shape.n1), "live must be bool, (m1, n1)");
  return live.data<std::uint8_t>();
}

// (Tensor x, Tensor coeff, Tensor tiles, Tensor? bias, Tensor? live, str plan) -> Tensor
void kron_linear(StableIValue* stack, std::uint64_t, std::uint64_t) {
  Arguments arguments(stack);
  Tensor x = arguments.tensor(), coeff = arguments.tensor(), tiles = arguments.tensor();
  Tensor bias = arguments.optional_tensor(), live = arguments.optional_tensor();
  const std::string plan = arguments.text();
  if (plan == "dense") {
    StableIValue passed[5] = {x.release(), coeff.release(), tiles.release(), optional_value(std::move(bias)),
                              optional_value(std::move(live))};
    check(torch_call_dispatcher("kronblocks::dense_linear", "", passed, kBuiltFor));
    stack[0] = passed[0];
    return;
  }
  require(plan == "tile_first" || plan == "coeff_first", "no such plan");
  const KronShape shape = kron_shape(coeff, tiles);
  require(x.dim() >= 1 && x.size(-1) == shape.n1 * shape.bn, "x must have as many features as the weight has columns");
  require(!bias || (bias.dim() == 1 && bias.size(0) == shape.m1 * shape.bm), "bias must be (out_features,)");
  const std::int32_t dtype = x.dtype(), type = computed_in(dtype);
  prepare(dtype, type, x, coeff, tiles, bias);
  live = std::move(live).contiguous();
  Tensor y = empty(with_last(x, shape.m1 * shape.bm), type);
  in_type(type, [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().kron_linear(shape, plan == "tile_first", x.data<T>(), rows_of(x), coeff.data<T>(), tiles.data<T>(),
                             mask_of(live, shape), bias.data<T>(), y.data<T>(), threads());
  });
  stack[0] = std::move(y).to(dtype).release();
}

// (Tensor dy, Tensor x, Tensor coeff, Tensor tiles, Tensor? live, str plan, bool input_grad) -> (Tensor, Tensor, Tensor)
void kron_backward(StableIValue* stack, std::uint64_t, std::uint64_t) {
  Arguments arguments(stack);
  Tensor dy = arguments.tensor(), x = arguments.tensor(), coeff = arguments.tensor(), tiles = arguments.tensor();
  Tensor live = arguments.optional_tensor();
  const std::string plan = arguments.text();
  const bool input_grad = arguments.flag();
  if (plan == "dense") {
    StableIValue passed[6] = {dy.release(),    x.release(),          coeff.release(),
                              tiles.release(), optional_value(std::move(live)), StableIValue(input_grad)};
    check(torch_call_dispatcher("kronblocks::dense_backward", "", passed, kBuiltFor));
    std::copy(passed, passed + 3, stack);
    return;
  }
  require(plan == "tile_first" || plan == "coeff_first", "no such plan");
  const KronShape shape = kron_shape(coeff, tiles);
  require(dy.dim() >= 1 && x.dim() >= 1 && x.size(-1) == shape.n1 * shape.bn && dy.size(-1) == shape.m1 * shape.bm &&
              rows_of(dy) == rows_of(x),
          "dy and x must have the weight's features, and equally many rows");
  const std::int32_t dtype = x.dtype(), type = computed_in(dtype);
  prepare(dtype, type, dy, x, coeff, tiles);
  live = std::move(live).contiguous();
  Tensor dx = empty(input_grad ? with_last(x, x.size(-1)) : Sizes{0}, type);
  Tensor dcoeff = empty({shape.m1, shape.n1, shape.rank}, type);
  Tensor dtiles = empty({shape.groups, shape.rank, shape.bm, shape.bn}, type);
  in_type(type, [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().kron_backward(shape, plan == "tile_first", dy.data<T>(), x.data<T>(), rows_of(x), coeff.data<T>(),
                               tiles.data<T>(), mask_of(live, shape), input_grad ? dx.data<T>() : nullptr, dcoeff.data<T>(),
                               dtiles.data<T>(), threads());
  });
  stack[0] = std::move(dx).to(dtype).release();
  stack[1] = std::move(dcoeff).to(dtype).release();
  stack[2] = std::move(dtiles).to(dtype).release();
}

// (Tensor coeff, Tensor tiles, *index, bool look) -> Tensor
void live_blocks(StableIValue* stack, std::uint64_t, std::uint64_t) {
  Arguments arguments(stack);
  Tensor coeff = arguments.tensor(), tiles = arguments.tensor();
  const Index index(arguments);
  if (arguments.flag()) index.look(Tensor());
  const KronShape shape = kron_shape(coeff, tiles);
  require(index.block_rows() == shape.m1 && index.block_cols() == shape.n1, "the index must be of coeff's grid");
  const std::int32_t dtype = tiles.dtype(), type = computed_in(dtype);
  prepare(dtype, type, coeff, tiles);
  Tensor values = empty({index.capacity(), shape.bm, shape.bn}, type);
  in_type(type, [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().live_blocks(index.of(shape.bm, shape.bn), shape, coeff.data<T>(), tiles.data<T>(), values.data<T>(),
                             index.capacity(), threads_for(values.numel() * shape.rank));
  });
  stack[0] = std::move(values).to(dtype).release();
}

// (Tensor dvalues, Tensor coeff, Tensor tiles, *index) -> (Tensor, Tensor)
void live_blocks_backward(StableIValue* stack, std::uint64_t, std::uint64_t) {
  Arguments arguments(stack);
  Tensor dvalues = arguments.tensor(), coeff = arguments.tensor(), tiles = arguments.tensor();
  const Index index(arguments);
  const KronShape shape = kron_shape(coeff, tiles);
  require(index.block_rows() == shape.m1 && index.block_cols() == shape.n1, "the index must be of coeff's grid");
  require(dvalues.numel() == index.capacity() * shape.bm * shape.bn, "dvalues must be (capacity, bm, bn)");
  const std::int32_t dtype = tiles.dtype(), type = computed_in(dtype);
  prepare(dtype, type, dvalues, coeff, tiles);
  Tensor dcoeff = empty({shape.m1, shape.n1, shape.rank}, type);
  Tensor dtiles = empty({shape.groups, shape.rank, shape.bm, shape.bn}, type);
  in_type(type, [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().live_blocks_backward(index.of(shape.bm, shape.bn), shape, dvalues.data<T>(), coeff.data<T>(), tiles.data<T>(),
                                      dcoeff.data<T>(), dtiles.data<T>(), threads());
  });
  stack[0] = std::move(dcoeff).to(dtype).release();
  stack[1] = std::move(dtiles).to(dtype).release();
}

struct Operator {
  const char* name;
  const char* schema;  // as Python defines it; a test compares
  void (*compute)(StableIValue*, std::uint64_t, std::uint64_t);
};

#define INDEX "Tensor crow, Tensor col, Tensor row, Tensor slot, Tensor ccol, Tensor order"
#define GEOMETRY                                                                                      \
  "SymInt kernel_height, SymInt kernel_width, SymInt top, SymInt bottom, SymInt left, SymInt right, " \
  "SymInt dilation_height, SymInt dilation_width"

constexpr Operator kOperators[] = {
    {"packed_linear", "(Tensor x, Tensor values, Tensor? bias, " INDEX ", bool look=False) -> Tensor", packed_linear},
    {"packed_linear_int8", "(Tensor x, Tensor values, Tensor scales, Tensor? bias, " INDEX ") -> Tensor", packed_linear_int8},
    {"packed_grad_input", "(Tensor dy, Tensor values, " INDEX ") -> Tensor", packed_grad_input},
    {"packed_grad_values", "(Tensor dy, Tensor x, " INDEX ") -> Tensor", packed_grad_values},
    {"packed_conv2d", "(Tensor x, Tensor values, Tensor? bias, " INDEX ", " GEOMETRY ", bool look=False) -> Tensor", packed_conv2d},
    {"packed_conv2d_grad_input", "(Tensor dy, Tensor values, " INDEX ", " GEOMETRY ") -> Tensor", packed_conv2d_grad_input},
    {"packed_conv2d_grad_values", "(Tensor dy, Tensor x, " INDEX ", " GEOMETRY ") -> Tensor", packed_conv2d_grad_values},
    {"kron_linear", "(Tensor x, Tensor coeff, Tensor tiles, Tensor? bias, Tensor? live, str plan) -> Tensor", kron_linear},
    {"kron_backward",
     "(Tensor dy, Tensor x, Tensor coeff, Tensor tiles, Tensor? live, str plan, bool input_grad) -> (Tensor, Tensor, Tensor)",
     kron_backward},
    {"live_blocks", "(Tensor coeff, Tensor tiles, " INDEX ", bool look=False) -> Tensor", live_blocks},
    {"live_blocks_backward", "(Tensor dvalues, Tensor coeff, Tensor tiles, " INDEX ") -> (Tensor, Tensor)", live_blocks_backward},
};

TorchLibraryHandle& implementations() {
  static TorchLibraryHandle registered = nullptr;
  return registered;
}

}  // namespace
}  // namespace kronblocks

// Which interface this is: what Python calls by name, and what an operator takes
EXPORT int kb_abi() { return 5; }

// The schema of the operator with this number, or null behind the last one
EXPORT const char* kb_schema(int number) {
  using namespace kronblocks;
  static std::string text;
  if (number < 0 || number >= int(std::size(kOperators))) return nullptr;
  text = std::string("kronblocks::") + kOperators[number].name + kOperators[number].schema;
  return text.c_str();
}

// Let torch's dispatcher call the kernels. `define`: where no Python has defined the operators. 0 if torch agrees.
EXPORT int kb_register(int define) {
  using namespace kronblocks;
  static TorchLibraryHandle definitions;  // for as long as the process lives
  if (implementations()) return 0;
  try {
    if (define) {
      check(aoti_torch_library_init_fragment("kronblocks", __FILE__, __LINE__, &definitions));
      for (const Operator& o : kOperators) check(aoti_torch_library_def(definitions, (std::string(o.name) + o.schema).c_str()));
    }
    check(aoti_torch_library_init_impl("kronblocks", "CPU", __FILE__, __LINE__, &implementations()));
    for (const Operator& o : kOperators) check(torch_library_impl(implementations(), o.name, o.compute, kBuiltFor));
  } catch (const std::exception&) {
    return 1;
  }
  return 0;
}

// Let it call them no more.
EXPORT void kb_unregister() {
  aoti_torch_delete_library_object(std::exchange(kronblocks::implementations(), nullptr));
}

// From now on the index at this address is true as long as a mask and positions (or nulls) hold what they held then.
EXPORT void kb_watch(const void* index, const void* mask, const void* mask_then, std::int64_t mask_bytes, const void* position,
                     const void* position_then, std::int64_t position_bytes) {
  kronblocks::watched().watch(index, {mask, mask_then, mask_bytes}, {position, position_then, position_bytes});
}

EXPORT void kb_forget(const void* index) { kronblocks::watched().forget(index); }

// Whether torch's number of threads is the one of the OpenMP runtime that the kernels use.
EXPORT int kb_shares_threads() {
  const int before = kronblocks::threads();  // torch sets it when it is first asked
  omp_set_num_threads(before + 1);
  const bool shared = kronblocks::threads() == before + 1;
  omp_set_num_threads(before);
  return shared;
}
