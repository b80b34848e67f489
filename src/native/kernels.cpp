// The kernels for one instruction set: compiled several times, with KRONBLOCKS_ISA as the namespace.
#include "api.h"
#include "factored.h"
#include "live_blocks.h"
#include "packed.h"
#include "packed_gradient.h"

namespace KRONBLOCKS_ISA {

#define KRONBLOCKS_TEXT(x) #x
#define KRONBLOCKS_NAME(x) KRONBLOCKS_TEXT(x)

template <class T>
constexpr Kernels<T> kernels() {
  return {packed_linear<T>, packed_grad_input<T>, packed_grad_values<T>,       kron_linear<T>,
          kron_backward<T>, live_blocks<T>,       live_blocks_backward<T>};
}

extern const Kernels<Bf16> bf16_kernels;
const Kernels<Bf16> bf16_kernels = kernels<Bf16>();

#ifndef KRONBLOCKS_SAME_FLOATS
extern const Kernels<float> f32_kernels;
const Kernels<float> f32_kernels = kernels<float>();
extern const Kernels<double> f64_kernels;
const Kernels<double> f64_kernels = kernels<double>();
#else
}
// this instruction set adds nothing for float and double
namespace KRONBLOCKS_SAME_FLOATS {
extern const Kernels<float> f32_kernels;
extern const Kernels<double> f64_kernels;
}
namespace KRONBLOCKS_ISA {
using KRONBLOCKS_SAME_FLOATS::f32_kernels;
using KRONBLOCKS_SAME_FLOATS::f64_kernels;
#endif

extern const KernelTable table;
const KernelTable table = {KRONBLOCKS_NAME(KRONBLOCKS_ISA), &f32_kernels, &f64_kernels, &bf16_kernels};

}  // namespace KRONBLOCKS_ISA
