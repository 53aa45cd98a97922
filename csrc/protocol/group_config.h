// SPDX-License-Identifier: Apache-2.0
//
// What all ranks of a group agree on before anything is sent: EpConfig in C++. A field of it is
// written down here and bound in ffi/module.cc, and nowhere else.
#ifndef SMFREE_CSRC_PROTOCOL_GROUP_CONFIG_H_
#define SMFREE_CSRC_PROTOCOL_GROUP_CONFIG_H_

#include <cstdint>

#include "csrc/protocol/host_device.h"
#include "csrc/protocol/nodes.h"

namespace smfree {

enum class Overflow : int32_t { kError = 0, kDrop = 1 };

// The longest deadline: poll counts milliseconds in 32 bits (24 days), clocks nanoseconds in 63;
// this leaves room for what is added: the time now, and the grace of whoever waits for a relay.
constexpr double kMaxTimeoutS = 1e6;
constexpr bool IsTimeout(double seconds) { return seconds > 0 && seconds <= kMaxTimeoutS; }

struct GroupConfig {
  int32_t num_ranks = 1;
  int32_t ranks_per_node = 0;  // 0 = all ranks form one node
  bool hierarchical = false;
  int32_t num_experts = 1;
  int32_t top_k = 1;
  int32_t num_lanes = 1;
  int32_t num_sets = 0;  // GPUs only; 0 = the default of NumSets
  int32_t expert_alignment = 1;
  int64_t row_bytes = 1;  // of the longest row
  int64_t max_tokens = 1;
  int64_t recv_capacity = 0;  // rows; 0 = the worst case
  int64_t wire_capacity = 0;  // rows; 0 = the default of WireCapacity
  // Where the groups of the local experts stand in the expert-grouped array: each in an equal part
  // of it, or one behind the other.
  bool padded_groups = false;
  Overflow overflow = Overflow::kError;
  bool differentiable = true;
  double timeout_s = 60.0;
  // GPUs only. Operations that send up to so many bytes of rows per peer are stored to the peer by
  // the pack kernel; larger ones go by copy engine.
  int64_t sm_push_bytes = 0;
  // GPUs only. Messages to other nodes are put by the GPU, not by the mover.
  bool puts_on_device = false;
};

constexpr Nodes NodesOf(const GroupConfig& config) {
  return {config.num_ranks, config.ranks_per_node > 0 ? config.ranks_per_node : config.num_ranks,
          config.hierarchical};
}

// The most rows that a rank receives in one dispatch, before they are spread over experts: a row
// counts once per source rank that sends it here, the own rows included. The default follows from
// recv_capacity: a row that travels has at least one copy, so what does not fit on the wire would
// not fit into the expert-grouped array either.
constexpr int64_t WireCapacity(const GroupConfig& config) {
  if (config.wire_capacity > 0) return config.wire_capacity;
  const int64_t all = config.num_ranks * config.max_tokens;
  return config.recv_capacity > 0 && config.recv_capacity < all ? config.recv_capacity : all;
}

// The same where every rank sends up to `tokens` rows.
constexpr int64_t WireRows(const GroupConfig& config, int64_t tokens) {
  const int64_t all = config.num_ranks * tokens;
  return all < WireCapacity(config) ? all : WireCapacity(config);
}

// Whether more rows may come than are kept.
constexpr bool MayCut(const GroupConfig& config, int64_t tokens) {
  return WireRows(config, tokens) < config.num_ranks * tokens;
}

// The most rows that a relay takes from the wire in a dispatch of hierarchical mode: as each goes
// to a rank of its node, those of all messages but the last one taken are fewer than what is handed
// on.
constexpr int64_t RelayRows(const GroupConfig& config, int64_t tokens) {
  const int64_t all = NodesOf(config).count() * tokens;
  const int64_t taken = WireRows(config, tokens) + tokens;
  return all < taken ? all : taken;
}
// Whether a relay takes a message from the wire, whole, or nothing of it: those of the lower nodes
// become `handed_before` rows inside its own.
SMFREE_HD constexpr bool IsTaken(int64_t handed_before, int64_t capacity) {
  return handed_before < capacity;
}

// How many of the `rows` rows from a source are kept where `capacity` fit: those of the lower
// sources, `rows_before`, come first, and of each source its first rows. The others are cut. In the
// same way a relay hands on the first `capacity` rows of all its messages, by region.
SMFREE_HD constexpr int64_t KeptRows(int64_t rows_before, int64_t rows, int64_t capacity) {
  const int64_t room = capacity > rows_before ? capacity - rows_before : 0;
  return rows < room ? rows : room;
}

// How many rows of the messages of a leg are taken where they arrive, asked for by region: all of a
// combine; of a dispatch what is kept, or, by a relay, whole messages.
struct Taking {
  bool cuts, by_relay;
  int64_t capacity;
  int64_t before = 0;

  SMFREE_HD constexpr Taking(const Nodes& nodes, Leg leg, Operation operation, int64_t wire_rows)
      : cuts(operation == Operation::kDispatch),
        by_relay(nodes.hierarchical && leg == kWire),
        capacity(wire_rows) {}
  // How many of the next message's `rows` are taken; a relay makes `rows_in_node` of them.
  SMFREE_HD constexpr int64_t Next(int64_t rows, int64_t rows_in_node) {
    if (!cuts) return rows;
    const int64_t kept = KeptRows(before, rows, capacity);
    const int64_t taken = !by_relay ? kept : IsTaken(before, capacity) ? rows : 0;
    before += by_relay ? rows_in_node : rows;
    return taken;
  }
};

constexpr int32_t kMaxSets = 32;  // bits of a word, threads of a warp

// How many sets a GPU group among processes has, which are as many operations as may be in flight
// together; others have what their programs need. By default each lane has one for what the program
// wrote, one for gradients, and one for what is computed again; and calls that no data order have
// one or two more, because XLA begins them early; not in hierarchical mode, where a set is large,
// with areas for both legs (layout.h).
constexpr int32_t NumSets(const GroupConfig& config) {
  if (config.num_sets > 0) return config.num_sets;
  const int32_t for_lanes = config.num_lanes * (config.differentiable ? 3 : 1);
  const int32_t more =
      config.hierarchical ? 0 : config.differentiable ? 2 : 1;
  return for_lanes + more < kMaxSets ? for_lanes + more : kMaxSets;
}

// How many a group in one process begins with: by default one for each lane.
constexpr int32_t FirstSets(const GroupConfig& config) {
  const int32_t sets = config.num_sets > 0 ? config.num_sets : config.num_lanes;
  return sets < kMaxSets ? sets : kMaxSets;
}

// Places of a row: the most ranks that one row goes to.
constexpr int32_t PlacesPerRow(const GroupConfig& config) {
  return config.top_k < config.num_ranks ? config.top_k : config.num_ranks;
}

// Messages of the wire that one row is in: to ranks or, in hierarchical mode, to nodes.
constexpr int32_t WirePlacesPerRow(const GroupConfig& config) {
  const int32_t messages = NodesOf(config).Regions(kWire);
  return config.top_k < messages ? config.top_k : messages;
}

// The most ranks of one node that one row goes to.
constexpr int32_t PlacesPerNode(const GroupConfig& config) {
  const int32_t ranks = NodesOf(config).ranks_per_node;
  return config.top_k < ranks ? config.top_k : ranks;
}

}  // namespace smfree

#endif  // SMFREE_CSRC_PROTOCOL_GROUP_CONFIG_H_
