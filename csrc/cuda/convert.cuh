// Numbers and their bits. The one header that needs a twin for the CPU: conversions to and from 16 bits are
// instructions of the GPU.
#pragma once

#include <cstdint>

#include "launch.h"

#ifdef AMN_SIMT
#include <bit>
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace amn::cuda {

#ifdef AMN_SIMT

inline float float_of_bits(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t bits_of(float x) { return std::bit_cast<uint32_t>(x); }
inline double double_of_bits(uint32_t low, uint32_t high) { return std::bit_cast<double>(uint64_t{high} << 32 | low); }
inline uint2 bits_of(double x) {
  const auto bits = std::bit_cast<uint64_t>(x);
  return make_uint2(static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32));
}
inline float float_of_half(uint16_t bits) { return std::bit_cast<_Float16>(bits); }
inline uint16_t half_of(float x) { return std::bit_cast<uint16_t>(static_cast<_Float16>(x)); }
inline uint16_t bfloat16_of(float x) {  // to nearest, ties to even
  const uint32_t bits = bits_of(x);
  if (x != x) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#else

__device__ inline float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }
__device__ inline uint32_t bits_of(float x) { return __float_as_uint(x); }
__device__ inline double double_of_bits(uint32_t low, uint32_t high) { return __hiloint2double(high, low); }
__device__ inline uint2 bits_of(double x) {
  return make_uint2(static_cast<uint32_t>(__double2loint(x)), static_cast<uint32_t>(__double2hiint(x)));
}
__device__ inline float float_of_half(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
__device__ inline uint16_t half_of(float x) { return __half_as_ushort(__float2half_rn(x)); }
__device__ inline uint16_t bfloat16_of(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }

#endif

}  // namespace amn::cuda
