// SPDX-License-Identifier: Apache-2.0
//
// Layout: every offset of the symmetric memory, and the sizes that follow from it. The allocators,
// the size hints, the handlers, the kernels and the tests all ask this one struct.
//
// The memory is the same on every rank:
//
//   offset            bytes                                 content
//   0                 SignalsBytes()                        arrived signals, zero at the start:
//                     set_count * signals_bytes[kWire]        [lane index, parity, source on wire]
//                     set_count * signals_bytes[kNode]        [lane index, parity, source in node]
//                     kAlignment                              fault word: 1 + the rank of a peer in
//                                                             another process that is at fault
//   regions_offset    set_count * 2 * peers[kWire] regions  [lane index, parity, send | recv, peer]
//   …                 set_count * 2 * peers[kNode] regions  [lane index, parity, send | recv, peer]
//
// A buffer set belongs to one lane index (lanes.h) and parity: set_count = LaneCount * kParities.
// A region holds one message of the largest size:
//
//   offset            bytes                                 content
//   0                 header_bytes                          identity, counts per expert
//   header_bytes      MessageLayout(rows, …).bytes          expert ids | slots | rows
//   …                 up to region_bytes                    unused
//
// A message is thus one contiguous range that begins at its region's start: the mover copies it in
// chunks cut anywhere, and where its arrays are follows from the counts in its header.
//
// The recv region of source s here and the send region of destination d there are of one size, so
// that every offset is arithmetic. Sending needs the worst case too: a dispatch packs at most
// max_tokens * min(top_k, peers) rows, but a combine on the same lane packs what it received,
// max_tokens * peers. A rank's own message is packed into its own recv region.
//
// Legs and their regions: nodes.h. The own node's wire region exists as well, so that all nodes are
// treated alike.
#ifndef SMFREE_CSRC_PROTOCOL_LAYOUT_H_
#define SMFREE_CSRC_PROTOCOL_LAYOUT_H_

#include <cstdint>
#include <type_traits>

#include "csrc/protocol/group_config.h"
#include "csrc/protocol/host_device.h"
#include "csrc/protocol/lanes.h"
#include "csrc/protocol/nodes.h"

namespace smfree {

// Of everything that a bulk copy or another rank writes: a GPU's L2 line, two CPU cache lines.
constexpr int64_t kAlignment = 128;
// Of a row's stride inside a message: the widest load and the unit of a bulk copy.
constexpr int64_t kRowAlignment = 16;
// Of a header, for identity and shapes; counts per expert follow.
constexpr int64_t kHeaderIdentityBytes = 128;

constexpr int64_t kExpertIdBytes = 4;  // int32, -1 = none
constexpr int64_t kSlotBytes = 4;      // float32
constexpr int64_t kCountBytes = 4;     // int32
constexpr int64_t kSignalBytes = 8;    // uint64

SMFREE_HD constexpr int64_t AlignUp(int64_t n, int64_t alignment) {
  return (n + alignment - 1) / alignment * alignment;
}

// The rows from one rank to another, without the header:
//
//   offset           bytes                 content
//   experts_offset   rows * experts * 4    int32: expert ids of each row, -1 = none
//   slots_offset     rows * slots * 4      float32: values that ride along with each row
//   rows_offset      rows * row_bytes      the rows
//
// each array aligned up to kAlignment. `experts` and `slots` are top_k, or 0 where the array is
// absent: only a dispatch whose routing the receiver does not know yet carries expert ids. They
// come first, so that a receiver can compute the layout while the rows are still on their way.
struct MessageLayout {
  int64_t experts_offset, slots_offset, rows_offset, bytes;

  SMFREE_HD constexpr MessageLayout(int64_t rows, int64_t experts, int64_t slots,
                                    int64_t row_bytes)
      : experts_offset(0),
        slots_offset(AlignUp(rows * experts * kExpertIdBytes, kAlignment)),
        rows_offset(slots_offset + AlignUp(rows * slots * kSlotBytes, kAlignment)),
        bytes(rows_offset + AlignUp(rows * row_bytes, kAlignment)) {}
};

struct Layout {
  int64_t row_bytes;             // stride of a row in a message
  int64_t header_bytes;
  int64_t region_bytes;
  int64_t regions_offset;
  int64_t signals_bytes[kLegs];  // of one buffer set
  int32_t peers[kLegs];          // regions per direction of one buffer set; 0: no such leg
  int32_t set_count;
  int32_t num_nodes;
  int32_t top_k;

  // The caller has checked the config: sizes are positive, num_experts is a multiple of num_ranks,
  // num_ranks a multiple of ranks_per_node.
  static constexpr Layout Make(const GroupConfig& config) {
    Layout layout{};
    const Nodes nodes = NodesOf(config);
    layout.num_nodes = nodes.count();
    layout.top_k = config.top_k;
    layout.set_count = LaneCount(config.num_lanes, config.differentiable) * kParities;
    layout.peers[kWire] = nodes.Regions(kWire);
    layout.peers[kNode] = nodes.Regions(kNode);

    // A wire message names the counts of all experts behind it: a rank's, or a node's.
    const int64_t experts_behind = config.num_experts / layout.peers[kWire];
    layout.header_bytes = kHeaderIdentityBytes + AlignUp(experts_behind * kCountBytes, kAlignment);
    layout.row_bytes = AlignUp(config.hidden * ItemBytes(config.dtype), kRowAlignment);
    const MessageLayout largest(config.max_tokens, config.top_k, config.top_k, layout.row_bytes);
    layout.region_bytes = layout.header_bytes + largest.bytes;

    for (int leg = 0; leg < kLegs; ++leg) {
      layout.signals_bytes[leg] = AlignUp(layout.peers[leg] * kSignalBytes, kAlignment);
    }
    layout.regions_offset = layout.SignalsBytes();
    return layout;
  }

  // From a region's start to the arrays of the message in it.
  SMFREE_HD constexpr MessageLayout Message(int64_t rows, bool has_experts, bool has_slots) const {
    return MessageLayout(rows, has_experts ? top_k : 0, has_slots ? top_k : 0, row_bytes);
  }

  // From the start of a rank's memory. `lane` is a lane index (lanes.h), `number` the operation's.
  SMFREE_HD constexpr int64_t SignalOffset(Leg leg, int32_t lane, int64_t number,
                                           int32_t source) const {
    const int64_t before = leg == kWire ? 0 : set_count * signals_bytes[kWire];
    return before + SetIndex(lane, number) * signals_bytes[leg] + source * kSignalBytes;
  }
  SMFREE_HD constexpr int64_t SendRegionOffset(Leg leg, int32_t lane, int64_t number,
                                               int32_t destination) const {
    return RegionOffset(leg, SetIndex(lane, number) * 2, destination);
  }
  SMFREE_HD constexpr int64_t RecvRegionOffset(Leg leg, int32_t lane, int64_t number,
                                               int32_t source) const {
    return RegionOffset(leg, SetIndex(lane, number) * 2 + 1, source);
  }

  SMFREE_HD constexpr int64_t FaultWordOffset() const {
    return set_count * (signals_bytes[kWire] + signals_bytes[kNode]);
  }
  // The only part that has to be zero before the first operation.
  SMFREE_HD constexpr int64_t SignalsBytes() const { return FaultWordOffset() + kAlignment; }
  SMFREE_HD constexpr int64_t TotalBytes() const { return RdmaBytes() + NvlBytes(); }

  // By the link that serves them. A leg that leaves the node counts as a whole, since all of it is
  // registered with the network: in hierarchical mode the rows of both directions come to
  // max_tokens * row_bytes * num_nodes * 2 per buffer set.
  SMFREE_HD constexpr int64_t RdmaBytes() const { return num_nodes > 1 ? LegBytes(kWire) : 0; }
  SMFREE_HD constexpr int64_t NvlBytes() const {
    return LegBytes(kNode) + (num_nodes > 1 ? 0 : LegBytes(kWire));
  }

 private:
  SMFREE_HD constexpr int64_t SetIndex(int32_t lane, int64_t number) const {
    return int64_t{lane} * kParities + ParityOf(number);
  }
  SMFREE_HD constexpr int64_t RegionOffset(Leg leg, int64_t half_set, int32_t peer) const {
    const int64_t regions_before = leg == kWire ? 0 : int64_t{set_count} * 2 * peers[kWire];
    return regions_offset + (regions_before + half_set * peers[leg] + peer) * region_bytes;
  }
  SMFREE_HD constexpr int64_t LegBytes(Leg leg) const {
    const int64_t fault_word = leg == kWire ? kAlignment : 0;
    return fault_word + set_count * (signals_bytes[leg] + int64_t{2} * peers[leg] * region_bytes);
  }
};
static_assert(sizeof(Layout) == 72 && alignof(Layout) == 8);
static_assert(std::is_trivially_copyable_v<Layout>);

// Bytes that a rank's group will take, by link, before it is made.
constexpr int64_t RdmaSizeHint(const GroupConfig& config) {
  return Layout::Make(config).RdmaBytes();
}
constexpr int64_t NvlSizeHint(const GroupConfig& config) {
  return Layout::Make(config).NvlBytes();
}

// The most rows that the expert-grouped array d.x of one rank can get when each of `num_ranks`
// ranks sends `tokens` rows: each row once per local expert it goes to, each expert's rows filled
// up to `expert_alignment`.
SMFREE_HD constexpr int64_t MaxRecvRows(int32_t num_ranks, int64_t tokens, int32_t top_k,
                                        int32_t local_experts, int32_t expert_alignment) {
  const int64_t copies =
      num_ranks * tokens * static_cast<int64_t>(top_k < local_experts ? top_k : local_experts);
  const int64_t groups = copies < local_experts ? copies : local_experts;  // that are not empty
  return AlignUp(copies + groups * (expert_alignment - 1), expert_alignment);
}

// Rows of the expert-grouped array for `tokens` rows per rank: recv_capacity, or the worst case.
constexpr int64_t RowsCapacity(const GroupConfig& config, int64_t tokens) {
  if (config.recv_capacity > 0) return config.recv_capacity;
  return MaxRecvRows(config.num_ranks, tokens, config.top_k, config.num_experts / config.num_ranks,
                     config.expert_alignment);
}

}  // namespace smfree

#endif  // SMFREE_CSRC_PROTOCOL_LAYOUT_H_
