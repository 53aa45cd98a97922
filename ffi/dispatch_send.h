// SPDX-License-Identifier: Apache-2.0
#ifndef SMFREE_FFI_DISPATCH_SEND_H_
#define SMFREE_FFI_DISPATCH_SEND_H_

#include "ffi/operands.h"

namespace smfree {

inline Operands<DispatchSendArrays> DispatchSendOperands(const Attributes& attributes,
                                                         Ints topk_idx, Floats topk_weights,
                                                         LeavesIn x, Out<Ints> places,
                                                         Out<Ints> send_counts) {
  const auto rows = RowsOf(attributes, x, Use::kCarry);
  DispatchSendArrays arrays;
  arrays.x = rows.rows;
  arrays.topk_idx = topk_idx.typed_data();
  arrays.topk_weights = topk_weights.typed_data();
  arrays.places = places->typed_data();
  arrays.send_counts = send_counts->typed_data();
  return {arrays, std::nullopt, rows.rows.format.stride, rows.wrong};
}

inline Operands<DispatchSendCachedArrays> DispatchSendCachedOperands(const Attributes& attributes,
                                                                     Floats slots, Ints places,
                                                                     Ints send_counts,
                                                                     LeavesIn x) {
  const auto rows = RowsOf(attributes, x, Use::kCarry);
  DispatchSendCachedArrays arrays;
  arrays.x = rows.rows;
  arrays.slots = OrNull(slots);
  arrays.places = places.typed_data();
  arrays.send_counts = send_counts.typed_data();
  return {arrays, std::nullopt, rows.rows.format.stride, rows.wrong};
}

}  // namespace smfree

#endif  // SMFREE_FFI_DISPATCH_SEND_H_
