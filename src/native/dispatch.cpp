// The library's C functions: they take the kernels of the best instruction set that this machine has.
#include <cstdlib>
#include <cstring>

#include "api.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace baseline {
extern const KernelTable table;
}
#ifdef KRONBLOCKS_HAS_avx2
namespace avx2 {
extern const KernelTable table;
}
#endif
#ifdef KRONBLOCKS_HAS_avx512
namespace avx512 {
extern const KernelTable table;
}
#endif

namespace {

// KRONBLOCKS_ISA=baseline|avx2|avx512 in the environment sets an upper limit
bool allowed(const char* name) {
  static const char* const order[] = {"baseline", "avx2", "avx512"};
  const char* limit = std::getenv("KRONBLOCKS_ISA");
  int wanted = 2, rank = 0;
  for (int i = 0; i < 3; ++i) {
    if (limit && !std::strcmp(limit, order[i])) wanted = i;
    if (!std::strcmp(name, order[i])) rank = i;
  }
  return rank <= wanted;
}

const KernelTable& choose() {
#ifdef KRONBLOCKS_HAS_avx512
  if (allowed("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw"))
    return avx512::table;
#endif
#ifdef KRONBLOCKS_HAS_avx2
  if (allowed("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::table;
#endif
  (void)allowed;
  return baseline::table;
}

const KernelTable& table() {
  static const KernelTable& chosen = choose();
  return chosen;
}

template <class T>
const Kernels<T>& kernels();
template <>
const Kernels<float>& kernels<float>() {
  return table().f32;
}
template <>
const Kernels<double>& kernels<double>() {
  return table().f64;
}

}  // namespace

EXPORT int kb_abi() { return 1; }
EXPORT const char* kb_isa() { return table().name; }

#define FOR_TYPE(suffix, T)                                                                                                     \
  EXPORT void kb_packed_linear_##suffix(const PackedIndex* index, const T* x, std::int64_t rows, const T* values,               \
                                        const T* bias, T* y, int threads) {                                                     \
    kernels<T>().packed_linear(*index, x, rows, values, bias, y, threads);                                                      \
  }                                                                                                                             \
  EXPORT void kb_packed_grad_input_##suffix(const PackedIndex* index, const T* dy, std::int64_t rows, const T* values, T* dx,   \
                                            int threads) {                                                                      \
    kernels<T>().packed_grad_input(*index, dy, rows, values, dx, threads);                                                      \
  }                                                                                                                             \
  EXPORT void kb_packed_grad_values_##suffix(const PackedIndex* index, const T* dy, const T* x, std::int64_t rows, T* dvalues,  \
                                             std::int64_t capacity, int threads) {                                              \
    kernels<T>().packed_grad_values(*index, dy, x, rows, dvalues, capacity, threads);                                           \
  }                                                                                                                             \
  EXPORT void kb_kron_linear_##suffix(const KronShape* shape, int tile_first, const T* x, std::int64_t rows, const T* coeff,    \
                                      const T* tiles, const std::uint8_t* live, const T* bias, T* y, int threads) {             \
    kernels<T>().kron_linear(*shape, tile_first, x, rows, coeff, tiles, live, bias, y, threads);                                \
  }                                                                                                                             \
  EXPORT void kb_kron_backward_##suffix(const KronShape* shape, int tile_first, const T* dy, const T* x, std::int64_t rows,     \
                                        const T* coeff, const T* tiles, const std::uint8_t* live, T* dx, T* dcoeff, T* dtiles,  \
                                        int threads) {                                                                          \
    kernels<T>().kron_backward(*shape, tile_first, dy, x, rows, coeff, tiles, live, dx, dcoeff, dtiles, threads);               \
  }                                                                                                                             \
  EXPORT void kb_live_blocks_##suffix(const PackedIndex* index, const KronShape* shape, const T* coeff, const T* tiles,         \
                                      T* values, std::int64_t capacity, int threads) {                                          \
    kernels<T>().live_blocks(*index, *shape, coeff, tiles, values, capacity, threads);                                          \
  }                                                                                                                             \
  EXPORT void kb_live_blocks_backward_##suffix(const PackedIndex* index, const KronShape* shape, const T* dvalues,              \
                                               const T* coeff, const T* tiles, T* dcoeff, T* dtiles, int threads) {             \
    kernels<T>().live_blocks_backward(*index, *shape, dvalues, coeff, tiles, dcoeff, dtiles, threads);                          \
  }

FOR_TYPE(f32, float)
FOR_TYPE(f64, double)
