// SPDX-License-Identifier: Apache-2.0
//
// Elements of rows as float32, and back. Branch-free integer arithmetic gives the same bits on
// every processor, and compilers make vectors of it. Rounding is to nearest, ties to even; a NaN
// stays a NaN.
#ifndef SMFREE_CSRC_CPU_ROWS_FLOATS_H_
#define SMFREE_CSRC_CPU_ROWS_FLOATS_H_

#include <cstdint>
#include <cstring>

namespace smfree::cpu {

#define SMFREE_INLINE inline __attribute__((always_inline))

template <typename To, typename From>
SMFREE_INLINE To BitCast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

SMFREE_INLINE float FromFloat32(uint32_t bits) { return BitCast<float>(bits); }
SMFREE_INLINE uint32_t ToFloat32(float value) { return BitCast<uint32_t>(value); }

// float32 of a bfloat16, whose bits are the low half of `bits`.
SMFREE_INLINE float FromBFloat16(uint32_t bits) {
  return BitCast<float>(bits << 16);
}

SMFREE_INLINE uint32_t ToBFloat16(float value) {
  const uint32_t bits = BitCast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40u;
  return (bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded;
}

// The magnitude of a float32 in a format whose bias is less by kBias and whose mantissas are kBits
// shorter. What is too large for that format comes out above its largest number.
template <uint32_t kBias, uint32_t kBits>
SMFREE_INLINE uint32_t RoundedMagnitude(uint32_t magnitude) {
  // Normal numbers: change the bias, round the bits that go. A carry may reach the exponent.
  const uint32_t rebiased = magnitude - (kBias << 23);
  const uint32_t below_half = (1u << (kBits - 1)) - 1u;
  const uint32_t normal = (rebiased + below_half + ((rebiased >> kBits) & 1u)) >> kBits;
  // Denormals: the sum with a power of two whose lowest mantissa bit is their unit has the units in
  // its low bits, rounded.
  const uint32_t power = (kBias + 1u + kBits) << 23;
  const float sum = BitCast<float>(magnitude) + BitCast<float>(power);
  const uint32_t denormal = BitCast<uint32_t>(sum) - power;
  return magnitude < (kBias + 1u) << 23 ? denormal : normal;
}

SMFREE_INLINE float FromFloat16(uint32_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16;
  const uint32_t magnitude = (bits & 0x7fffu) << 13;  // exponent and mantissa in place
  // The biases of the exponents differ by 112. The product is exact, also for denormals.
  const uint32_t finite = BitCast<uint32_t>(BitCast<float>(magnitude) * 0x1p112f);
  const uint32_t special = magnitude | 0x7f800000u;  // infinity or NaN
  return BitCast<float>(sign | (magnitude >= 0x0f800000u ? special : finite));
}

SMFREE_INLINE uint32_t ToFloat16(float value) {
  const uint32_t bits = BitCast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t infinity = 0x7c00u;
  const uint32_t quiet_nan = 0x7e00u | ((magnitude >> 13) & 0x1ffu);
  const uint32_t special = magnitude > 0x7f800000u ? quiet_nan : infinity;
  const uint32_t finite = RoundedMagnitude<112, 13>(magnitude);  // infinity, where it rounds so
  return sign | (magnitude >= 0x47800000u ? special : finite);  // 2^16 and above, infinity, NaN
}

}  // namespace smfree::cpu

#endif  // SMFREE_CSRC_CPU_ROWS_FLOATS_H_
