// SPDX-License-Identifier: Apache-2.0
#ifndef SMFREE_FFI_COMBINE_RECV_H_
#define SMFREE_FFI_COMBINE_RECV_H_

#include "ffi/operands.h"

namespace smfree {

inline Operands<CombineRecvArrays> CombineRecvOperands(const Attributes& attributes, Ints places,
                                                       Ints send_counts, LeavesIn add,
                                                       Out<Floats> slots, LeavesOut out) {
  const auto leaves = RowsOf(attributes, out, Use::kCompute);
  const auto added = RowsOf(attributes, add, Use::kCompute);
  CombineRecvArrays arrays;
  arrays.places = places.typed_data();
  arrays.send_counts = send_counts.typed_data();
  arrays.add = added.rows;
  arrays.out = leaves.rows;
  arrays.slots = OrNull(slots);
  const bool adds = add.size() > 0;
  return {arrays, std::nullopt, leaves.rows.format.stride,
          adds ? WrongOfPair(added, leaves) : leaves.wrong};
}

}  // namespace smfree

#endif  // SMFREE_FFI_COMBINE_RECV_H_
