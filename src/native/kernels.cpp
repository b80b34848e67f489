// The kernels for one instruction set: compiled several times, with KRONBLOCKS_ISA as the namespace.
#include "api.h"
#include "conv.h"
#include "factored.h"
#include "live_blocks.h"
#include "packed.h"
#include "packed_gradient.h"
#include "packed_int8.h"

namespace KRONBLOCKS_ISA {

#define KRONBLOCKS_TEXT(x) #x
#define KRONBLOCKS_NAME(x) KRONBLOCKS_TEXT(x)

template <class T>
constexpr Kernels<T> kernels() {
  return {packed_linear<T>, packed_grad_input<T>, packed_grad_values<T>,   kron_linear<T>, kron_backward<T>,
          live_blocks<T>,   live_blocks_backward<T>, conv2d<T>, conv2d_grad_input<T>, conv2d_grad_values<T>};
}

// An instruction set that adds nothing for a type of numbers has the kernels of another one: KRONBLOCKS_FLOATS and so on name it.
extern const Kernels<float> f32_kernels;
extern const Kernels<double> f64_kernels;
extern const Kernels<Bf16> bf16_kernels;
extern const Int8Kernels int8_kernels;

#ifndef KRONBLOCKS_FLOATS
#define KRONBLOCKS_FLOATS KRONBLOCKS_ISA
const Kernels<float> f32_kernels = kernels<float>();
const Kernels<double> f64_kernels = kernels<double>();
#endif
#ifndef KRONBLOCKS_BF16
#define KRONBLOCKS_BF16 KRONBLOCKS_ISA
const Kernels<Bf16> bf16_kernels = kernels<Bf16>();
#endif
#ifndef KRONBLOCKS_INT8
#define KRONBLOCKS_INT8 KRONBLOCKS_ISA
const Int8Kernels int8_kernels = {packed_linear_int8<float>, packed_linear_int8<Bf16>};
#endif

}  // namespace KRONBLOCKS_ISA

namespace KRONBLOCKS_FLOATS {
extern const Kernels<float> f32_kernels;
extern const Kernels<double> f64_kernels;
}
namespace KRONBLOCKS_BF16 {
extern const Kernels<Bf16> bf16_kernels;
}
namespace KRONBLOCKS_INT8 {
extern const Int8Kernels int8_kernels;
}

namespace KRONBLOCKS_ISA {
extern const KernelTable table;
const KernelTable table = {KRONBLOCKS_NAME(KRONBLOCKS_ISA), &KRONBLOCKS_FLOATS::f32_kernels, &KRONBLOCKS_FLOATS::f64_kernels,
                           &KRONBLOCKS_BF16::bf16_kernels, &KRONBLOCKS_INT8::int8_kernels};
}  // namespace KRONBLOCKS_ISA
