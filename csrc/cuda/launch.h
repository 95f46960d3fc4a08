// All that the kernels need besides CUDA C++ itself: how a kernel is launched and how static shared memory is declared.
// With AMN_SIMT the same sources are compiled by a plain C++ compiler and run on the CPU, as a test (tests/simt).
#pragma once

#ifdef AMN_SIMT
#include "simt.h"
#else
#include <cuda_runtime.h>

#define AMN_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
#define AMN_SHARED(type, name, count) __shared__ type name[count]
#endif
