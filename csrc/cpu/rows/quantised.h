// SPDX-License-Identifier: Apache-2.0
//
// Quantised leaves, as they are in messages: values and scales, by the rules of Quantisation
// (row_format.h). Everything else sees them as float32.
#ifndef SMFREE_CSRC_CPU_ROWS_QUANTISED_H_
#define SMFREE_CSRC_CPU_ROWS_QUANTISED_H_

#include <cstddef>

#include "csrc/protocol/row_format.h"

namespace smfree::cpu {

// Writes the values and scales of a row of a leaf, `to` on.
void QuantiseRow(const Quantisation& how, const Leaf& leaf, std::byte* to, const float* row);

// sums = [sums, unless it is the first] + value * scale, from the values and scales at `row`.
void AddQuantisedRow(const Quantisation& how, const Leaf& leaf, float* sums, const std::byte* row,
                     bool first);

}  // namespace smfree::cpu

#endif  // SMFREE_CSRC_CPU_ROWS_QUANTISED_H_
