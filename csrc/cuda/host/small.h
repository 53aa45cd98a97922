// SPDX-License-Identifier: Apache-2.0
//
// Small operations: which ones the kernels store to the peers themselves, and which of them have
// one kernel per phase. Both follow from shapes and the config, so all ranks choose alike; the
// messages are the same in any case.
#ifndef SMFREE_CSRC_CUDA_HOST_SMALL_H_
#define SMFREE_CSRC_CUDA_HOST_SMALL_H_

#include <cstdint>

#include "csrc/protocol/group_config.h"
#include "csrc/protocol/host_device.h"
#include "csrc/protocol/layout.h"
#include "csrc/protocol/nodes.h"

namespace smfree::cuda {

// What routing counts the rows of: experts, ranks and nodes.
SMFREE_HD constexpr int32_t RouteBins(const Nodes& nodes, int32_t num_experts) {
  return num_experts + nodes.num_ranks + (nodes.hierarchical ? nodes.count() : 0);
}
// Words of a bit per row. Odd, so that the same words of neighbouring bins are in different banks
// of shared memory.
SMFREE_HD constexpr int32_t BitWords(int64_t rows) {
  return static_cast<int32_t>((rows + 31) / 32) | 1;
}

// In a fused dispatch_send every block routes all rows for itself: a few slots per thread, and bits
// that fit into shared memory beside the rest without more being asked for.
constexpr int64_t kMostFusedSlots = 4096;
constexpr int64_t kMostFusedBitWords = 8192;

// Whether rows are stored to near peers by the kernel that packs them. `stride`: of a row in a
// message.
constexpr bool IsPushed(const GroupConfig& config, const Layout& layout, int64_t tokens,
                        int64_t stride) {
  return !layout.UsesAreas(tokens) && tokens * stride <= config.sm_push_bytes;
}

// Whether each phase that a program without gradients has is one kernel. Its last block raises all
// signals, so all peers are near.
constexpr bool IsFused(const GroupConfig& config, const Layout& layout, int64_t tokens,
                       int64_t stride) {
  const Nodes nodes = NodesOf(config);
  return IsPushed(config, layout, tokens, stride) && nodes.count() == 1 && !nodes.hierarchical &&
         tokens * config.top_k <= kMostFusedSlots &&
         int64_t{RouteBins(nodes, config.num_experts)} * BitWords(tokens) <= kMostFusedBitWords;
}

}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_HOST_SMALL_H_
