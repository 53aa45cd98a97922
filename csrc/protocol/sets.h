// SPDX-License-Identifier: Apache-2.0
//
// Sets of buffers, which the operations of a GPU group take: a send takes the lowest free set, its
// recv gives it back. All ranks run their sends and recvs in one order, so all take the same ones.
// On a set operations follow one another, which is what makes acknowledgements unnecessary
// (PROTOCOL.md, "Why no acknowledgement is needed").
#ifndef SMFREE_CSRC_PROTOCOL_SETS_H_
#define SMFREE_CSRC_PROTOCOL_SETS_H_

#include <cstdint>

#include "csrc/protocol/group_config.h"
#include "csrc/protocol/host_device.h"
#include "csrc/protocol/lanes.h"

namespace smfree {

// The set that a send takes where those with a bit in `in_flight` are taken; num_sets if none is
// free.
SMFREE_HD constexpr int32_t FirstFreeSet(uint32_t in_flight, int32_t num_sets) {
  int32_t set = 0;
  while (set < num_sets && (in_flight >> set & 1u) != 0) ++set;
  return set;
}

// The number of an operation: twice which one of its rank it is, from 1 on, and one more where that
// gives the parity that its set has not used last. So the numbers of a set grow, and their parities
// alternate.
SMFREE_HD constexpr int64_t NumberInSet(int64_t operations_before, int64_t last_of_set) {
  return 2 * (operations_before + 1) + (1 - ParityOf(last_of_set));
}
// Which operation of the rank that is, from 0 on: so users count, in errors and traces.
SMFREE_HD constexpr int64_t OperationOfNumber(int64_t number) { return number / 2 - 1; }

static_assert(FirstFreeSet(0b1011, 4) == 2 && FirstFreeSet(0b11, 2) == 2);
static_assert(NumberInSet(0, kNoOperation) == 3 && NumberInSet(1, 3) == 4);
static_assert(OperationOfNumber(3) == 0 && OperationOfNumber(4) == 1);

}  // namespace smfree

#endif  // SMFREE_CSRC_PROTOCOL_SETS_H_
