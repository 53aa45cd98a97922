// SPDX-License-Identifier: Apache-2.0
//
// Lanes: sequences of operations with buffers of their own. This file says which operation a lane
// is at, which of the lane's two buffer sets (the parity) an operation uses, and refuses a second
// operation in flight on a lane: that check is what makes acknowledgements unnecessary
// (PROTOCOL.md, "Why no acknowledgement is needed").
#ifndef SMFREE_CSRC_PROTOCOL_LANES_H_
#define SMFREE_CSRC_PROTOCOL_LANES_H_

#include <cstdint>
#include <type_traits>

#include "csrc/protocol/faults.h"
#include "csrc/protocol/host_device.h"

namespace smfree {

// Two sets are what the protocol needs: a rank can be one operation ahead of a peer, never two.
constexpr int32_t kParities = 2;

// Operations of a lane are numbered 1, 2, 3, …; 0 means "none yet".
constexpr int64_t kNoOperation = 0;

// Users count the operations of a lane from 0, and so do errors and traces.
constexpr int64_t OrdinalOf(int64_t number) { return number - 1; }

SMFREE_HD constexpr int32_t ParityOf(int64_t number) {
  return static_cast<int32_t>(number % kParities);
}

// Each lane has three sides with buffers of their own, because XLA may interleave their operations:
// those of the program as written; those that carry gradients, or tangents, which are in flight
// together with their primals; and those of a rematerialised forward pass, which may begin before
// the forward pass has ended.
enum class Side : int32_t { kForward = 0, kMirrored = 1, kReplay = 2 };
constexpr int32_t kSides = 3;

// A tangent changes the side, a transpose stays on the side of what it is made from.
SMFREE_HD constexpr Side SideOf(int32_t derivation) {
  bool mirrored = false, replay = false;
  for (; derivation > 0; derivation /= 4) {
    mirrored ^= derivation % 4 == 1;
    replay |= derivation % 4 == 3;
  }
  return mirrored ? Side::kMirrored : replay ? Side::kReplay : Side::kForward;
}

// The buffers of `lane` (0 ≤ lane < num_lanes) are at this index.
SMFREE_HD constexpr int32_t LaneIndex(int32_t lane, Side side, int32_t num_lanes) {
  return static_cast<int32_t>(side) * num_lanes + lane;
}

// Lanes that have buffers: without differentiation there is one side only.
SMFREE_HD constexpr int32_t LaneCount(int32_t num_lanes, bool differentiable) {
  return differentiable ? kSides * num_lanes : num_lanes;
}

// One per rank and lane, all zero at the start. Only the rank's own send and recv phases touch it,
// one after the other, so plain loads and stores do. On a GPU it lies in device memory: a captured
// graph that is replayed goes on counting.
struct LaneState {
  int64_t sent;      // number of the last operation whose send phase began here
  int64_t received;  // number of the last operation whose recv phase ended here
};
static_assert(sizeof(LaneState) == 16 && alignof(LaneState) == 8);
static_assert(std::is_trivial_v<LaneState> && std::is_standard_layout_v<LaneState>);

// Start of a send phase: takes the lane's next number. On kTwoInFlight nothing has changed.
SMFREE_HD constexpr FaultKind BeginSend(LaneState& lane, int64_t& number) {
  if (lane.sent != lane.received) return FaultKind::kTwoInFlight;
  number = ++lane.sent;
  return FaultKind::kNone;
}

// Start of a recv phase, before it waits: may operation `number` (from the token) be read? It may
// also run again (XLA clones calls) as long as its operation is the lane's last: until the next
// send, the buffers keep what arrived.
SMFREE_HD constexpr bool MayReceive(const LaneState& lane, int64_t number) {
  return number != kNoOperation && number == lane.sent;
}

// End of a recv phase that MayReceive allowed: every source's rows of `number` have been read.
SMFREE_HD constexpr void FinishRecv(LaneState& lane, int64_t number) { lane.received = number; }

}  // namespace smfree

#endif  // SMFREE_CSRC_PROTOCOL_LANES_H_
