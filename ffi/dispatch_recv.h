// SPDX-License-Identifier: Apache-2.0
#ifndef SMFREE_FFI_DISPATCH_RECV_H_
#define SMFREE_FFI_DISPATCH_RECV_H_

#include <algorithm>
#include <cstdint>

#include "ffi/operands.h"

namespace smfree {

inline Operands<DispatchRecvArrays> DispatchRecvOperands(const Attributes& attributes,
                                                         Ints capacity, Out<Floats> weights,
                                                         Out<Ints> group_sizes, Out<Ints> num_rows,
                                                         Out<Ints> num_dropped, Out<Ints> rows,
                                                         Out<Ints> recv_counts, Out<Ints> relay,
                                                         LeavesOut x) {
  const auto leaves = RowsOf(attributes, x, Use::kCarry);
  DispatchRecvArrays arrays;
  arrays.rows_capacity = static_cast<int64_t>(weights->element_count());
  arrays.capacity = capacity.typed_data();
  arrays.x = leaves.rows;
  arrays.weights = weights->typed_data();
  arrays.group_sizes = group_sizes->typed_data();
  arrays.num_rows = num_rows->typed_data();
  arrays.num_dropped = num_dropped->typed_data();
  arrays.rows = rows->typed_data();
  arrays.recv_counts = recv_counts->typed_data();
  arrays.relay = relay->typed_data();
  return {arrays, *rows, leaves.rows.format.stride, leaves.wrong};
}

inline Operands<DispatchRecvCachedArrays> DispatchRecvCachedOperands(const Attributes& attributes,
                                                                     Ints rows, Ints recv_counts,
                                                                     Ints relay,
                                                                     Out<Floats> values,
                                                                     LeavesOut x) {
  const auto leaves = RowsOf(attributes, x, Use::kCarry);
  DispatchRecvCachedArrays arrays;
  // One of both may be absent: the gradient of integers is that of their weights alone.
  arrays.rows_capacity =
      std::max(leaves.count, static_cast<int64_t>(values->element_count()));
  arrays.rows = rows.typed_data();
  arrays.recv_counts = recv_counts.typed_data();
  arrays.relay = relay.typed_data();
  arrays.x = leaves.rows;
  arrays.values = OrNull(values);
  return {arrays, rows, leaves.rows.format.stride, leaves.wrong};
}

inline Operands<DispatchRecvCachedArrays> DispatchRecvWeightedOperands(
    const Attributes& attributes, Floats weights, Ints rows, Ints recv_counts, Ints relay,
    LeavesIn y, Out<Floats> values, LeavesOut x) {
  auto operands =
      DispatchRecvCachedOperands(attributes, rows, recv_counts, relay, values, x);
  const auto leaves = RowsOf(attributes, y, Use::kCompute);
  operands.arrays.y = leaves.rows;
  operands.arrays.w = weights.typed_data();
  operands.wrong = WrongOfPair(leaves, RowsOf(attributes, x, Use::kCompute));
  return operands;
}

}  // namespace smfree

#endif  // SMFREE_FFI_DISPATCH_RECV_H_
