// Which build of the kernels computes: that for the best instruction set of this machine, unless another one is asked for.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "dispatch.h"

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
#ifdef KRONBLOCKS_HAS_avx512vnni
namespace avx512vnni {
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
#ifdef KRONBLOCKS_HAS_avx512vnni
  const bool has_vnni = has_avx512 && __builtin_cpu_supports("avx512vnni");
  if (!std::strcmp(name, "avx512vnni") && has_vnni) return &avx512vnni::table;
#endif
#ifdef KRONBLOCKS_HAS_avx512bf16
  if (!std::strcmp(name, "avx512bf16") && has_vnni && __builtin_cpu_supports("avx512bf16")) return &avx512bf16::table;
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
  for (const char* name : {"avx512bf16", "avx512vnni", "avx512", "avx2"})
    if (const KernelTable* found = find(name)) return found;
  return &baseline::table;
}

std::atomic<const KernelTable*>& chosen() {
  static std::atomic<const KernelTable*> current{choose()};
  return current;
}

const KernelTable& table() { return *chosen().load(std::memory_order_relaxed); }

}  // namespace

namespace kronblocks {

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

template <>
PackedLinearInt8<float> int8_kernel<float>() {
  return table().int8->f32;
}
template <>
PackedLinearInt8<Bf16> int8_kernel<Bf16>() {
  return table().int8->bf16;
}

}  // namespace kronblocks

EXPORT const char* kb_isa() { return table().name; }

// Take the kernels of a named instruction set from now on; 0 if this machine or this build has not got them.
EXPORT int kb_use_isa(const char* name) {
  const KernelTable* found = find(name);
  if (found) chosen().store(found);
  return found != nullptr;
}
