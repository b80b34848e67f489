// The kernels of the best instruction set that this machine has.
#pragma once

#include "api.h"

namespace kronblocks {

template <class T>
const Kernels<T>& kernels();
template <>
const Kernels<float>& kernels<float>();
template <>
const Kernels<double>& kernels<double>();
template <>
const Kernels<Bf16>& kernels<Bf16>();

}  // namespace kronblocks
