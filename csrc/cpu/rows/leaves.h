// SPDX-License-Identifier: Apache-2.0
//
// Rows of leaves (row_format.h): from the arrays of the program into messages, and back. Each of
// these objects works on one row after the other; threads have their own. Rows of messages are
// named by where they start.
#ifndef SMFREE_CSRC_CPU_ROWS_LEAVES_H_
#define SMFREE_CSRC_CPU_ROWS_LEAVES_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "csrc/cpu/rows/rows.h"
#include "csrc/protocol/row_format.h"

namespace smfree::cpu {

// Rows of messages as arrays of one leaf, of bytes that nobody looks into.
RowsIn RowsOfMessage(const std::byte* rows, int64_t stride);

// Sets the bytes of rows of all leaves: 0, or 0xff, which is NaN.
void FillRows(const RowsOut& rows, int64_t begin, int64_t end, int byte);

// Rows of arrays, each to any number of messages.
class RowPacker {
 public:
  explicit RowPacker(const RowsIn& from);
  void Read(int64_t row);
  void Write(std::byte* to, Writes writes) const;

 private:
  const RowsIn& from_;
  const std::byte* leaves_[kMaxLeaves];  // of the row, as they are in messages
  std::vector<std::byte> quantised_;     // a row of a message
  std::vector<float> wide_;
};

// Rows of messages, each to any number of rows of arrays.
class RowUnpacker {
 public:
  explicit RowUnpacker(const RowsOut& to);
  void Read(const std::byte* row);
  void Write(int64_t n, Writes writes) const;
  // Writes w * row; returns <y[n], row>, the products of the leaves one after the other.
  float WriteScaled(int64_t n, const RowsIn& y, float w, Writes writes);

 private:
  const RowsOut& to_;
  const std::byte* leaves_[kMaxLeaves];  // of the row, as they are in arrays
  std::vector<std::byte> dequantised_[kMaxLeaves];
  std::vector<std::byte> scaled_;
  std::vector<float> wide_;
};

// Sums of rows: of those of messages, and then of those of arrays, in the order in which they are
// added, in float32, rounded once.
class RowSum {
 public:
  RowSum(const RowFormat& format, int64_t max_terms);

  void Clear();
  void AddPacked(const std::byte* row);
  void Add(const RowsIn& rows, int64_t row, float weight);
  // Something of the sum is lost: all of it is NaN.
  void Lose() { lost_ = true; }
  int64_t num_terms() const { return num_terms_; }

  // Zero without terms.
  void Store(const RowsOut& to, int64_t row);
  void Pack(std::byte* to);

 private:
  WeightedRow* TermsOf(int32_t leaf) { return &terms_[static_cast<size_t>(leaf * max_terms_)]; }
  // In float32, of a quantised leaf.
  const float* WideSum(int32_t leaf);

  const RowFormat& format_;
  const int64_t max_terms_;
  std::vector<WeightedRow> terms_;  // [leaf, max_terms]
  int64_t num_terms_ = 0;
  int64_t num_packed_ = 0;
  bool lost_ = false;
  std::vector<float> wide_;
};

}  // namespace smfree::cpu

#endif  // SMFREE_CSRC_CPU_ROWS_LEAVES_H_
