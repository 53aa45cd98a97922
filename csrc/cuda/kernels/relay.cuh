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

#include "csrc/cuda/kernels/places.cuh"

namespace smfree::cuda {
namespace {

// Rows of one node's message on the wire that a block places at once.
struct RelayTile {
  int32_t node, first_row, num_rows;
  int32_t first_region;  // inside the node

  __device__ RelayTile(const Context& c, int32_t tile) {
    const int32_t per_node = Launch::BlocksForPlaces(c.tokens);
    node = tile / per_node;
    first_row = tile % per_node * kPlacedRows;
    num_rows = min(kPlacedRows, c.tokens - first_row);
    first_region = node * c.nodes.ranks_per_node;
  }
};

__host__ __device__ inline int32_t RelayTiles(const Context& c) {
  return c.nodes.count() * Launch::BlocksForPlaces(c.tokens);
}

// Calls body(tile) for all tiles, by all threads of all blocks. They wait for others, so they are no
// more than leave room for puts (far_peers.h).
template <typename Body>
__device__ void ForEachRelayTile(const Context& c, const Body& body) {
  for (int32_t tile = static_cast<int32_t>(blockIdx.x); tile < RelayTiles(c);
       tile += static_cast<int32_t>(gridDim.x)) {
    body(RelayTile(c, tile));
    __syncthreads();  // the next tile takes the shared memory
  }
}
inline int32_t RelayBlocks(const Context& c, const Launch& launch) {
  return std::min(RelayTiles(c), launch.num_sms * kBlocksPerSm);
}

// Row `row` of node `node` in `relay`.
template <typename Int>
__device__ Int* RelayOf(const Context& c, Int* relay, int32_t node, int32_t row) {
  return relay + (int64_t{node} * c.tokens + row) * c.relay_width;
}

// The lists of a handle's relay, by index. What no dispatch can have made is a fault.
__device__ inline void CountRelay(const Context& c, int64_t number, const int32_t* relay,
                                  const RelayTile& tile, Lists& lists) {
  const auto report = [&](int32_t row, int32_t place) {
    Report(c, FaultKind::kInvalidArgument, number, {-1, row, c.tokens, place});
  };
  lists.Count(c.tokens, c.nodes.ranks_per_node, tile.first_row, [&](int32_t row) {
    int32_t broken = -1;
    const uint64_t indices = ListsOf(RelayOf(c, relay, tile.node, row), c.relay_width, c.tokens,
                                     c.nodes.ranks_per_node, &broken);
    if (broken != -1) report(row, broken);
    return indices;
  });
  for (int32_t at = threadIdx.x; at < tile.num_rows; at += blockDim.x) {
    const int32_t row = tile.first_row + at;
    const int32_t* const places = RelayOf(c, relay, tile.node, row);
    int32_t p = 0;
    for (int32_t index = 0; index < c.nodes.ranks_per_node; ++index) {
      if (!lists.Has(index, at)) continue;
      if (places[p] != index * c.tokens + lists.Position(index, at)) report(row, places[p]);
      ++p;
    }
    if ((p > 0) != (row < lists.rows)) report(row, -1);
    if (p < c.relay_width && places[p] != -1) report(row, places[p]);  // a rank twice
  }
}

// How many rows the messages have that this relay gets and sends on. For one tile of each node.
__device__ inline void WriteRelayRows(const Context& c, const RelayTile& tile,
                                      const Lists& lists) {
  for (int32_t i = threadIdx.x; i < c.nodes.ranks_per_node; i += blockDim.x) {
    c.scratch->relay_node_rows[tile.first_region + i] = lists.total[i];
  }
  if (threadIdx.x == 0) c.scratch->relay_wire_rows[tile.node] = lists.rows;
}

}  // namespace
}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_KERNELS_RELAY_CUH_
