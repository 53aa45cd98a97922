// SPDX-License-Identifier: Apache-2.0
//
// The order in which the rows of all messages of a leg are worked on.
#ifndef SMFREE_CSRC_CUDA_KERNELS_ROW_ORDER_CUH_
#define SMFREE_CSRC_CUDA_KERNELS_ROW_ORDER_CUH_

#include <cstdint>

#include "csrc/cuda/kernels/arrivals.cuh"

namespace smfree::cuda {

// Rows of one message and one chunk.
struct ChunkRows {
  int32_t first;  // how many rows stand before it in the order
  int32_t region;
  int32_t row;  // its first row in the message
  int32_t chunk;
};

// In the order of chunks: the first of every message, then the second … A rank's messages to itself
// come first where rows are received (they are here already), last where they are sent (the wire
// waits for the others). In shared memory.
struct RowOrder {
  int32_t count;     // of chunks
  int32_t num_rows;  // of all of them
  ChunkRows chunks[kMaxChunksOfLeg];

  // By the first warp. rows_of: the rows of each message. Of `period` regions that follow one
  // another, one is a message of the rank to itself.
  __device__ void Build(const Messages& m, const int32_t* rows_of, bool own_first) {
    const GroupConstants& g = m.g;
    const OperationParams& op = m.op;
    const int32_t warp_lane = static_cast<int32_t>(threadIdx.x) % kWarp;
    const int32_t period = g.nodes.Members(m.leg);
    const int32_t own = g.nodes.RegionAtPeer(m.leg, g.rank, /*region=*/0) % period;
    const int32_t num_own = m.count() / period;
    const int32_t num_others = m.count() - num_own;
    count = op.chunks * num_others + num_own;
    int32_t before = 0;
    for (int32_t base = 0; base < count; base += kWarp) {
      const int32_t at = base + warp_lane;
      const int32_t other = own_first ? at - num_own : at;  // outside of [0, chunks * others): own
      ChunkRows mine{0, own, 0, 0};
      int32_t size = 0;
      if (other >= 0 && other < op.chunks * num_others) {
        const int32_t message = other % num_others;
        mine.region = message / (period - 1) * period + (own + 1 + message % (period - 1)) % period;
        mine.chunk = other / num_others;
        const Chunks cut = m.ChunksFrom(mine.region, rows_of[mine.region]);
        if (mine.chunk < cut.count) {
          mine.row = cut.Begin(mine.chunk);
          size = cut.RowsIn(mine.chunk);
        }
      } else if (at < count) {
        mine.region = (own_first ? at : at - op.chunks * num_others) * period + own;
        size = rows_of[mine.region];
      }
      const int32_t up_to = SumUpToLane(size);
      mine.first = before + up_to - size;
      if (at < count) chunks[at] = mine;
      before += __shfl_sync(~0u, up_to, kWarp - 1);
    }
    num_rows = before;
  }

  // The chunk that has row `row` of the order, from `at` on.
  __device__ int32_t Find(int32_t row, int32_t at) const {
    while (at + 1 < count && chunks[at + 1].first <= row) ++at;
    return at;
  }
};

// A warp's way through the rows that arrive.
struct ArrivingRows {
  const Messages& m;
  const RowOrder& order;
  const int32_t* rows_of;  // the rows of each message
  Arrivals& arrivals;

  int32_t at = 0;  // in order.chunks
  int32_t region = -1, chunk = -1;
  bool here = true;  // else the rank has failed

  // Goes on to row `row` of the order, and waits for it; its number in message `region`. By all
  // threads of the warp.
  __device__ int32_t GoTo(int32_t row) {
    at = order.Find(row, at);
    const ChunkRows& rows = order.chunks[at];
    if (rows.region != region || rows.chunk != chunk) {
      region = rows.region;
      chunk = rows.chunk;
      const int32_t wanted = ChunksThrough(chunk, m.ChunksFrom(region, rows_of[region]).count);
      if (threadIdx.x % kWarp == 0) here = WaitForChunks(m, region, wanted, arrivals);
      here = __shfl_sync(~0u, here, 0);
    }
    return rows.row + row - rows.first;
  }
};

}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_KERNELS_ROW_ORDER_CUH_
