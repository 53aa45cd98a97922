// SPDX-License-Identifier: Apache-2.0
#ifndef SMFREE_FFI_DISPATCH_RECV_H_
#define SMFREE_FFI_DISPATCH_RECV_H_

#include "ffi/operands.h"

namespace smfree {

inline Operands<DispatchRecvArrays> DispatchRecvOperands(Out<Rows> x, Out<Floats> weights,
                                                         Out<Ints> group_sizes,
                                                         Out<Ints> num_dropped, Out<Ints> rows,
                                                         Out<Ints> recv_counts,
                                                         Out<Ints> relay) {
  DispatchRecvArrays arrays;
  arrays.rows_capacity = x->dimensions()[0];
  arrays.x = x->untyped_data();
  arrays.weights = weights->typed_data();
  arrays.group_sizes = group_sizes->typed_data();
  arrays.num_dropped = num_dropped->typed_data();
  arrays.rows = rows->typed_data();
  arrays.recv_counts = recv_counts->typed_data();
  arrays.relay = relay->typed_data();
  return {rows->dimensions()[1], *x, arrays};
}

inline Operands<DispatchRecvCachedArrays> DispatchRecvCachedOperands(Ints rows, Ints recv_counts,
                                                                     Ints relay, Out<Rows> x,
                                                                     Out<Floats> values) {
  DispatchRecvCachedArrays arrays;
  arrays.rows_capacity = x->dimensions()[0];
  arrays.rows = rows.typed_data();
  arrays.recv_counts = recv_counts.typed_data();
  arrays.relay = relay.typed_data();
  arrays.x = x->untyped_data();
  arrays.values = OrNull(values);
  return {rows.dimensions()[1], *x, arrays};
}

inline Operands<DispatchRecvCachedArrays> DispatchRecvWeightedOperands(Rows y, Floats weights,
                                                                       Ints rows, Ints recv_counts,
                                                                       Ints relay, Out<Rows> x,
                                                                       Out<Floats> values) {
  auto operands = DispatchRecvCachedOperands(rows, recv_counts, relay, x, values);
  operands.arrays.y = y.untyped_data();
  operands.arrays.w = weights.typed_data();
  return operands;
}

}  // namespace smfree

#endif  // SMFREE_FFI_DISPATCH_RECV_H_
