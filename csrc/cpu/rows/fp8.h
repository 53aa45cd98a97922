// SPDX-License-Identifier: Apache-2.0
//
// Elements of 8 bits as float32, by the rules of floats.h.
//
//            exponent  mantissa  bias  largest  beyond it
//   E4M3     4 bits    3 bits    7     448      NaN, which is 0x7f; there is no infinity
//   E5M2     5 bits    2 bits    15    57344    infinity: it is the upper half of a float16
#ifndef SMFREE_CSRC_CPU_ROWS_FP8_H_
#define SMFREE_CSRC_CPU_ROWS_FP8_H_

#include <cstdint>

#include "csrc/cpu/rows/floats.h"

namespace smfree::cpu {

SMFREE_INLINE float FromE4M3(uint32_t bits) {
  const uint32_t sign = (bits & 0x80u) << 24;
  const uint32_t magnitude = (bits & 0x7fu) << 20;  // exponent and mantissa in place
  // The biases of the exponents differ by 120. The product is exact, also for denormals.
  const uint32_t finite = BitCast<uint32_t>(BitCast<float>(magnitude) * 0x1p120f);
  const uint32_t nan = magnitude | 0x7f800000u;
  return BitCast<float>(sign | (magnitude == 0x07f00000u ? nan : finite));
}

SMFREE_INLINE uint32_t ToE4M3(float value) {
  const uint32_t bits = BitCast<uint32_t>(value);
  const uint32_t sign = (bits >> 24) & 0x80u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t rounded = RoundedMagnitude<120, 20>(magnitude);
  const uint32_t nan = 0x7fu;
  return sign | (rounded > 0x7eu ? nan : rounded);  // too large, infinity, NaN
}

SMFREE_INLINE float FromE5M2(uint32_t bits) {
  return FromFloat16(bits << 8);
}

SMFREE_INLINE uint32_t ToE5M2(float value) {
  const uint32_t bits = BitCast<uint32_t>(value);
  const uint32_t sign = (bits >> 24) & 0x80u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t infinity = 0x7cu;
  const uint32_t quiet_nan = 0x7eu;
  const uint32_t special = magnitude > 0x7f800000u ? quiet_nan : infinity;
  const uint32_t finite = RoundedMagnitude<112, 21>(magnitude);  // infinity, where it rounds so
  return sign | (magnitude >= 0x47800000u ? special : finite);  // 2^16 and above, infinity, NaN
}

}  // namespace smfree::cpu

#endif  // SMFREE_CSRC_CPU_ROWS_FP8_H_
