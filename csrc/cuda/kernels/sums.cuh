// SPDX-License-Identifier: Apache-2.0
//
// S3 and S4 of a combine: messages whose rows are sums.
#ifndef SMFREE_CSRC_CUDA_KERNELS_SUMS_CUH_
#define SMFREE_CSRC_CUDA_KERNELS_SUMS_CUH_

#include <cstdint>

#include "csrc/cuda/kernels/rows.cuh"
#include "csrc/cuda/kernels/tiles.cuh"

namespace smfree::cuda {

// In shared memory.
struct Sums {
  Segments segments;
  Outgoing outgoing[kMaxRanks];
  int32_t num_rows[kMaxRanks];
  Term terms[kWarps][kMaxTopK];
  Rounds rounds;

  // Packs the messages with counts[region] rows and hands them over, by all threads of all blocks.
  // `terms_of(region, row, piece, terms)`, by a warp, fills in the terms of a row and returns their
  // number, the same in all lanes; or -1 if the rank is at fault.
  template <typename T, typename Word, typename TermsOf>
  __device__ void Pack(const Messages& m, const int32_t* counts, const TermsOf& terms_of) {
    const Context& c = m.c;
    for (int32_t region = threadIdx.x; region < m.count(); region += blockDim.x) {
      num_rows[region] = counts[region];
      outgoing[region] = OutgoingTo(m, region, num_rows[region]);
    }
    rounds.Clear();
    __syncthreads();
    if (threadIdx.x < kWarp) segments.Build(m, num_rows, /*own_first=*/false);
    HandOverEmpty(m, outgoing);
    __syncthreads();

    const int32_t lane = static_cast<int32_t>(threadIdx.x) % kWarp;
    Term* const of_warp = terms[threadIdx.x / kWarp];
    int32_t at = 0, tile_at = 0;  // segments of this warp's row and of the tile
    const auto pack = [&](int32_t unit, int32_t piece) {
      at = segments.Find(unit, at);
      const Segment& segment = segments.segment[at];
      const int32_t row = segment.row + unit - segment.first;
      const int32_t count = terms_of(segment.region, row, piece, of_warp);
      __syncwarp();
      if (count < 0) return;
      SumRows<T, Word>(Words(c.x_row_bytes, sizeof(Word), piece, c.pieces),
                       outgoing[segment.region].rows + row * c.layout.row_bytes, of_warp, count);
    };
    ForEachTile(c, rounds, segments.rows, pack, [&](int32_t first, int32_t rows) {
      if (c.nodes.hierarchical && Faulted(c)) return;  // a relay's tile may not be complete
      tile_at = segments.Find(first, tile_at);
      if (lane >= rows) return;
      const Segment& segment = segments.segment[segments.Find(first + lane, tile_at)];
      CountRow(m, segment.region, outgoing[segment.region].chunks,
               segment.row + first + lane - segment.first);
    });
  }
};

}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_KERNELS_SUMS_CUH_
