// SPDX-License-Identifier: Apache-2.0
#ifndef SMFREE_FFI_DISPATCH_SEND_H_
#define SMFREE_FFI_DISPATCH_SEND_H_

#include "ffi/operands.h"

namespace smfree {

inline Operands<DispatchSendArrays> DispatchSendOperands(Rows x, Ints topk_idx, Floats topk_weights,
                                                         Out<Ints> places, Out<Ints> send_counts) {
  DispatchSendArrays arrays;
  arrays.x = x.untyped_data();
  arrays.topk_idx = topk_idx.typed_data();
  arrays.topk_weights = topk_weights.typed_data();
  arrays.places = places->typed_data();
  arrays.send_counts = send_counts->typed_data();
  return {x.dimensions()[0], x, arrays};
}

inline Operands<DispatchSendCachedArrays> DispatchSendCachedOperands(Rows x, Floats slots,
                                                                     Ints places,
                                                                     Ints send_counts) {
  DispatchSendCachedArrays arrays;
  arrays.x = x.untyped_data();
  arrays.slots = OrNull(slots);
  arrays.places = places.typed_data();
  arrays.send_counts = send_counts.typed_data();
  return {x.dimensions()[0], x, arrays};
}

}  // namespace smfree

#endif  // SMFREE_FFI_DISPATCH_SEND_H_
