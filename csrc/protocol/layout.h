// SPDX-License-Identifier: Apache-2.0
//
// Layout: every offset of the symmetric memory, and the sizes that follow from it. The allocators,
// the size hints, the handlers, the kernels and the tests all ask this one struct.
//
// The memory is the same on every rank:
//
//   offset            bytes                                 content
//   0                 SignalsBytes()                        arrived signals, zero at the start:
//                     half_sets * signals_bytes[kWire]        [set, parity, source on wire]
//                     half_sets * signals_bytes[kNode]        [set, parity, source in node]
//                     kAlignment                              fault word: 1 + the rank of a peer in
//                                                             another process that has failed
//   SignalsBytes()    announced_bytes                       what ranks of other nodes announce of
//                                                           the wire, and this rank; where there
//                                                           are any
//   BytesOfSets(0)    num_sets * set_bytes                  [set], and of each:
//                     2 * 2 * peers[kWire] regions            [parity, send | recv, peer]
//                     2 * 2 * peers[kNode] regions            [parity, send | recv, peer]
//                     2 * area_bytes[kWire]                   [parity]
//                     2 * area_bytes[kNode]                   [parity]
//
// Buffers belong to one set (sets.h) and parity. What is large stands at the end, set by set, so
// that the memory of a set may come later than that of those before it: BytesOfSets.
// A region holds the header of one message, and the rest of it where it has at most region_rows
// rows:
//
//   offset            bytes                                 content
//   0                 header_bytes                          identity, counts per expert, and per
//                                                           rank (message.h)
//   header_bytes      MessageLayout(rows, …).bytes          expert ids | slots | rows
//   …                 up to region_bytes                    unused
//
// Such a message is one contiguous range that begins at its region's start: the mover copies it in
// chunks cut anywhere, and where its arrays are follows from the counts in its header. The recv
// region of source s here and the send region of destination d there are of one size, so that every
// offset is arithmetic. A rank's own message is packed into its own recv region.
//
// The payloads (all but the header) of larger operations stand one behind the other in an area, so
// that an area does not grow with the ranks: by region in the area of a leg that the rank packs, by
// region, without its own, in the one that it receives in. Operation k packs area k mod 2 and
// receives in the other one. Where a payload begins is the sum of those before it, which follows
// from the counts that the members of the leg announce (announcement.h). The rank's own payload is
// read where it was packed. An area holds area_rows rows: what a dispatch packs on the leg, or what
// a combine packs, which is what the rank has received.
//
// Legs and their regions: nodes.h. The own node's wire region exists as well, so that all nodes are
// treated alike.
#ifndef SMFREE_CSRC_PROTOCOL_LAYOUT_H_
#define SMFREE_CSRC_PROTOCOL_LAYOUT_H_

#include <cstdint>
#include <type_traits>

#include "csrc/protocol/announcement.h"
#include "csrc/protocol/group_config.h"
#include "csrc/protocol/host_device.h"
#include "csrc/protocol/lanes.h"
#include "csrc/protocol/nodes.h"
#include "csrc/protocol/row_format.h"

namespace smfree {

// Whatever a bulk copy or another rank writes is aligned to this: a GPU's L2 line, two CPU lines.
constexpr int64_t kAlignment = 128;
// The part of a header for identity and shapes; counts per expert follow.
constexpr int64_t kHeaderIdentityBytes = 128;

constexpr int64_t kExpertIdBytes = 4;  // int32, -1 = none
constexpr int64_t kSlotBytes = 4;      // float32
constexpr int64_t kCountBytes = 4;     // int32
constexpr int64_t kSignalBytes = 8;    // uint64

// The rows from one rank to another, without the header:
//
//   offset           bytes                 content
//   experts_offset   rows * experts * 4    int32: expert ids of each row, -1 = none
//   slots_offset     rows * slots * 4      float32: values that ride along with each row
//   rows_offset      rows * row_bytes      the rows, of RowFormat::stride bytes each
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
  int64_t row_bytes;             // the largest stride of rows in a message
  int64_t header_bytes;
  int64_t region_rows;           // the most that a message has whose rows stand in its region
  int64_t region_bytes;
  int64_t area_rows[kLegs];      // 0: no operation needs areas
  int64_t area_bytes[kLegs];
  int64_t announced_bytes;
  int64_t set_bytes;
  int64_t regions_offset[kLegs];  // of the first set
  int64_t areas_offset[kLegs];    // of the first set
  int64_t signals_bytes[kLegs];  // of one set and parity
  int32_t peers[kLegs];          // regions per direction of one set and parity; 0: no such leg
  int32_t num_sets;              // that there is room for
  int32_t num_nodes;

  // The caller has checked the config: sizes are positive, num_experts is a multiple of num_ranks,
  // num_ranks a multiple of ranks_per_node.
  static constexpr Layout Make(const GroupConfig& config) {
    return Make(config, NumSets(config));
  }
  // With room for so many sets.
  static constexpr Layout Make(const GroupConfig& config, int32_t num_sets) {
    Layout layout{};
    const Nodes nodes = NodesOf(config);
    layout.num_nodes = nodes.count();
    layout.num_sets = num_sets;
    layout.peers[kWire] = nodes.Regions(kWire);
    layout.peers[kNode] = nodes.Regions(kNode);

    // A wire message names the counts of all experts behind it: a rank's, or a node's, and then
    // also of its ranks.
    const int64_t counts = config.num_experts / layout.peers[kWire] +
                           (config.hierarchical ? nodes.ranks_per_node : 0);
    layout.header_bytes = kHeaderIdentityBytes + AlignUp(counts * kCountBytes, kAlignment);
    layout.row_bytes = AlignUp(config.row_bytes, kRowAlignment);
    layout.region_rows = RegionRows(config, layout.row_bytes);
    const MessageLayout largest(layout.region_rows, config.top_k, config.top_k, layout.row_bytes);
    layout.region_bytes = layout.header_bytes + largest.bytes;
    for (int leg = 0; leg < kLegs && layout.region_rows < config.max_tokens; ++leg) {
      if (layout.peers[leg] == 0) continue;
      layout.area_rows[leg] = leg == kWire ? WireAreaRows(config)
                                           : WireRows(config, config.max_tokens);
      layout.area_bytes[leg] = AlignUp(
          layout.area_rows[leg] *
                  (layout.row_bytes + config.top_k * (kExpertIdBytes + kSlotBytes)) +
              layout.peers[leg] * 3 * kAlignment,  // each payload is three aligned arrays
          kAlignment);
    }

    for (int leg = 0; leg < kLegs; ++leg) {
      layout.signals_bytes[leg] = AlignUp(layout.peers[leg] * kSignalBytes, kAlignment);
    }
    if (layout.HasAreas() && layout.num_nodes > 1) {
      layout.announced_bytes =
          AlignUp(layout.Announcements(kWire).End(num_sets) * kSignalBytes, kAlignment);
    }
    const int64_t first_set = layout.SignalsBytes() + layout.announced_bytes;
    layout.regions_offset[kWire] = first_set;
    layout.regions_offset[kNode] = first_set + layout.RegionsBytes(kWire);
    layout.areas_offset[kWire] = layout.regions_offset[kNode] + layout.RegionsBytes(kNode);
    layout.areas_offset[kNode] = layout.areas_offset[kWire] + kParities * layout.area_bytes[kWire];
    layout.set_bytes = layout.SetBytes(kWire) + layout.SetBytes(kNode);
    return layout;
  }

  // Whether the payloads of operations with so many rows per rank stand in areas. The same on all
  // ranks: it depends on shapes alone.
  SMFREE_HD constexpr bool UsesAreas(int64_t tokens) const { return tokens > region_rows; }
  constexpr bool HasAreas() const { return area_bytes[kWire] > 0; }

  // The words of the ranks, which lie in memory of the host; those of the wire in this memory, too.
  SMFREE_HD constexpr AnnouncementTable Announcements(Leg leg) const {
    const bool hierarchical = peers[kNode] > 0;
    const int32_t num_ranks = hierarchical ? peers[kNode] : peers[kWire];
    const AnnouncementTable wire{0, num_ranks, hierarchical ? 2 * peers[kWire] : peers[kWire]};
    if (leg == kWire) return wire;
    return {wire.End(num_sets), num_ranks, peers[kNode]};
  }
  constexpr int64_t AnnouncementsBytes() const {
    return Announcements(kNode).End(num_sets) * kSignalBytes;
  }

  // From the start of a rank's memory. `number` is the operation's.
  SMFREE_HD constexpr int64_t SignalOffset(Leg leg, int32_t set, int64_t number,
                                           int32_t source) const {
    const int64_t before = leg == kWire ? 0 : half_sets() * signals_bytes[kWire];
    return before + (int64_t{set} * kParities + ParityOf(number)) * signals_bytes[leg] +
           source * kSignalBytes;
  }
  SMFREE_HD constexpr int64_t SendRegionOffset(Leg leg, int32_t set, int64_t number,
                                               int32_t destination) const {
    return RegionOffset(leg, set, ParityOf(number) * 2, destination);
  }
  SMFREE_HD constexpr int64_t RecvRegionOffset(Leg leg, int32_t set, int64_t number,
                                               int32_t source) const {
    return RegionOffset(leg, set, ParityOf(number) * 2 + 1, source);
  }

  // The area of a leg that operation `number` packs, and the one that it receives in.
  SMFREE_HD constexpr int64_t SendAreaOffset(Leg leg, int32_t set, int64_t number) const {
    return areas_offset[leg] + set * set_bytes + ParityOf(number) * area_bytes[leg];
  }
  SMFREE_HD constexpr int64_t RecvAreaOffset(Leg leg, int32_t set, int64_t number) const {
    return SendAreaOffset(leg, set, number + 1);
  }

  SMFREE_HD constexpr int64_t AnnouncedOffset() const { return SignalsBytes(); }
  SMFREE_HD constexpr int64_t FaultWordOffset() const {
    return half_sets() * (signals_bytes[kWire] + signals_bytes[kNode]);
  }
  SMFREE_HD constexpr int64_t SignalsBytes() const { return FaultWordOffset() + kAlignment; }

  // Bytes of the memory with the first `sets` sets.
  SMFREE_HD constexpr int64_t BytesOfSets(int32_t sets) const {
    return regions_offset[kWire] + sets * set_bytes;
  }
  SMFREE_HD constexpr int64_t TotalBytes() const { return BytesOfSets(num_sets); }

  // By the link that serves them. A leg that leaves the node counts as a whole, since all of it is
  // registered with the network: in hierarchical mode, where nothing is ever cut, two areas of
  // max_tokens * num_nodes rows for each set.
  SMFREE_HD constexpr int64_t RdmaBytes() const { return num_nodes > 1 ? LegBytes(kWire) : 0; }
  SMFREE_HD constexpr int64_t NvlBytes() const {
    return LegBytes(kNode) + (num_nodes > 1 ? 0 : LegBytes(kWire));
  }

 private:
  SMFREE_HD constexpr int64_t half_sets() const { return int64_t{num_sets} * kParities; }
  SMFREE_HD constexpr int64_t RegionOffset(Leg leg, int32_t set, int32_t half, int32_t peer) const {
    return regions_offset[leg] + set * set_bytes + (half * peers[leg] + peer) * region_bytes;
  }
  // Bytes of one set.
  SMFREE_HD constexpr int64_t RegionsBytes(Leg leg) const {
    return int64_t{kParities} * 2 * peers[leg] * region_bytes;
  }
  SMFREE_HD constexpr int64_t SetBytes(Leg leg) const {
    return RegionsBytes(leg) + kParities * area_bytes[leg];
  }
  SMFREE_HD constexpr int64_t LegBytes(Leg leg) const {
    const int64_t shared = leg == kWire ? kAlignment + announced_bytes : 0;
    return shared + half_sets() * signals_bytes[leg] + num_sets * SetBytes(leg);
  }
  static constexpr int64_t WireAreaRows(const GroupConfig& config) {
    const int64_t packed = config.max_tokens * WirePlacesPerRow(config);
    const int64_t received = config.hierarchical ? RelayRows(config, config.max_tokens)
                                                 : WireRows(config, config.max_tokens);
    return packed > received ? packed : received;
  }
  // Operations larger than that announce their counts.
  static constexpr int64_t RegionRows(const GroupConfig& config, int64_t row_bytes) {
    const int64_t pushed = config.sm_push_bytes / row_bytes;
    return pushed < config.max_tokens ? pushed : config.max_tokens;
  }
};
static_assert(sizeof(Layout) == 144 && alignof(Layout) == 8);
static_assert(std::is_trivially_copyable_v<Layout>);

// Bytes that NumSets sets of a rank's group take, by link.
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

// Rows of the expert-grouped array for `tokens` rows per rank: recv_capacity, or the worst case. In
// equal parts that is every row of every rank for each expert.
constexpr int64_t RowsCapacity(const GroupConfig& config, int64_t tokens) {
  if (config.recv_capacity > 0) return config.recv_capacity;
  const int32_t local_experts = config.num_experts / config.num_ranks;
  if (config.padded_groups) {
    return local_experts * AlignUp(config.num_ranks * tokens, config.expert_alignment);
  }
  return MaxRecvRows(config.num_ranks, tokens, config.top_k, local_experts,
                     config.expert_alignment);
}

}  // namespace smfree

#endif  // SMFREE_CSRC_PROTOCOL_LAYOUT_H_
