// SPDX-License-Identifier: Apache-2.0
//
// A warp's work on rows. A row is read in words of Word bytes: 16 where the rows of the program's
// arrays are multiples of that, else one element. Arithmetic is in float32, in a fixed order,
// without fused multiply-add, rounded once: the same bits as csrc/cpu/rows/rows.h.
//
// Rows of a message are written while the kernel runs, by another device or the copy engine: they
// are read through L2 (ld.cg), never through the read-only path.
#ifndef SMFREE_CSRC_CUDA_KERNELS_ROWS_CUH_
#define SMFREE_CSRC_CUDA_KERNELS_ROWS_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "csrc/cuda/host/kernels.h"
#include "csrc/cuda/kernels/messages.cuh"

namespace smfree::cuda {

constexpr int32_t kUnroll = 4;  // words in flight per thread
// The same where words are summed, of so many terms at once: float32 sums take the registers.
constexpr int32_t kSumUnroll = 1;
constexpr int32_t kTermsAtOnce = 4;

__device__ inline float ToFloat(float v) { return v; }
__device__ inline float ToFloat(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline float ToFloat(__half v) { return __half2float(v); }
template <typename T>
__device__ T FromFloat(float v);
template <>
__device__ inline float FromFloat<float>(float v) { return v; }
template <>
__device__ inline __nv_bfloat16 FromFloat<__nv_bfloat16>(float v) { return __float2bfloat16_rn(v); }
template <>
__device__ inline __half FromFloat<__half>(float v) { return __float2half_rn(v); }

// pick(T{}, Word{}) returns the kernel for elements T in words Word: the one for rows of `dtype` in
// words of 16 bytes, or of one element.
template <typename Pick>
auto KernelFor(DType dtype, int32_t word_bytes, const Pick& pick) {
  const bool wide = word_bytes == 16;
  switch (dtype) {
    case DType::kF32: return wide ? pick(float{}, uint4{}) : pick(float{}, uint32_t{});
    case DType::kBF16:
      return wide ? pick(__nv_bfloat16{}, uint4{}) : pick(__nv_bfloat16{}, uint16_t{});
    default: return wide ? pick(__half{}, uint4{}) : pick(__half{}, uint16_t{});
  }
}

// All kernels that KernelFor can return.
template <typename Pick>
cudaError_t LoadKernelsFor(const Pick& pick) {
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    for (const int32_t word_bytes : {16, 1}) {
      const cudaError_t error = LoadKernels({Kernel(KernelFor(dtype, word_bytes, pick))});
      if (error != cudaSuccess) return error;
    }
  }
  return cudaSuccess;
}

// The elements of a word.
template <typename T, typename Word>
union Elements {
  static constexpr int32_t kCount = sizeof(Word) / sizeof(T);
  Word word;
  T element[kCount];
  __device__ Elements() {}
};

// The words of a row that this thread works on: of piece `piece` of `pieces`.
struct Words {
  int32_t begin, end;
  __device__ Words(int64_t row_bytes, int32_t word_bytes, int32_t piece, int32_t pieces) {
    const auto words = static_cast<int32_t>(row_bytes / word_bytes);
    begin = static_cast<int32_t>(int64_t{words} * piece / pieces) +
            static_cast<int32_t>(threadIdx.x % kWarp);
    end = static_cast<int32_t>(int64_t{words} * (piece + 1) / pieces);
  }
};

// Each row of to[0 … count) = row.
template <typename Word>
__device__ void CopyRow(const Words& words, const char* row, char* const* to, int32_t count) {
  for (int32_t v = words.begin; v < words.end; v += kUnroll * kWarp) {
    Word in[kUnroll];
#pragma unroll
    for (int32_t u = 0; u < kUnroll; ++u) {
      const int32_t at = v + u * kWarp;
      if (at < words.end) in[u] = __ldcg(reinterpret_cast<const Word*>(row) + at);
    }
    for (int32_t i = 0; i < count; ++i) {
#pragma unroll
      for (int32_t u = 0; u < kUnroll; ++u) {
        const int32_t at = v + u * kWarp;
        if (at < words.end) reinterpret_cast<Word*>(to[i])[at] = in[u];
      }
    }
  }
}

template <typename Word>
__device__ void FillRow(const Words& words, char* row, Word value) {
  for (int32_t v = words.begin; v < words.end; v += kWarp) reinterpret_cast<Word*>(row)[v] = value;
}

// A word of NaNs.
template <typename T, typename Word>
__device__ Word NaNs() {
  Elements<T, Word> nan;
  const float quiet = __int_as_float(0x7fc00000);
  for (int32_t e = 0; e < nan.kCount; ++e) nan.element[e] = FromFloat<T>(quiet);
  return nan.word;
}

template <typename Word>
__device__ Word Zeros() {
  return Word{};
}

struct Term {
  const char* row;
  float weight;
};

// out = sum of weight * row over the terms in their order; zero without terms.
template <typename T, typename Word>
__device__ void SumRows(const Words& words, char* out, const Term* terms, int32_t count) {
  using E = Elements<T, Word>;
  if (count == 0) return FillRow(words, out, Zeros<Word>());
  for (int32_t v = words.begin; v < words.end; v += kSumUnroll * kWarp) {
    float sum[kSumUnroll][E::kCount];
    for (int32_t i = 0; i < count; i += kTermsAtOnce) {
      E in[kTermsAtOnce][kSumUnroll];
#pragma unroll
      for (int32_t j = 0; j < kTermsAtOnce; ++j) {
        if (i + j >= count) continue;
        const auto* const row = reinterpret_cast<const Word*>(terms[i + j].row);
#pragma unroll
        for (int32_t u = 0; u < kSumUnroll; ++u) {
          const int32_t at = v + u * kWarp;
          if (at < words.end) in[j][u].word = __ldcg(row + at);
        }
      }
#pragma unroll
      for (int32_t j = 0; j < kTermsAtOnce; ++j) {
        if (i + j >= count) continue;
        const float weight = terms[i + j].weight;
#pragma unroll
        for (int32_t u = 0; u < kSumUnroll; ++u) {
#pragma unroll
          for (int32_t e = 0; e < E::kCount; ++e) {
            const float term = __fmul_rn(ToFloat(in[j][u].element[e]), weight);
            sum[u][e] = i + j == 0 ? term : __fadd_rn(sum[u][e], term);
          }
        }
      }
    }
#pragma unroll
    for (int32_t u = 0; u < kSumUnroll; ++u) {
      const int32_t at = v + u * kWarp;
      E rounded;
#pragma unroll
      for (int32_t e = 0; e < E::kCount; ++e) rounded.element[e] = FromFloat<T>(sum[u][e]);
      if (at < words.end) reinterpret_cast<Word*>(out)[at] = rounded.word;
    }
  }
}

// out = weight * row; returns <y, row> to the whole warp: partial sums per thread, then a
// butterfly.
template <typename T, typename Word>
__device__ float ScaleRowAndDot(const Words& words, char* out, const char* row, const char* y,
                                float weight) {
  using E = Elements<T, Word>;
  float dot = 0.0f;
  for (int32_t v = words.begin; v < words.end; v += kSumUnroll * kWarp) {
    E in[kSumUnroll], other[kSumUnroll];
#pragma unroll
    for (int32_t u = 0; u < kSumUnroll; ++u) {
      const int32_t at = v + u * kWarp;
      if (at >= words.end) continue;
      in[u].word = __ldcg(reinterpret_cast<const Word*>(row) + at);
      other[u].word = __ldcg(reinterpret_cast<const Word*>(y) + at);
    }
#pragma unroll
    for (int32_t u = 0; u < kSumUnroll; ++u) {
      const int32_t at = v + u * kWarp;
      if (at >= words.end) continue;
      E scaled;
#pragma unroll
      for (int32_t e = 0; e < E::kCount; ++e) {
        const float value = ToFloat(in[u].element[e]);
        dot = __fadd_rn(dot, __fmul_rn(ToFloat(other[u].element[e]), value));
        scaled.element[e] = FromFloat<T>(__fmul_rn(value, weight));
      }
      reinterpret_cast<Word*>(out)[at] = scaled.word;
    }
  }
  for (int32_t distance = kWarp / 2; distance > 0; distance /= 2) {
    dot = __fadd_rn(dot, __shfl_xor_sync(~0u, dot, distance));
  }
  return dot;
}

}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_KERNELS_ROWS_CUH_
