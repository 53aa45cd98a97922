// SPDX-License-Identifier: Apache-2.0
#ifndef SMFREE_FFI_COMBINE_RECV_H_
#define SMFREE_FFI_COMBINE_RECV_H_

#include "ffi/operands.h"

namespace smfree {

inline Operands<CombineRecvArrays> CombineRecvOperands(Ints places, Ints send_counts, Out<Rows> out,
                                                       Out<Floats> slots) {
  CombineRecvArrays arrays;
  arrays.places = places.typed_data();
  arrays.send_counts = send_counts.typed_data();
  arrays.out = out->untyped_data();
  arrays.slots = OrNull(slots);
  return {places.dimensions()[0], *out, arrays};
}

}  // namespace smfree

#endif  // SMFREE_FFI_COMBINE_RECV_H_
