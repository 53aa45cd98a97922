// SPDX-License-Identifier: Apache-2.0
//
// How the messages that a rank packs lie one behind the other, and what it announces of them (S2).
#ifndef SMFREE_CSRC_CUDA_KERNELS_PACKING_CUH_
#define SMFREE_CSRC_CUDA_KERNELS_PACKING_CUH_

#include <cstdint>

#include "csrc/cuda/kernels/messages.cuh"
#include "csrc/protocol/announcement.h"

namespace smfree::cuda {

// Sums over the messages of a leg, of which rows[region] have so many rows.
struct Totals {
  int64_t rows, payload_bytes;
};

// How many rows the messages before each one have, and where its payload begins in an area where
// they stand one behind the other; `left_out(region)`: it does not stand there. Neither is written
// where it is null. By one warp.
template <typename LeftOut>
__device__ Totals LayOutMessages(const Messages& m, const int32_t* rows, int32_t* first_row,
                                 int64_t* payload_at, const LeftOut& left_out) {
  const auto warp_lane = static_cast<int32_t>(threadIdx.x) % kWarp;
  Totals totals{0, 0};
  for (int32_t base = 0; base < m.count(); base += kWarp) {
    const int32_t region = base + warp_lane;
    const int64_t mine = region < m.count() ? rows[region] : 0;
    const int64_t bytes =
        region < m.count() && !left_out(region) ? LayoutOf(m.op, mine).bytes : 0;
    const int64_t rows_up_to = SumUpToLane(mine);
    const int64_t bytes_up_to = SumUpToLane(bytes);
    if (region < m.count() && first_row != nullptr) {
      first_row[region] = static_cast<int32_t>(totals.rows + rows_up_to - mine);
    }
    if (region < m.count() && payload_at != nullptr) {
      payload_at[region] = totals.payload_bytes + bytes_up_to - bytes;
    }
    totals.rows += __shfl_sync(~0u, rows_up_to, kWarp - 1);
    totals.payload_bytes += __shfl_sync(~0u, bytes_up_to, kWarp - 1);
  }
  return totals;
}

// The rows of the messages before each one, by a warp.
__device__ inline void CountRowsBefore(int32_t count, const int32_t* rows, int32_t* first_row) {
  const auto warp_lane = static_cast<int32_t>(threadIdx.x) % kWarp;
  int32_t before = 0;
  for (int32_t base = 0; base < count; base += kWarp) {
    const int32_t region = base + warp_lane;
    const int32_t mine = region < count ? rows[region] : 0;
    const int32_t up_to = SumUpToLane(mine);
    if (region < count) first_row[region] = before + up_to - mine;
    before += __shfl_sync(~0u, up_to, kWarp - 1);
  }
}

// The last of `count` numbers at(0), at(1), … in ascending order that is at most `value`; the first
// one if none is.
template <typename At>
__device__ int32_t LastUpTo(int32_t count, int32_t value, const At& at) {
  int32_t last = 0;
  for (int32_t step = 1 << (31 - __clz(count)); step > 0; step /= 2) {
    if (last + step < count && at(last + step) <= value) last += step;
  }
  return last;
}

// Which message has row `row` of all of them, given the rows before each.
__device__ inline int32_t MessageOf(const int32_t* first_row, int32_t count, int32_t row) {
  return LastUpTo(count, row, [first_row](int32_t message) { return first_row[message]; });
}

// The same, given the rows of each, one message after the other.
__device__ inline int32_t MessageAmong(const int32_t* rows, int32_t count, int32_t row) {
  int32_t at = 0;
  while (at + 1 < count && row >= rows[at]) row -= rows[at++];
  return at;
}

// What a block knows of the messages that it packs, in shared memory: dynamic where a kernel is
// short, since the SM may have to be set up for more of it, which takes microseconds. So there is
// none where nobody asks.
struct Packing {
  int32_t first_row[kMaxRanks];
  int64_t payload_at[kMaxRanks];
};
__host__ __device__ inline bool NeedsPacking(const OperationParams& op) {
  return op.in_areas || op.slots > 0;
}
inline size_t PackingBytes(const OperationParams& op) {
  return NeedsPacking(op) ? sizeof(Packing) : 0;
}

// Announces a message with `rows` rows in an area; on the wire of hierarchical mode also how many
// rows it becomes inside its node. The words vouch for nothing but themselves: rows are handed over
// by descriptors.
__device__ inline void Announce(const Messages& m, int32_t region, int32_t rows,
                                int64_t rows_in_node) {
  const GroupConstants& g = m.g;
  const OperationParams& op = m.op;
  const uint32_t mark = OperationMark(op.call_site, op.operation, op.derivation, op.tokens,
                                      static_cast<int32_t>(op.stride),
                                      op.experts << 16 | op.slots);
  const AnnouncementTable table = g.layout.Announcements(m.leg);
  for (int32_t at = region; at < table.words; at += m.count()) {
    const int64_t counted = at == region ? rows : min(rows_in_node, kMaxAnnouncedRows);
    const uint64_t word = Announcement::Of(m.number, mark, static_cast<int32_t>(counted)).word;
    const int64_t to = table.At(m.set.index, m.number, g.rank, at);
    store_relaxed_system(g.announced + to, word);
    if (m.leg != kWire || g.layout.announced_bytes == 0) continue;
    // For other nodes: whoever puts does so behind a later kernel of this stream.
    store_relaxed_system(reinterpret_cast<uint64_t*>(g.memory + g.layout.AnnouncedOffset()) + to,
                         word);
  }
}

// Plans messages with rows[region] rows, at most `most_rows` in all, by all threads of all blocks.
// `by_rank`: how many rows go to each rank, on the wire of hierarchical mode; else not used.
// `packing` is filled in where it is not null. In areas it is there, and the first block notes the
// plan for the kernels to come, and announces the counts. False, in all threads, and reported, if
// no dispatch can have made such counts.
__device__ inline bool PlanPacking(const Messages& m, const int32_t* rows, const int32_t* by_rank,
                                   int64_t most_rows, Packing* packing) {
  const GroupConstants& g = m.g;
  const OperationParams& op = m.op;
  bool ok = true;
  if (threadIdx.x < kWarp) {
    for (int32_t region = threadIdx.x; region < m.count(); region += kWarp) {
      if (rows[region] >= 0 && rows[region] <= op.tokens) continue;
      ok = false;
      if (blockIdx.x == 0) {
        Report(g, op, FaultKind::kInvalidArgument, m.number, {region, -1, op.tokens, rows[region]});
      }
    }
    const Totals totals = LayOutMessages(m, rows, packing ? packing->first_row : nullptr,
                                         packing ? packing->payload_at : nullptr,
                                         [](int32_t) { return false; });
    if (ok && totals.rows > most_rows) {
      ok = false;
      if (blockIdx.x == 0 && threadIdx.x == 0) {
        Report(g, op, FaultKind::kInvalidArgument, m.number, {0, -1, most_rows, totals.rows});
      }
    }
  }
  if (!__syncthreads_and(ok)) return false;
  if (blockIdx.x != 0 || !op.in_areas) return true;
  const bool to_nodes = g.nodes.hierarchical && m.leg == kWire;
  const int32_t per_node = g.nodes.ranks_per_node;
  for (int32_t region = threadIdx.x; region < m.count(); region += blockDim.x) {
    m.set.scratch->packed_at[m.leg][region] = packing->payload_at[region];
    int64_t in_node = 0;
    for (int32_t j = 0; to_nodes && j < per_node; ++j) {
      const int32_t to_rank = by_rank[region * per_node + j];
      in_node += to_rank;
      if (to_rank >= 0 && to_rank <= rows[region]) continue;
      Report(g, op, FaultKind::kInvalidArgument, m.number,
             {m.Peer(region), -1, rows[region], to_rank});
    }
    if (in_node >= 0) Announce(m, region, rows[region], in_node);
  }
  return true;
}

}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_KERNELS_PACKING_CUH_
