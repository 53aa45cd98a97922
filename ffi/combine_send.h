// SPDX-License-Identifier: Apache-2.0
#ifndef SMFREE_FFI_COMBINE_SEND_H_
#define SMFREE_FFI_COMBINE_SEND_H_

#include <algorithm>
#include <cstdint>
#include <utility>

#include "ffi/operands.h"

namespace smfree {

inline Operands<CombineSendArrays> CombineSendOperands(const Attributes& attributes, Floats values,
                                                       Ints rows, Ints recv_counts, Ints relay,
                                                       LeavesIn y) {
  const auto leaves = RowsOf(attributes, y, Use::kCompute);
  CombineSendArrays arrays;
  // One of both may be absent: the gradient of integers is that of their weights alone.
  arrays.rows_capacity =
      std::max(leaves.count, static_cast<int64_t>(values.element_count()));
  arrays.y = leaves.rows;
  arrays.values = OrNull(values);
  arrays.rows = rows.typed_data();
  arrays.recv_counts = recv_counts.typed_data();
  arrays.relay = relay.typed_data();
  return {arrays, rows, leaves.rows.format.stride, leaves.wrong};
}

inline Operands<CombineSendArrays> CombineSendWeightedOperands(const Attributes& attributes,
                                                               Floats weights, Ints rows,
                                                               Ints recv_counts, Ints relay,
                                                               LeavesIn y) {
  auto operands =
      CombineSendOperands(attributes, weights, rows, recv_counts, relay, std::move(y));
  operands.arrays.w = std::exchange(operands.arrays.values, nullptr);
  return operands;
}

}  // namespace smfree

#endif  // SMFREE_FFI_COMBINE_SEND_H_
