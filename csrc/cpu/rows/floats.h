// SPDX-License-Identifier: Apache-2.0
//
// Elements of rows as float32, one at a time or many: F is float or a vector of floats, U the
// unsigned integers of the same shape. Branch-free integer arithmetic gives the same bits on every
// processor and in every width. Rounding is to nearest, ties to even; a NaN stays a NaN.
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

// float32 of a bfloat16, whose bits are the low half of `bits`.
template <typename F, typename U>
SMFREE_INLINE F FromBFloat16(U bits) {
  return BitCast<F>(bits << 16);
}

template <typename F, typename U>
SMFREE_INLINE U ToBFloat16(F value) {
  const U bits = BitCast<U>(value);
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U quiet_nan = (bits >> 16) | 0x40u;
  return (bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded;
}

template <typename F, typename U>
SMFREE_INLINE F FromFloat16(U bits) {
  const U sign = (bits & 0x8000u) << 16;
  const U magnitude = (bits & 0x7fffu) << 13;  // exponent and mantissa in place
  // The biases of the exponents differ by 112. The product is exact, also for denormals.
  const U finite = BitCast<U>(BitCast<F>(magnitude) * 0x1p112f);
  const U special = magnitude | 0x7f800000u;  // infinity or NaN
  return BitCast<F>(sign | (magnitude >= 0x0f800000u ? special : finite));
}

template <typename F, typename U>
SMFREE_INLINE U ToFloat16(F value) {
  const U bits = BitCast<U>(value);
  const U sign = (bits >> 16) & 0x8000u;
  const U magnitude = bits & 0x7fffffffu;
  // Normal numbers: change the bias, round the 13 bits that go. A carry may reach the exponent, up
  // to infinity.
  const U rebiased = magnitude - (112u << 23);
  const U normal = (rebiased + 0xfffu + ((rebiased >> 13) & 1u)) >> 13;
  // Denormals, below 2^-14: adding 0.5 puts the units of 2^-24 into the low mantissa bits, rounded.
  const U denormal = BitCast<U>(BitCast<F>(magnitude) + 0.5f) - 0x3f000000u;
  const U infinity = (magnitude & 0u) | 0x7c00u;
  const U quiet_nan = 0x7e00u | ((magnitude >> 13) & 0x1ffu);
  const U special = magnitude > 0x7f800000u ? quiet_nan : infinity;
  const U finite = magnitude < 0x38800000u ? denormal : normal;
  return sign | (magnitude >= 0x47800000u ? special : finite);  // 2^16 and above, infinity, NaN
}

}  // namespace smfree::cpu

#endif  // SMFREE_CSRC_CPU_ROWS_FLOATS_H_
