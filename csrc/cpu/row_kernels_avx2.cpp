// The row kernels for x86-64 with AVX2, FMA and F16C. The headers come before the target is raised: their inline
// functions may be merged with those of other files, which run on any machine.
#if defined(__x86_64__)
#include "row_kernels_includes.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define AMN_KERNELS avx2_kernels
#define AMN_VECTOR_BYTES 32
#include "row_kernels.inl"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
