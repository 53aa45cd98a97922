// SPDX-License-Identifier: Apache-2.0
// CHECK(call): ends the program with what CUDA says if the call fails.
#ifndef BENCHMARKS_CUDA_CHECK_H_
#define BENCHMARKS_CUDA_CHECK_H_

#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>

#define CHECK(call)                                                                     \
  do {                                                                                  \
    cudaError_t status = (call);                                                        \
    if (status != cudaSuccess) {                                                        \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, cudaGetErrorString(status)); \
      std::exit(1);                                                                     \
    }                                                                                   \
  } while (0)

#endif  // BENCHMARKS_CUDA_CHECK_H_
