// SPDX-License-Identifier: Apache-2.0
//
// bfloat16 and float16 as bits. Branch-free integer arithmetic, so that loops over rows vectorise on
// any processor and give the same bits on all of them. Rounding is to nearest, ties to even; a NaN
// stays a NaN.
#ifndef SMFREE_CSRC_CPU_FLOATS_H_
#define SMFREE_CSRC_CPU_FLOATS_H_

#include <cstdint>
#include <cstring>

namespace smfree::cpu {

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

inline uint32_t BitsOf(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float FloatOf(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline float ToFloat(float value) { return value; }

inline float ToFloat(BFloat16 value) { return FloatOf(uint32_t{value.bits} << 16); }

inline float ToFloat(Float16 value) {
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  const uint32_t magnitude = uint32_t{value.bits & 0x7fffu} << 13;  // exponent and mantissa in place
  // The exponents' biases differ by 112. A product is exact and turns denormals into normal numbers.
  const uint32_t finite = BitsOf(FloatOf(magnitude) * FloatOf((127u + 112u) << 23));
  const uint32_t special = magnitude | 0x7f800000u;  // infinity or NaN
  return FloatOf(sign | (magnitude >= 0x0f800000u ? special : finite));
}

template <typename T>
T FromFloat(float value);

template <>
inline float FromFloat<float>(float value) { return value; }

template <>
inline BFloat16 FromFloat<BFloat16>(float value) {
  const uint32_t bits = BitsOf(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40u;
  return BFloat16{static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded)};
}

template <>
inline Float16 FromFloat<Float16>(float value) {
  const uint32_t bits = BitsOf(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal numbers: change the bias, round the 13 bits that go. A carry may reach the exponent, up
  // to infinity.
  const uint32_t rebiased = magnitude - (112u << 23);
  const uint32_t normal = (rebiased + 0xfffu + ((rebiased >> 13) & 1u)) >> 13;
  // Denormals, below 2^-14: adding 0.5 puts the units of 2^-24 into the low mantissa bits, rounded.
  const uint32_t denormal = BitsOf(FloatOf(magnitude) + 0.5f) - BitsOf(0.5f);
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u | ((magnitude >> 13) & 0x1ffu) : 0x7c00u;
  const uint32_t result = magnitude >= 0x47800000u   ? special  // 2^16 and above, infinity, NaN
                          : magnitude < 0x38800000u ? denormal
                                                    : normal;
  return Float16{static_cast<uint16_t>(sign | result)};
}

}  // namespace smfree::cpu

#endif  // SMFREE_CSRC_CPU_FLOATS_H_
