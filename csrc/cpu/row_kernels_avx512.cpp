// The row kernels for x86-64 with AVX-512. The headers come before the target is raised: their inline functions
// may be merged with those of other files, which run on any machine.
#if defined(__x86_64__)
#include "row_kernels_includes.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif

#define AMN_KERNELS avx512_kernels
#define AMN_VECTOR_BYTES 64
#include "row_kernels.inl"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
