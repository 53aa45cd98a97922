// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/rows/quantised.h"

#include <cstdint>
#include <cstring>

#include "csrc/cpu/rows/elements.h"

namespace smfree::cpu {
namespace {

constexpr uint32_t kInfinity = 0x7f800000;

// The largest |x| of a block, as its bits: they are ordered as the numbers are, and those of NaNs
// come after infinity.
SMFREE_INLINE int32_t LargestMagnitude(const float* x, int64_t block) {
  int32_t most = 0;
  for (int64_t i = 0; i < block; ++i) {
    const int32_t magnitude = BitCast<int32_t>(x[i]) & 0x7fffffff;
    most = magnitude > most ? magnitude : most;
  }
  return most;
}

SMFREE_INLINE float ScaleOf(int32_t magnitude, float one_over_largest_value, bool power_of_two) {
  const auto least = BitCast<int32_t>(kLeastMagnitude);
  const float most = BitCast<float>(magnitude > least ? magnitude : least);
  const float scale = most * one_over_largest_value;
  const uint32_t bits = BitCast<uint32_t>(scale);
  // The carry of a mantissa that is not zero raises the exponent.
  const float rounded_up = BitCast<float>((bits + 0x7fffffu) & kInfinity);
  const float nan = BitCast<float>(kInfinity | 0x400000u);
  return BitCast<uint32_t>(magnitude) >= kInfinity ? nan : power_of_two ? rounded_up : scale;
}

template <typename As>
SMFREE_INLINE void Quantise(uint8_t* __restrict values, std::byte* scales,
                            const float* __restrict x, int64_t n, int64_t block,
                            float one_over_largest_value, bool power_of_two) {
  for (int64_t begin = 0; begin < n; begin += block) {
    const int32_t magnitude = LargestMagnitude(x + begin, block);
    const float scale = ScaleOf(magnitude, one_over_largest_value, power_of_two);
    const float inverse = 1.0f / scale;  // NaN makes all values NaN
    for (int64_t i = begin; i < begin + block; ++i) {
      As::Store(values + i, x[i] * inverse);
    }
    std::memcpy(scales, &scale, sizeof(scale));
    scales += sizeof(scale);
  }
}

template <typename As>
SMFREE_INLINE void AddQuantised(float* __restrict sums, const uint8_t* __restrict values,
                                const std::byte* scales, bool first, int64_t n, int64_t block) {
  for (int64_t begin = 0; begin < n; begin += block) {
    float scale;
    std::memcpy(&scale, scales, sizeof(scale));
    scales += sizeof(scale);
    for (int64_t i = begin; i < begin + block; ++i) {
      const float term = As::Load(values + i) * scale;
      sums[i] = first ? term : sums[i] + term;
    }
  }
}

}  // namespace

// The attribute applies to plain functions only, hence the list.
#define SMFREE_QUANTISED(As)                                                                      \
  SMFREE_VECTORISED void Quantise##As(uint8_t* values, std::byte* scales, const float* x,         \
                                      int64_t n, int64_t block, float one_over_largest_value,     \
                                      bool power_of_two) {                                        \
    Quantise<As>(values, scales, x, n, block, one_over_largest_value, power_of_two);              \
  }                                                                                               \
  SMFREE_VECTORISED void AddQuantised##As(float* sums, const uint8_t* values,                     \
                                          const std::byte* scales, bool first, int64_t n,         \
                                          int64_t block) {                                        \
    first ? AddQuantised<As>(sums, values, scales, true, n, block)                                \
          : AddQuantised<As>(sums, values, scales, false, n, block);                              \
  }

SMFREE_QUANTISED(AsE4M3)
SMFREE_QUANTISED(AsE5M2)

void QuantiseRow(const Quantisation& how, const Leaf& leaf, std::byte* to, const float* row) {
  const auto quantise = how.values == DType::kE4M3 ? &QuantiseAsE4M3 : &QuantiseAsE5M2;
  quantise(reinterpret_cast<uint8_t*>(to), to + leaf.scales_offset(), row, leaf.width, how.block,
           1.0f / LargestValue(how.values), how.power_of_two);
}

void AddQuantisedRow(const Quantisation& how, const Leaf& leaf, float* sums, const std::byte* row,
                     bool first) {
  const auto add = how.values == DType::kE4M3 ? &AddQuantisedAsE4M3 : &AddQuantisedAsE5M2;
  add(sums, reinterpret_cast<const uint8_t*>(row), row + leaf.scales_offset(), first, leaf.width,
      how.block);
}

}  // namespace smfree::cpu
