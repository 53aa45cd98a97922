// SPDX-License-Identifier: Apache-2.0
//
// Operations that follow one another on a set of buffers (sets.h): which of the set's two halves
// (the parity) each of them uses, which one was sent and which one received last, and that a second
// one is refused while one is in flight. That is what makes acknowledgements unnecessary
// (PROTOCOL.md, "Why no acknowledgement is needed").
//
// And what an operation is for, its side, which traces show.
#ifndef SMFREE_CSRC_PROTOCOL_LANES_H_
#define SMFREE_CSRC_PROTOCOL_LANES_H_

#include <cstdint>
#include <type_traits>

#include "csrc/protocol/faults.h"
#include "csrc/protocol/host_device.h"

namespace smfree {

// Two are what the protocol needs: a rank can be one operation ahead of a peer, never two.
constexpr int32_t kParities = 2;

// The numbers of operations on a set grow, and their parities alternate, as in
// 1, 2, 3, …; 0 means "none yet".
constexpr int64_t kNoOperation = 0;

SMFREE_HD constexpr int32_t ParityOf(int64_t number) {
  return static_cast<int32_t>(number % kParities);
}

// What an operation is for, to describe it: it is of the program as written; it carries gradients,
// or tangents; or it is of a rematerialised forward pass.
enum class Side : int32_t { kForward = 0, kMirrored = 1, kReplay = 2 };

// A tangent changes the side, a transpose stays on the side of what it is made from.
SMFREE_HD constexpr Side SideOf(int32_t derivation) {
  bool mirrored = false, replay = false;
  for (; derivation > 0; derivation /= 4) {
    mirrored ^= derivation % 4 == 1;
    replay |= derivation % 4 == 3;
  }
  return mirrored ? Side::kMirrored : replay ? Side::kReplay : Side::kForward;
}

// One per rank and set, all zero at the start. Only the rank's own send and recv phases touch it,
// one after the other, so plain loads and stores do. On a GPU it lies in device memory: a captured
// graph that is replayed goes on counting.
struct LaneState {
  int64_t sent;      // number of the last operation whose send phase began here
  int64_t received;  // number of the last operation whose recv phase ended here
};
static_assert(sizeof(LaneState) == 16 && alignof(LaneState) == 8);
static_assert(std::is_trivial_v<LaneState> && std::is_standard_layout_v<LaneState>);

// Start of a send phase where numbers are 1, 2, 3, …: takes the next one. On kTwoInFlight nothing
// has changed.
SMFREE_HD constexpr FaultKind BeginSend(LaneState& lane, int64_t& number) {
  if (lane.sent != lane.received) return FaultKind::kTwoInFlight;
  number = ++lane.sent;
  return FaultKind::kNone;
}

// Start of a recv phase, before it waits: may operation `number` (from the token) be read? It may
// also run again (XLA clones calls) as long as its operation is the set's last: until the next
// send there, the buffers keep what arrived.
SMFREE_HD constexpr bool MayReceive(const LaneState& lane, int64_t number) {
  return number != kNoOperation && number == lane.sent;
}

// End of a recv phase that MayReceive allowed: every source's rows of `number` have been read.
SMFREE_HD constexpr void FinishRecv(LaneState& lane, int64_t number) { lane.received = number; }

}  // namespace smfree

#endif  // SMFREE_CSRC_PROTOCOL_LANES_H_
