// SPDX-License-Identifier: Apache-2.0
//
// Arithmetic on rows of one dtype: always in float32, in a fixed order, rounded once. The order of
// every sum is part of the result: the same input gives the same bits on every processor and
// thread.
#ifndef SMFREE_CSRC_CPU_ROWS_ROWS_H_
#define SMFREE_CSRC_CPU_ROWS_ROWS_H_

#include <cstddef>
#include <cstdint>

#include "csrc/protocol/row_format.h"

namespace smfree::cpu {

// How rows are written. Streaming stores go past the caches: they do not read the lines that they
// are going to overwrite, a third of the traffic of a copy, but what is read again soon misses
// then. A thread that streamed must call FinishWrites before another one may read.
enum class Writes { kCached, kStreaming };

// What to do in a phase where the ranks of this process write so many bytes all together.
Writes WritesFor(int64_t bytes);

void CopyRow(std::byte* out, const std::byte* row, int64_t bytes, Writes writes);
void FinishWrites(Writes writes);

// A term of a sum of rows.
struct WeightedRow {
  const std::byte* row;
  float weight;
};

// out = sum of weight * row over the terms in their order; zero without terms.
void SumRows(DType dtype, std::byte* out, const WeightedRow* terms, int64_t num_terms, int64_t n);

// The same term by term, for sums that are not rounded to the dtype of the terms:
// sums = [sums, unless it is the first] + weight * row, and out = sums, rounded.
void AddRow(DType dtype, float* sums, const WeightedRow& term, bool first, int64_t n);
void RoundRow(DType dtype, std::byte* out, const float* sums, int64_t n);

// out = w * row, by way of `scaled`, room for a row; returns <y, row>: 16 partial sums by index mod
// 16, then halved pairwise.
float ScaleRowAndDot(DType dtype, std::byte* out, std::byte* scaled, const std::byte* row,
                     const std::byte* y, float w, int64_t n, Writes writes);

}  // namespace smfree::cpu

#endif  // SMFREE_CSRC_CPU_ROWS_ROWS_H_
