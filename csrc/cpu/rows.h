// SPDX-License-Identifier: Apache-2.0
//
// Arithmetic on rows: always in float32, in a fixed order, rounded once. The order of every sum is
// part of the result: the same input gives the same bits on every processor and thread.
#ifndef SMFREE_CSRC_CPU_ROWS_H_
#define SMFREE_CSRC_CPU_ROWS_H_

#include <cstddef>
#include <cstdint>

#include "csrc/cpu/backend.h"

namespace smfree::cpu {

// Of `n` elements of the group's dtype.
struct RowKernels {
  void (*scale)(float* sum, const void* row, float w, int64_t n);  // sum = w * row
  void (*add)(float* sum, const void* row, float w, int64_t n);    // sum += w * row
  void (*round)(void* out, const float* sum, int64_t n);           // out = sum
  // out = w * row; returns <y, row>: 32 partial sums by index mod 32, then halved pairwise.
  float (*scale_and_dot)(void* out, const void* row, const void* y, float w, int64_t n);
};

const RowKernels& KernelsFor(DType dtype);

// A term of a sum of rows.
struct WeightedRow {
  const std::byte* row;
  float weight;
};

// out = sum of weight * row over the terms in their order; zero without terms.
void SumRows(DType dtype, std::byte* out, const WeightedRow* terms, int64_t num_terms, int64_t n);

void FillNaN(DType dtype, std::byte* out, int64_t n);

}  // namespace smfree::cpu

#endif  // SMFREE_CSRC_CPU_ROWS_H_
