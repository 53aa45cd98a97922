// SPDX-License-Identifier: Apache-2.0
//
// The tiles in which the blocks of a kernel pack rows.
#ifndef SMFREE_CSRC_CUDA_KERNELS_TILES_CUH_
#define SMFREE_CSRC_CUDA_KERNELS_TILES_CUH_

#include <cstdint>

#include "csrc/cuda/kernels/phase.cuh"

namespace smfree::cuda {

// A block packs one tile of rows per round, a piece per warp, and the last warp to end its piece
// counts the tile. Warps do not wait for one another, unless one is kRounds ahead. In shared
// memory.
struct Rounds {
  static constexpr uint32_t kRounds = 4;
  uint32_t ended[kRounds];  // pieces, ever, of the rounds that share the word

  // By all threads of a block, which meet afterwards.
  __device__ void Clear() {
    if (threadIdx.x < kRounds) ended[threadIdx.x] = 0;
  }
  // Before a warp's work in `round`, by all of its threads.
  __device__ void Begin(uint32_t round) {
    volatile uint32_t& word = ended[round % kRounds];
    while (word < round / kRounds * kWarps) __nanosleep(20);
    __syncwarp();
  }
  // After it, the same in all threads: whether this was the block's last piece of the round. If so,
  // all of them are visible at gpu scope to what this warp does next.
  __device__ bool End(uint32_t round) {
    __syncwarp();
    uint32_t before = 0;
    if (threadIdx.x % kWarp == 0) {
      __threadfence_block();  // the piece, before the count
      before = atomicAdd(&ended[round % kRounds], 1u);
      __threadfence_block();  // the others' counts, before what the threads below read
    }
    before = __shfl_sync(~0u, before, 0);
    if (before % kWarps != kWarps - 1) return false;
    __syncwarp();
    __threadfence();
    return true;
  }
};

// Calls pack(row, piece) for the pieces of rows [0, rows), each by one warp; and
// count(first row, rows) for each tile when it is written and visible to the warp that is called.
template <typename Pack, typename Count>
__device__ void ForEachTile(const OperationParams& op, Rounds& rounds, int32_t rows,
                            const Pack& pack, const Count& count) {
  const auto warp = static_cast<int32_t>(threadIdx.x) / kWarp;
  const int32_t tile_rows = kWarps / op.pieces;
  uint32_t round = 0;
  for (int32_t tile = static_cast<int32_t>(blockIdx.x) * tile_rows; tile < rows;
       tile += static_cast<int32_t>(gridDim.x) * tile_rows, ++round) {
    rounds.Begin(round);
    const int32_t row = tile + warp / op.pieces;
    if (row < rows) pack(row, warp % op.pieces);
    if (!rounds.End(round)) continue;
    count(tile, min(tile_rows, rows - tile));
    __syncwarp();
  }
}

}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_KERNELS_TILES_CUH_
