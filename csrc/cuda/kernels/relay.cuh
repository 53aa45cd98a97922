// SPDX-License-Identifier: Apache-2.0
//
// The relay: what a rank does for others between the two legs of an operation in hierarchical mode
// (PROTOCOL.md, R1 and R2).
//
// Its routing, `relay` [M,T,Q] in a handle, are places (places.cuh): the i-th row that the rank
// with this index in node n has sent here goes to the ranks of this node at relay[n,i,:]. Inside
// the node their messages are regions n * L + 0 … L - 1.
#ifndef SMFREE_CSRC_CUDA_KERNELS_RELAY_CUH_
#define SMFREE_CSRC_CUDA_KERNELS_RELAY_CUH_

#include <algorithm>
#include <cstdint>

#include "csrc/cuda/kernels/arrivals.cuh"
#include "csrc/cuda/kernels/places.cuh"

namespace smfree::cuda {
namespace {

// Rows of one node's message on the wire that a block places at once.
struct RelayTile {
  int32_t node, first_row, num_rows;
  int32_t first_region;  // inside the node

  __device__ RelayTile(const GroupConstants& g, const OperationParams& op, int32_t tile) {
    const int32_t per_node = LaunchParams::BlocksForPlaces(op.tokens);
    node = tile / per_node;
    first_row = tile % per_node * kPlacedRows;
    num_rows = min(kPlacedRows, op.tokens - first_row);
    first_region = node * g.nodes.ranks_per_node;
  }
};

__host__ __device__ inline int32_t RelayTiles(const GroupConstants& g, const OperationParams& op) {
  return g.nodes.count() * LaunchParams::BlocksForPlaces(op.tokens);
}

// Calls body(tile) for all tiles, by all threads of all blocks. They wait for others, so they are no
// more than leave room for puts (far_peers.h).
template <typename Body>
__device__ void ForEachRelayTile(const GroupConstants& g, const OperationParams& op,
                                 const Body& body) {
  for (int32_t tile = static_cast<int32_t>(blockIdx.x); tile < RelayTiles(g, op);
       tile += static_cast<int32_t>(gridDim.x)) {
    body(RelayTile(g, op, tile));
    __syncthreads();  // the next tile takes the shared memory
  }
}
inline int32_t RelayBlocks(const GroupConstants& g, const OperationParams& op,
                           const LaunchParams& launch) {
  return std::min(RelayTiles(g, op), launch.num_sms * kBlocksPerSm);
}

// Row `row` of node `node` in `relay`.
template <typename Int>
__device__ Int* RelayOf(const GroupConstants& g, const OperationParams& op, Int* relay,
                        int32_t node, int32_t row) {
  return relay + (int64_t{node} * op.tokens + row) * g.relay_width;
}

// The lists of a handle's relay, by index. What no dispatch can have made is a fault.
__device__ inline void CountRelay(const GroupConstants& g, const OperationParams& op,
                                  int64_t number, const int32_t* relay, const RelayTile& tile,
                                  Lists& lists) {
  const auto report = [&](int32_t row, int32_t place) {
    Report(g, op, FaultKind::kInvalidArgument, number, {-1, row, op.tokens, place});
  };
  lists.Count(op.tokens, g.nodes.ranks_per_node, tile.first_row, [&](int32_t row) {
    int32_t broken = -1;
    const uint64_t indices = ListsOf(RelayOf(g, op, relay, tile.node, row), g.relay_width,
                                     op.tokens, g.nodes.ranks_per_node, &broken);
    if (broken != -1) report(row, broken);
    return indices;
  });
  for (int32_t at = threadIdx.x; at < tile.num_rows; at += blockDim.x) {
    const int32_t row = tile.first_row + at;
    const int32_t* const places = RelayOf(g, op, relay, tile.node, row);
    int32_t p = 0;
    for (int32_t index = 0; index < g.nodes.ranks_per_node; ++index) {
      if (!lists.Has(index, at)) continue;
      if (places[p] != index * op.tokens + lists.Position(index, at)) report(row, places[p]);
      ++p;
    }
    if ((p > 0) != (row < lists.num_rows)) report(row, -1);
    if (p < g.relay_width && places[p] != -1) report(row, places[p]);  // a rank twice
  }
}

// How many rows the messages have that this relay gets and sends on, of `node_rows` by region. For
// one tile of each node.
__device__ inline void WriteRelayRows(const GroupConstants& g, const SetPointers& set,
                                      const RelayTile& tile, const int32_t* node_rows,
                                      int32_t wire_rows) {
  for (int32_t i = threadIdx.x; i < g.nodes.ranks_per_node; i += blockDim.x) {
    const int32_t region = tile.first_region + i;
    set.scratch->relay_node_rows[region] = node_rows[region];
  }
  if (threadIdx.x == 0) set.scratch->relay_wire_rows[tile.node] = wire_rows;
}

}  // namespace
}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_KERNELS_RELAY_CUH_
