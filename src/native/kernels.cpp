// The kernels for one instruction set: compiled several times, with KRONBLOCKS_ISA as the namespace.
#include "api.h"
#include "factored.h"
#include "live_blocks.h"
#include "packed.h"

namespace KRONBLOCKS_ISA {

#define KRONBLOCKS_TEXT(x) #x
#define KRONBLOCKS_NAME(x) KRONBLOCKS_TEXT(x)

template <class T>
constexpr Kernels<T> kernels() {
  return {packed_linear<T>, packed_grad_input<T>, packed_grad_values<T>,       kron_linear<T>,
          kron_backward<T>, live_blocks<T>,       live_blocks_backward<T>};
}

extern const KernelTable table;
const KernelTable table = {KRONBLOCKS_NAME(KRONBLOCKS_ISA), kernels<float>(), kernels<double>()};

}  // namespace KRONBLOCKS_ISA
