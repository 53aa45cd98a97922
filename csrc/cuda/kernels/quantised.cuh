// SPDX-License-Identifier: Apache-2.0
//
// A warp's work on one leaf of rows that is quantised on the wire (row_format.h): in a message it
// is values of 8 bits and a scale per block, in the arrays of the program elements T, 16 bytes of
// which are a word here. A block is a few words, of neighbouring threads of one warp.
#ifndef SMFREE_CSRC_CUDA_KERNELS_QUANTISED_CUH_
#define SMFREE_CSRC_CUDA_KERNELS_QUANTISED_CUH_

#include <cstdint>
#include <type_traits>

#include "csrc/cuda/kernels/rows.cuh"

namespace smfree::cuda {

constexpr int32_t kQuantisedUnroll = 2;  // as kUnroll: numbers take more registers than words

// `n` is a power of two.
__device__ inline int32_t Log2(int32_t n) { return 31 - __clz(n); }

template <typename T, DType kValues>
struct Quantised {
  using InProgram = Plain<T, uint4>;
  static constexpr int32_t kCount = InProgram::kCount;
  static constexpr bool kByWholeWarp = true;
  using Bytes = std::conditional_t<kCount == 8, uint2, uint32_t>;
  // The values of a word, and the scale of its block.
  struct Word {
    Bytes bytes;
    float scale;
  };
  union Pairs {
    Bytes bytes;
    uint16_t pair[kCount / 2];
  };

  int32_t block_bits;  // of the number of words in a block, a power of two
  int32_t scales_offset;
  bool power_of_two;

  __device__ Quantised(const Leaf& leaf, const Quantisation& quantisation)
      : block_bits(Log2(quantisation.block / kCount)),
        scales_offset(static_cast<int32_t>(leaf.scales_offset())),
        power_of_two(quantisation.power_of_two) {}

  __device__ Words Cut(const Leaf& leaf, int32_t piece, int32_t pieces) const {
    return Words::OfGroups(leaf.width / kCount, 1 << block_bits, piece, pieces);
  }

  __device__ Word Load(const char* row, int32_t at) const {
    return {__ldcg(reinterpret_cast<const Bytes*>(row) + at),
            __ldcg(reinterpret_cast<const float*>(row + scales_offset) + (at >> block_bits))};
  }
  __device__ static void Values(const Word& word, float (&values)[kCount]) {
    Pairs in;
    in.bytes = word.bytes;
#pragma unroll
    for (int32_t i = 0; i < kCount / 2; ++i) {
      const float2 pair = FloatsOf<kValues>(in.pair[i]);
      values[2 * i] = __fmul_rn(pair.x, word.scale);
      values[2 * i + 1] = __fmul_rn(pair.y, word.scale);
    }
  }

  // The largest magnitude, as its bits: these are in order, and NaN is above infinity.
  __device__ static uint32_t MostOf(const float (&values)[kCount]) {
    uint32_t most = __float_as_uint(kLeastMagnitude);
#pragma unroll
    for (int32_t e = 0; e < kCount; ++e) {
      most = max(most, __float_as_uint(values[e]) & 0x7fffffffu);
    }
    return most;
  }
  // From those of words to those of their blocks: by whole warps.
  template <int32_t kWords>
  __device__ void MeetInBlocks(uint32_t (&most)[kWords]) const {
    for (int32_t distance = (1 << block_bits) / 2; distance > 0; distance /= 2) {
#pragma unroll
      for (int32_t u = 0; u < kWords; ++u) {
        most[u] = max(most[u], __shfl_xor_sync(~0u, most[u], distance));
      }
    }
  }
  __device__ Word Of(const float (&values)[kCount], uint32_t most) const {
    constexpr uint32_t kInfinity = 0x7f800000;
    constexpr float kPerMost = 1.0f / LargestValue(kValues);
    float scale = __fmul_rn(__uint_as_float(most), kPerMost);
    if (power_of_two) {  // scales are far from zero: no subnormal numbers
      scale = __uint_as_float((__float_as_uint(scale) + 0x7fffffu) & kInfinity);
    }
    if (most >= kInfinity) scale = __uint_as_float(0x7fc00000);  // NaN, and so all values
    const float inverse = __frcp_rn(scale);
    Pairs out;
#pragma unroll
    for (int32_t i = 0; i < kCount / 2; ++i) {
      out.pair[i] = Saturated<kValues>(__fmul_rn(values[2 * i], inverse),
                                       __fmul_rn(values[2 * i + 1], inverse));
    }
    return {out.bytes, scale};
  }
  __device__ Word Of(const float (&values)[kCount]) const {
    uint32_t most[] = {MostOf(values)};
    MeetInBlocks(most);
    return Of(values, most[0]);
  }
  __device__ void Store(char* row, int32_t at, const Word& word) const {
    reinterpret_cast<Bytes*>(row)[at] = word.bytes;
    const int32_t block = at >> block_bits;
    if (block << block_bits == at) {
      reinterpret_cast<float*>(row + scales_offset)[block] = word.scale;
    }
  }
};

// Each row of to(0 … count) = row, from the program's arrays to messages.
template <typename Codec, typename To>
__device__ void QuantiseRow(const Codec& codec, const Words& words, const char* row, const To& to,
                            int32_t count) {
  using InProgram = typename Codec::InProgram;
  const auto warp_lane = static_cast<int32_t>(threadIdx.x % kWarp);
  for (int32_t v = words.begin; v < words.end + warp_lane; v += kQuantisedUnroll * kWarp) {
    typename InProgram::Word in[kQuantisedUnroll];
#pragma unroll
    for (int32_t u = 0; u < kQuantisedUnroll; ++u) {
      const int32_t at = v + u * kWarp;
      if (at < words.end) in[u] = InProgram::Load(row, at);
    }
    float values[Codec::kCount];
    uint32_t most[kQuantisedUnroll];
#pragma unroll
    for (int32_t u = 0; u < kQuantisedUnroll; ++u) {
      InProgram::Values(in[u], values);
      most[u] = Codec::MostOf(values);
    }
    codec.MeetInBlocks(most);
    typename Codec::Word out[kQuantisedUnroll];
#pragma unroll
    for (int32_t u = 0; u < kQuantisedUnroll; ++u) {
      InProgram::Values(in[u], values);
      out[u] = codec.Of(values, most[u]);
    }
    for (int32_t i = 0; i < count; ++i) {
#pragma unroll
      for (int32_t u = 0; u < kQuantisedUnroll; ++u) {
        const int32_t at = v + u * kWarp;
        if (at < words.end) codec.Store(to(i), at, out[u]);
      }
    }
  }
}

// And from a message to the program's arrays.
template <typename Codec, typename To>
__device__ void DequantiseRow(const Codec& codec, const Words& words, const char* row,
                              const To& to, int32_t count) {
  using InProgram = typename Codec::InProgram;
  for (int32_t v = words.begin; v < words.end; v += kQuantisedUnroll * kWarp) {
    typename Codec::Word in[kQuantisedUnroll];
#pragma unroll
    for (int32_t u = 0; u < kQuantisedUnroll; ++u) {
      const int32_t at = v + u * kWarp;
      if (at < words.end) in[u] = codec.Load(row, at);
    }
    typename InProgram::Word out[kQuantisedUnroll];
#pragma unroll
    for (int32_t u = 0; u < kQuantisedUnroll; ++u) {
      float values[Codec::kCount];
      Codec::Values(in[u], values);
      out[u] = InProgram::Of(values);
    }
    for (int32_t i = 0; i < count; ++i) {
#pragma unroll
      for (int32_t u = 0; u < kQuantisedUnroll; ++u) {
        const int32_t at = v + u * kWarp;
        if (at < words.end) InProgram::Store(to(i), at, out[u]);
      }
    }
  }
}

}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_KERNELS_QUANTISED_CUH_
