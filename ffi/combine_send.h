// SPDX-License-Identifier: Apache-2.0
#ifndef SMFREE_FFI_COMBINE_SEND_H_
#define SMFREE_FFI_COMBINE_SEND_H_

#include <utility>

#include "ffi/operands.h"

namespace smfree {

inline Operands<CombineSendArrays> CombineSendOperands(Rows y, Floats values, Ints rows,
                                                       Ints recv_counts, Ints relay) {
  CombineSendArrays arrays;
  arrays.rows_capacity = y.dimensions()[0];
  arrays.y = y.untyped_data();
  arrays.values = OrNull(values);
  arrays.rows = rows.typed_data();
  arrays.recv_counts = recv_counts.typed_data();
  arrays.relay = relay.typed_data();
  return {rows.dimensions()[1], y, arrays};
}

inline Operands<CombineSendArrays> CombineSendWeightedOperands(Rows y, Floats weights, Ints rows,
                                                               Ints recv_counts, Ints relay) {
  auto operands = CombineSendOperands(y, weights, rows, recv_counts, relay);
  operands.arrays.w = std::exchange(operands.arrays.values, nullptr);
  return operands;
}

}  // namespace smfree

#endif  // SMFREE_FFI_COMBINE_SEND_H_
