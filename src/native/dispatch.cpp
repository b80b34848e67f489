// The library's C functions: they take the kernels of the best instruction set that this machine has.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

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

#ifdef KRONBLOCKS_HAS_avx512bf16
namespace avx512bf16 {
extern const KernelTable table;
}
#endif

namespace {

// the kernels of an instruction set, or null where they were not compiled or this machine cannot run them
const KernelTable* find(const char* name) {
#ifdef KRONBLOCKS_HAS_avx512
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  if (!std::strcmp(name, "avx512") && has_avx512) return &avx512::table;
#endif
#ifdef KRONBLOCKS_HAS_avx512bf16
  if (!std::strcmp(name, "avx512bf16") && has_avx512 && __builtin_cpu_supports("avx512bf16")) return &avx512bf16::table;
#endif
#ifdef KRONBLOCKS_HAS_avx2
  if (!std::strcmp(name, "avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &avx2::table;
#endif
  return std::strcmp(name, "baseline") ? nullptr : &baseline::table;
}

// the one that KRONBLOCKS_ISA names in the environment, or the best that there is
const KernelTable* choose() {
  const char* wanted = std::getenv("KRONBLOCKS_ISA");
  if (const KernelTable* named = find(wanted ? wanted : "")) return named;
  for (const char* name : {"avx512bf16", "avx512", "avx2"})
    if (const KernelTable* found = find(name)) return found;
  return &baseline::table;
}

std::atomic<const KernelTable*>& chosen() {
  static std::atomic<const KernelTable*> current{choose()};
  return current;
}

const KernelTable& table() { return *chosen().load(std::memory_order_relaxed); }

template <class T>
const Kernels<T>& kernels();
template <>
const Kernels<float>& kernels<float>() {
  return *table().f32;
}
template <>
const Kernels<double>& kernels<double>() {
  return *table().f64;
}
template <>
const Kernels<Bf16>& kernels<Bf16>() {
  return *table().bf16;
}

}  // namespace

EXPORT int kb_abi() { return 2; }
EXPORT const char* kb_isa() { return table().name; }

// Take the kernels of a named instruction set from now on; 0 if this machine or this build has not got them.
EXPORT int kb_use_isa(const char* name) {
  const KernelTable* found = find(name);
  if (found) chosen().store(found);
  return found != nullptr;
}

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
FOR_TYPE(bf16, Bf16)
