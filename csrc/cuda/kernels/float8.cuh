// SPDX-License-Identifier: Apache-2.0
//
// Floats of 8 bits: E4M3 (no infinities) and E5M2. GPUs from sm_89 on convert them by instructions,
// two at a time; cuda_fp8.h emulates those on others, with the same bits.
#ifndef SMFREE_CSRC_CUDA_KERNELS_FLOAT8_CUH_
#define SMFREE_CSRC_CUDA_KERNELS_FLOAT8_CUH_

#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "csrc/protocol/row_format.h"

namespace smfree::cuda {

template <DType kValues>
constexpr __nv_fp8_interpretation_t kFloat8 = kValues == DType::kE4M3 ? __NV_E4M3 : __NV_E5M2;

// Two values, exactly. The first one is in the low byte.
template <DType kValues>
__device__ float2 FloatsOf(uint16_t pair) {
  return __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(pair, kFloat8<kValues>)));
}

// Rounds to nearest even; what is beyond the largest value becomes that, NaN stays NaN.
template <DType kValues>
__device__ uint16_t Saturated(float first, float second) {
  return __nv_cvt_float2_to_fp8x2(make_float2(first, second), __NV_SATFINITE, kFloat8<kValues>);
}

// An element of the program's arrays.
template <DType kValues>
struct Float8 {
  uint8_t bits;

  // To nearest even. What rounds to more than the largest value is NaN in E4M3, infinite in E5M2.
  __device__ static Float8 Rounded(float v) {
    constexpr bool kHasInfinity = kValues == DType::kE5M2;
    const auto rounded = static_cast<uint8_t>(Saturated<kValues>(v, 0.0f));
    const bool overflows = kHasInfinity ? fabsf(v) >= 61440.0f : fabsf(v) > 464.0f;
    constexpr uint8_t kOverflow = kHasInfinity ? 0x7c : 0x7f;
    return {overflows ? static_cast<uint8_t>((rounded & 0x80) | kOverflow) : rounded};
  }
};

}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_KERNELS_FLOAT8_CUH_
