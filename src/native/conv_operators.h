// The operators of convolutions, see ops/convolution.py.
#pragma once

#include "dispatch.h"
#include "operands.h"

namespace kronblocks {

// The geometry of a convolution of stride 1.
struct Geometry {
  int64_t kernel_height, kernel_width, top, bottom, left, right, dilation_height, dilation_width;

  explicit Geometry(Arguments& arguments) {
    for (int64_t* each : {&kernel_height, &kernel_width, &top, &bottom, &left, &right, &dilation_height, &dilation_width})
      *each = arguments.number();
    require(kernel_height > 0 && kernel_width > 0 && dilation_height > 0 && dilation_width > 0 &&
                std::min(std::min(top, bottom), std::min(left, right)) >= 0,
            "kernel and dilation must be positive, and padding not negative");
  }

  // rows and columns by which y is smaller than x
  int64_t lost_height() const { return (kernel_height - 1) * dilation_height - top - bottom; }
  int64_t lost_width() const { return (kernel_width - 1) * dilation_width - left - right; }

  // for x of this height and width, or (grow) for y
  ConvShape of(int64_t images, int64_t height, int64_t width, bool grow) const {
    if (grow) height += lost_height(), width += lost_width();
    const ConvShape shape{images, height, width, height - lost_height(), width - lost_width(), kernel_height, kernel_width, top, left,
                          dilation_height, dilation_width};
    require(std::min(shape.height, shape.width) > 0 && std::min(shape.out_height, shape.out_width) > 0,
            "the kernel must fit into the padded image");
    return shape;
  }

  int64_t channels(const PackedIndex& where) const {
    const int64_t columns = where.n1 * where.bn, positions = kernel_height * kernel_width;
    require(columns % positions == 0 && columns / positions % where.bn == 0,
            "a block's columns must divide the channels, so that it stays within one kernel position");
    return columns / positions;
  }
};

// (Tensor x, Tensor values, Tensor? bias, *index, *geometry, bool look) -> Tensor
inline void packed_conv2d(StableIValue* stack, std::uint64_t, std::uint64_t) {
  Arguments arguments(stack);
  Tensor x = arguments.tensor(), values = arguments.tensor(), bias = arguments.optional_tensor();
  const Index index(arguments);
  const Geometry geometry(arguments);
  if (arguments.flag()) index.look(values);
  require(values.dim() == 3 && values.size(0) == index.capacity(), "values must be (capacity, bm, bn)");
  const PackedIndex where = index.of(values.size(1), values.size(2));
  require(x.dim() == 4 && x.size(1) == geometry.channels(where), "x must be (images, channels, height, width)");
  require(!bias || (bias.dim() == 1 && bias.size(0) == where.m1 * where.bm), "bias must be (out_channels,)");
  const ConvShape shape = geometry.of(x.size(0), x.size(2), x.size(3), false);
  const std::int32_t dtype = x.dtype(), type = computed_in(dtype);
  prepare(dtype, type, x, values, bias);
  Tensor y = empty({shape.images, where.m1 * where.bm, shape.out_height, shape.out_width}, type);
  in_type(type, [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().conv2d(where, shape, x.data<T>(), values.data<T>(), bias.data<T>(), y.data<T>(),
                        threads_for(shape.images * shape.out_height * shape.out_width * values.numel()));
  });
  stack[0] = std::move(y).to(dtype).release();
}

// (Tensor dy, Tensor values, *index, *geometry) -> Tensor
inline void packed_conv2d_grad_input(StableIValue* stack, std::uint64_t, std::uint64_t) {
  Arguments arguments(stack);
  Tensor dy = arguments.tensor(), values = arguments.tensor();
  const Index index(arguments);
  const Geometry geometry(arguments);
  require(values.dim() == 3 && values.size(0) == index.capacity(), "values must be (capacity, bm, bn)");
  const PackedIndex where = index.of(values.size(1), values.size(2));
  const int64_t channels = geometry.channels(where);
  require(dy.dim() == 4 && dy.size(1) == where.m1 * where.bm, "dy must be (images, out_channels, height, width)");
  const ConvShape shape = geometry.of(dy.size(0), dy.size(2), dy.size(3), true);
  const std::int32_t dtype = dy.dtype(), type = computed_in(dtype);
  prepare(dtype, type, dy, values);
  Tensor dx = empty({shape.images, channels, shape.height, shape.width}, type);
  in_type(type, [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().conv2d_grad_input(where, shape, dy.data<T>(), values.data<T>(), dx.data<T>(),
                                   threads_for(shape.images * shape.height * shape.width * values.numel()));
  });
  stack[0] = std::move(dx).to(dtype).release();
}

// (Tensor dy, Tensor x, *index, *geometry) -> Tensor
inline void packed_conv2d_grad_values(StableIValue* stack, std::uint64_t, std::uint64_t) {
  Arguments arguments(stack);
  Tensor dy = arguments.tensor(), x = arguments.tensor();
  const Index index(arguments);
  const Geometry geometry(arguments);
  const int64_t m1 = index.block_rows(), n1 = index.block_cols();
  require(dy.dim() == 4 && x.dim() == 4 && dy.size(0) == x.size(0) && dy.size(1) % m1 == 0 &&
              x.size(1) * geometry.kernel_height * geometry.kernel_width % n1 == 0,
          "dy and x must be as many images, with the channels of the index's blocks");
  const PackedIndex where = index.of(dy.size(1) / m1, x.size(1) * geometry.kernel_height * geometry.kernel_width / n1);
  require(geometry.channels(where) == x.size(1), "x must have the channels of the index's blocks");
  const ConvShape shape = geometry.of(x.size(0), x.size(2), x.size(3), false);
  require(dy.size(2) == shape.out_height && dy.size(3) == shape.out_width, "dy must have the size of the convolution's result");
  const std::int32_t dtype = dy.dtype(), type = computed_in(dtype);
  prepare(dtype, type, dy, x);
  Tensor dvalues = empty({index.capacity(), where.bm, where.bn}, type);
  in_type(type, [&](auto zero) {
    using T = decltype(zero);
    kernels<T>().conv2d_grad_values(where, shape, dy.data<T>(), x.data<T>(), dvalues.data<T>(), index.capacity(),
                                    threads_for(shape.images * shape.out_height * shape.out_width * dvalues.numel()));
  });
  stack[0] = std::move(dvalues).to(dtype).release();
}

}  // namespace kronblocks
