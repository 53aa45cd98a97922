// SPDX-License-Identifier: Apache-2.0
//
// Numbers of all dtypes, and quantised blocks, straight from their definitions and one at a time.
#ifndef SMFREE_TESTS_CPP_CPU_NUMBERS_H_
#define SMFREE_TESTS_CPP_CPU_NUMBERS_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "csrc/protocol/row_format.h"

namespace smfree::cpu::test {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

inline bool Same(float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); }

inline int32_t ItemBytes(DType dtype) {
  switch (dtype) {
    case DType::kF32: return 4;
    case DType::kBF16:
    case DType::kF16: return 2;
    default: return 1;
  }
}

// What the bits of 8 are; `beyond`: NaNs and infinities as if they were numbers.
inline double NumberOf(DType dtype, uint32_t bits, bool beyond = false) {
  const int mantissa_bits = dtype == DType::kE4M3 ? 3 : 2, bias = dtype == DType::kE4M3 ? 7 : 15;
  const double sign = bits & 0x80 ? -1 : 1;
  const int exponent = static_cast<int>(bits & 0x7f) >> mantissa_bits;
  const int mantissa = static_cast<int>(bits) & ((1 << mantissa_bits) - 1);
  if (!beyond) {
    if (dtype == DType::kE4M3 && (bits & 0x7f) == 0x7f) return kNaN;
    if (dtype == DType::kE5M2 && exponent == 31) return mantissa == 0 ? sign / 0.0 : kNaN;
  }
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits);
}

// The bits of the nearest number of 8 bits, an even one if two are. What is nearest to the first
// number that does not exist is NaN (E4M3), or infinity.
inline uint32_t NearestOf8Bits(DType dtype, float value) {
  const uint32_t beyond = dtype == DType::kE4M3 ? 0x7f : 0x7c;
  const uint32_t sign = std::signbit(value) ? 0x80 : 0;
  if (std::isnan(value)) return sign | (dtype == DType::kE4M3 ? 0x7f : 0x7e);
  const double magnitude = std::abs(static_cast<double>(value));
  if (magnitude >= NumberOf(dtype, beyond, true)) return sign | beyond;
  uint32_t below = 0, above = beyond;
  while (below + 1 < above) {
    const uint32_t between = (below + above) / 2;
    (NumberOf(dtype, between, true) < magnitude ? below : above) = between;
  }
  const double to_above = NumberOf(dtype, above, true) - magnitude;
  const double to_below = magnitude - NumberOf(dtype, below, true);
  const bool up = to_above < to_below || (to_above == to_below && above % 2 == 0);
  return sign | (up ? above : below);
}

// Rounds as the definition says, without tricks: one bit of the mantissa after the other is beyond
// suspicion, frexp and nearbyint nearly so.
inline float RoundTo(DType dtype, float value) {
  if (dtype == DType::kF32 || std::isnan(value)) return value;
  if (dtype == DType::kE4M3 || dtype == DType::kE5M2) {
    return static_cast<float>(NumberOf(dtype, NearestOf8Bits(dtype, value)));
  }
  if (!std::isfinite(value)) return value;
  if (dtype == DType::kF16) return static_cast<float>(static_cast<_Float16>(value));
  int exponent;
  const float mantissa = std::frexp(value, &exponent);
  return std::ldexp(std::nearbyint(std::ldexp(mantissa, 8)), exponent - 8);
}

// A block of a quantised row.
struct QuantisedBlock {
  float scale;
  std::vector<uint32_t> values;  // bits

  QuantisedBlock(const Quantisation& how, const float* x) {
    float most = kLeastMagnitude;
    bool finite = true;
    for (int32_t i = 0; i < how.block; ++i) {
      finite = finite && std::isfinite(x[i]);
      most = std::max(most, std::abs(x[i]));
    }
    const float one_over = 1.0f / (how.values == DType::kE4M3 ? 448.0f : 57344.0f);
    scale = most * one_over;
    if (how.power_of_two) {
      int exponent;
      const float mantissa = std::frexp(scale, &exponent);  // in [0.5, 1)
      scale = std::ldexp(1.0f, mantissa == 0.5f ? exponent - 1 : exponent);
    }
    const float inverse = 1.0f / scale;
    if (!finite) scale = kNaN;
    for (int32_t i = 0; i < how.block; ++i) {
      values.push_back(NearestOf8Bits(how.values, finite ? x[i] * inverse : kNaN));
    }
  }
  float Value(const Quantisation& how, int32_t i) const {
    return static_cast<float>(NumberOf(how.values, values[static_cast<size_t>(i)])) * scale;
  }
};

// A row of a leaf as it comes out of a message, in float32.
inline std::vector<float> ThroughMessage(const RowFormat& format, const Leaf& leaf,
                                         const std::vector<float>& row) {
  std::vector<float> out;
  if (!leaf.quantised) {
    for (const float value : row) out.push_back(RoundTo(leaf.dtype, value));
    return out;
  }
  const Quantisation& how = format.quantisation;
  for (int32_t begin = 0; begin < leaf.width; begin += how.block) {
    const QuantisedBlock block(how, row.data() + begin);
    for (int32_t i = 0; i < how.block; ++i) out.push_back(block.Value(how, i));
  }
  return out;
}

// Elements of one dtype.
class Array {
 public:
  Array() = default;
  // Full of a pattern that is no sensible value, so that elements left unwritten are noticed.
  Array(DType dtype, int64_t size) : Array(dtype, ItemBytes(dtype), size) {}
  Array(DType dtype, int32_t item_bytes, int64_t size)
      : dtype_(dtype), item_bytes_(item_bytes), bytes_(size * item_bytes, 0xee) {}

  DType dtype() const { return dtype_; }
  unsigned char* data() { return bytes_.data(); }
  const unsigned char* data() const { return bytes_.data(); }
  int64_t bytes() const { return static_cast<int64_t>(bytes_.size()); }
  int64_t size() const { return bytes() / item_bytes_; }

  float operator[](int64_t i) const {
    uint32_t bits = 0;
    switch (dtype_) {
      case DType::kF32: std::memcpy(&bits, &bytes_[i * 4], 4); break;
      case DType::kBF16: std::memcpy(reinterpret_cast<char*>(&bits) + 2, &bytes_[i * 2], 2); break;
      case DType::kF16: {
        _Float16 half;
        std::memcpy(&half, &bytes_[i * 2], 2);
        return static_cast<float>(half);
      }
      default: return static_cast<float>(NumberOf(dtype_, bytes_[i]));
    }
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  void Set(int64_t i, float value) {
    if (dtype_ == DType::kE4M3 || dtype_ == DType::kE5M2) {
      bytes_[i] = static_cast<unsigned char>(NearestOf8Bits(dtype_, value));
      return;
    }
    const float rounded = RoundTo(dtype_, value);
    if (dtype_ == DType::kF32) {
      std::memcpy(&bytes_[i * 4], &rounded, 4);
    } else if (dtype_ == DType::kBF16) {
      std::memcpy(&bytes_[i * 2], reinterpret_cast<const char*>(&rounded) + 2, 2);
    } else {
      const _Float16 half = static_cast<_Float16>(rounded);
      std::memcpy(&bytes_[i * 2], &half, 2);
    }
  }
  void Fill(unsigned char byte) { std::fill(bytes_.begin(), bytes_.end(), byte); }
  friend bool operator==(const Array& a, const Array& b) { return a.bytes_ == b.bytes_; }

 private:
  DType dtype_ = DType::kF32;
  int32_t item_bytes_ = 4;
  std::vector<unsigned char> bytes_;
};

// The arrays of some rows.
class Rows {
 public:
  Rows() = default;
  Rows(const RowFormat& of, int64_t count) : format(of) {
    for (int32_t l = 0; l < of.count; ++l) {
      const Leaf& leaf = of.leaves[l];
      leaves_.emplace_back(leaf.dtype, leaf.item_bytes, count * leaf.width);
    }
  }

  Array& operator[](int32_t leaf) { return leaves_[leaf]; }
  const Array& operator[](int32_t leaf) const { return leaves_[leaf]; }
  RowsIn in() const {
    RowsIn rows;
    rows.format = format;
    for (int32_t l = 0; l < format.count; ++l) rows.leaves[l] = leaves_[l].data();
    return rows;
  }
  RowsOut out() {
    RowsOut rows;
    rows.format = format;
    for (int32_t l = 0; l < format.count; ++l) rows.leaves[l] = leaves_[l].data();
    return rows;
  }

  // Row `row` of a leaf, in float32.
  std::vector<float> Row(int32_t leaf, int64_t row) const {
    std::vector<float> values;
    const int64_t width = format.leaves[leaf].width;
    for (int64_t i = row * width; i < (row + 1) * width; ++i) values.push_back(leaves_[leaf][i]);
    return values;
  }
  void SetRow(int32_t leaf, int64_t row, const std::vector<float>& values) {
    const int64_t width = format.leaves[leaf].width;
    for (int64_t i = 0; i < width; ++i) leaves_[leaf].Set(row * width + i, values[i]);
  }
  void Fill(unsigned char byte) {
    for (Array& leaf : leaves_) leaf.Fill(byte);
  }
  friend bool operator==(const Rows& a, const Rows& b) { return a.leaves_ == b.leaves_; }

  RowFormat format;

 private:
  std::vector<Array> leaves_;
};

// Rows of one leaf.
inline RowFormat Plain(DType dtype, int32_t width) {
  RowFormat format;
  format.Add(dtype, ItemBytes(dtype), width);
  return format;
}

}  // namespace smfree::cpu::test

#endif  // SMFREE_TESTS_CPP_CPU_NUMBERS_H_
