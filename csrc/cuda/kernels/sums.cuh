// SPDX-License-Identifier: Apache-2.0
//
// S3 and S4 of a combine: messages whose rows are sums.
#ifndef SMFREE_CSRC_CUDA_KERNELS_SUMS_CUH_
#define SMFREE_CSRC_CUDA_KERNELS_SUMS_CUH_

#include <cstdint>

#include "csrc/cuda/kernels/packing.cuh"
#include "csrc/cuda/kernels/row_order.cuh"
#include "csrc/cuda/kernels/row_kinds.cuh"
#include "csrc/cuda/kernels/tiles.cuh"

namespace smfree::cuda {

// In shared memory.
struct Sums {
  RowOrder order;
  Outgoing outgoing[kMaxRanks];
  int32_t num_rows[kMaxRanks], first_row[kMaxRanks];  // of each message, and of those before it
  Term terms[kWarps][kMaxTopK];
  Rounds rounds;

  // Packs the messages with counts[region] rows and hands them over, by all threads of all blocks.
  // By a warp: `terms_of(region, row, piece, terms)` fills in the terms of a row and returns their
  // number, the same in all threads: 0 for a row that is lost, -1 if the rank has failed; then
  // `sum(piece, terms, number, row)` writes the row.
  template <typename TermsOf, typename Sum>
  __device__ void Pack(const Messages& m, const int32_t* counts, const TermsOf& terms_of,
                       const Sum& sum) {
    const GroupConstants& g = m.g;
    const OperationParams& op = m.op;
    for (int32_t region = threadIdx.x; region < m.count(); region += blockDim.x) {
      num_rows[region] = counts[region];
      outgoing[region] = OutgoingTo(m, region, num_rows[region]);
    }
    rounds.Clear();
    __syncthreads();
    if (threadIdx.x < kWarp) {
      order.Build(m, num_rows, /*own_first=*/false);
    } else if (threadIdx.x < 2 * kWarp) {
      CountRowsBefore(m.count(), num_rows, first_row);
    }
    HandOverEmpty(m, outgoing);
    __syncthreads();

    const int32_t warp_lane = static_cast<int32_t>(threadIdx.x) % kWarp;
    Term* const of_warp = terms[threadIdx.x / kWarp];
    int32_t at = 0, tile_at = 0;  // chunks of this warp's row and of the tile, in the order
    const auto pack = [&](int32_t unit, int32_t piece) {
      at = order.Find(unit, at);
      const ChunkRows& chunk = order.chunks[at];
      const int32_t row = chunk.row + unit - chunk.first;
      const int32_t count = terms_of(chunk.region, row, piece, of_warp);
      __syncwarp();
      if (count < 0) return;
      char* const out = outgoing[chunk.region].first_row + row * op.stride;
      if (count == 0) return FillMessageRow(op, piece, out, g.drop_overflow ? kZeros : kNaNs);
      sum(piece, of_warp, count, out);
    };
    ForEachTile(op, rounds, order.num_rows, pack, [&](int32_t first, int32_t rows) {
      if (g.nodes.hierarchical && Faulted(g)) return;  // a relay's tile may not be complete
      tile_at = order.Find(first, tile_at);
      if (warp_lane >= rows) return;
      const ChunkRows& chunk = order.chunks[order.Find(first + warp_lane, tile_at)];
      CountRow(m, chunk.region, outgoing[chunk.region],
               chunk.row + first + warp_lane - chunk.first);
    });
  }
};

}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_KERNELS_SUMS_CUH_
