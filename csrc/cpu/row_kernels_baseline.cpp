// The row kernels for any machine: what the compiler targets by default (SSE2 on x86-64, NEON on ARM).
#include "row_kernels_includes.h"

#define AMN_KERNELS baseline_kernels
#define AMN_VECTOR_BYTES 16
#include "row_kernels.inl"
