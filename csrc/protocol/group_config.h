// SPDX-License-Identifier: Apache-2.0
//
// What all ranks of a group agree on before anything is sent: EpConfig in C++. A field of it is
// written down here and bound in ffi/module.cc, and nowhere else.
#ifndef SMFREE_CSRC_PROTOCOL_GROUP_CONFIG_H_
#define SMFREE_CSRC_PROTOCOL_GROUP_CONFIG_H_

#include <cstdint>

#include "csrc/protocol/nodes.h"

namespace smfree {

enum class DType : int32_t { kF32 = 0, kBF16 = 1, kF16 = 2 };
constexpr int64_t ItemBytes(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

enum class Overflow : int32_t { kError = 0, kDrop = 1 };

// Of a deadline. Poll counts milliseconds in 32 bits (24 days), steady clocks nanoseconds in 63;
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
  int32_t expert_alignment = 1;
  int64_t hidden = 1;
  int64_t max_tokens = 1;
  int64_t recv_capacity = 0;  // rows; 0 = the worst case
  DType dtype = DType::kF32;
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

// Places of a row: the most ranks that one row goes to.
constexpr int32_t PlacesPerRow(const GroupConfig& config) {
  return config.top_k < config.num_ranks ? config.top_k : config.num_ranks;
}

// The most ranks of one node that one row goes to.
constexpr int32_t PlacesPerNode(const GroupConfig& config) {
  const int32_t ranks = NodesOf(config).ranks_per_node;
  return config.top_k < ranks ? config.top_k : ranks;
}

}  // namespace smfree

#endif  // SMFREE_CSRC_PROTOCOL_GROUP_CONFIG_H_
