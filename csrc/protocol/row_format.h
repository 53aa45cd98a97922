// SPDX-License-Identifier: Apache-2.0
//
// RowFormat: what a row of an operation is, in the arrays of the program and in messages.
//
// The rows of an operation are up to kMaxLeaves arrays (the leaves of a pytree), each [count, width]
// and dense; row i is the i-th row of each of them. In a message the leaves of a row follow one
// another, each at a multiple of kRowAlignment, and rows are `stride` bytes apart:
//
//   offset                      bytes                     content of leaf l
//   leaves[l].offset            width * item_bytes        its elements, as they are; or, quantised,
//   leaves[l].offset            width                     values of 8 bits
//   … + ScalesOffset(width)     width / block * 4         float32, one scale per block of them
//
// So a quantised leaf is the same bytes as two leaves, values and scales.
#ifndef SMFREE_CSRC_PROTOCOL_ROW_FORMAT_H_
#define SMFREE_CSRC_PROTOCOL_ROW_FORMAT_H_

#include <cstdint>
#include <type_traits>

#include "csrc/protocol/host_device.h"

namespace smfree {

SMFREE_HD constexpr int64_t AlignUp(int64_t n, int64_t alignment) {
  return (n + alignment - 1) / alignment * alignment;
}

// Leaves and strides in messages are aligned to the widest load, the unit of a bulk copy.
constexpr int64_t kRowAlignment = 16;
constexpr int32_t kMaxLeaves = 8;

// Types of elements that are computed with; kOther (integers, bool) is carried only.
enum class DType : int32_t { kF32 = 0, kBF16, kF16, kE4M3, kE5M2, kOther };

// How float32, bfloat16 and float16 leaves are quantised on the wire: each block of `block` elements
// of a row to values of 8 bits and one float32 scale,
//
//   m     = max |x| over the block, at least kLeastMagnitude
//   scale = m * (1 / most), most the largest value; or the next power of two that is not less
//   value = round(x * (1 / scale)), to nearest even
//
// in float32 throughout. If m is not finite, the scale and all values of the block are NaN. What
// comes out again is value * scale, in float32, rounded to the dtype of the leaf.
struct Quantisation {
  DType values = DType::kOther;  // kE4M3 or kE5M2; kOther: rows travel as they are
  int32_t block = 0;             // elements, a power of two from 32 to 128
  bool power_of_two = false;     // of scales

  SMFREE_HD constexpr bool on() const { return values != DType::kOther; }
};

// Zeros get a scale that can be inverted. Small enough that float32 has its full precision there.
constexpr float kLeastMagnitude = 1e-30f;

SMFREE_HD constexpr float LargestValue(DType dtype) {
  return dtype == DType::kE4M3 ? 448.0f : 57344.0f;
}

struct Leaf {
  DType dtype = DType::kOther;  // in the program
  bool quantised = false;
  int32_t item_bytes = 0;  // in the program
  int32_t width = 0;       // elements of a row
  int32_t offset = 0;      // from the start of a row in a message, in bytes

  SMFREE_HD constexpr int64_t bytes() const { return int64_t{width} * item_bytes; }
  // From the offset of a quantised leaf to its scales.
  SMFREE_HD constexpr int64_t scales_offset() const { return AlignUp(width, kRowAlignment); }
};

struct RowFormat {
  int32_t count = 0;   // of leaves
  int32_t stride = 0;  // of rows in a message, in bytes
  Quantisation quantisation;
  Leaf leaves[kMaxLeaves] = {};

  // Appends a leaf. It is quantised if the format is and its dtype can be.
  constexpr void Add(DType dtype, int32_t item_bytes, int32_t width) {
    Leaf leaf{dtype, quantisation.on() && dtype <= DType::kF16, item_bytes, width, stride};
    const int64_t bytes = leaf.quantised
                              ? leaf.scales_offset() + int64_t{width} / quantisation.block * 4
                              : leaf.bytes();
    stride += static_cast<int32_t>(AlignUp(bytes, kRowAlignment));
    leaves[count++] = leaf;
  }

  // Bytes of a row in the arrays of the program.
  SMFREE_HD constexpr int64_t bytes() const {
    int64_t sum = 0;
    for (int32_t l = 0; l < count; ++l) sum += leaves[l].bytes();
    return sum;
  }
};
static_assert(std::is_trivially_copyable_v<RowFormat>);

// The arrays of the rows of an operation, by leaf.
template <typename Pointer>
struct RowArrays {
  RowFormat format;
  Pointer leaves[kMaxLeaves] = {};
};
using RowsIn = RowArrays<const void*>;
using RowsOut = RowArrays<void*>;

}  // namespace smfree

#endif  // SMFREE_CSRC_PROTOCOL_ROW_FORMAT_H_
