// SPDX-License-Identifier: Apache-2.0
//
// Nodes: which rank is where, and who exchanges messages with whom on each leg of an operation.
//
//   direct         kWire   every rank with every rank              regions = ranks
//   hierarchical   kWire   the ranks of one index, of all nodes    regions = nodes
//                  kNode   the ranks of a node                     regions = ranks
//
// A region is room for one message of one operation, at its sender and at its receiver. On kNode
// a rank exchanges one message with each rank of its node for each node (PROTOCOL.md, "Hierarchical
// mode"): region n * ranks_per_node + i is that with index i, for node n. In a dispatch this is what
// rank n * ranks_per_node + i has sent here.
#ifndef SMFREE_CSRC_PROTOCOL_NODES_H_
#define SMFREE_CSRC_PROTOCOL_NODES_H_

#include <cstdint>

#include "csrc/protocol/host_device.h"
#include "csrc/protocol/identity.h"

namespace smfree {

enum Leg : int32_t { kWire = 0, kNode = 1 };
constexpr int32_t kLegs = 2;

// The ranks of node n are n * ranks_per_node + 0, 1, …, ranks_per_node - 1: index 0, 1, ….
struct Nodes {
  int32_t num_ranks;
  int32_t ranks_per_node;
  bool hierarchical;

  SMFREE_HD constexpr int32_t count() const { return num_ranks / ranks_per_node; }
  SMFREE_HD constexpr int32_t NodeOf(int32_t rank) const { return rank / ranks_per_node; }
  SMFREE_HD constexpr int32_t IndexOf(int32_t rank) const { return rank % ranks_per_node; }

  // Messages that a rank sends, and receives, in one operation on a leg.
  SMFREE_HD constexpr int32_t Regions(Leg leg) const {
    if (leg == kWire) return hierarchical ? count() : num_ranks;
    return hierarchical ? num_ranks : 0;
  }
  // The rank at the other end of a region of `rank`.
  SMFREE_HD constexpr int32_t Peer(Leg leg, int32_t rank, int32_t region) const {
    if (!hierarchical) return region;
    if (leg == kWire) return region * ranks_per_node + IndexOf(rank);
    return NodeOf(rank) * ranks_per_node + IndexOf(region);
  }
  // How many ranks exchange messages on a leg with `rank`, itself among them. The i-th of them is
  // Peer(leg, rank, i), and at the other end of regions i, i + Members, i + 2 * Members, ….
  SMFREE_HD constexpr int32_t Members(Leg leg) const {
    return leg == kWire ? Regions(kWire) : ranks_per_node;
  }
  // The region of that peer in which a message from the region of `rank` arrives.
  SMFREE_HD constexpr int32_t RegionAtPeer(Leg leg, int32_t rank, int32_t region) const {
    if (!hierarchical) return rank;
    if (leg == kWire) return NodeOf(rank);
    return NodeOf(region) * ranks_per_node + IndexOf(rank);
  }

  // The leg that an operation takes first, and the one on which it arrives.
  SMFREE_HD constexpr Leg FirstLeg(Operation operation) const {
    return hierarchical && operation == Operation::kCombine ? kNode : kWire;
  }
  SMFREE_HD constexpr Leg LastLeg(Operation operation) const {
    return hierarchical && operation == Operation::kDispatch ? kNode : kWire;
  }
};

}  // namespace smfree

#endif  // SMFREE_CSRC_PROTOCOL_NODES_H_
