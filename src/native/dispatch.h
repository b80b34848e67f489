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

template <class X>
PackedLinearInt8<X> int8_kernel();
template <>
PackedLinearInt8<float> int8_kernel<float>();
template <>
PackedLinearInt8<Bf16> int8_kernel<Bf16>();

}  // namespace kronblocks
