// SPDX-License-Identifier: Apache-2.0
//
// The routing of dispatch_send.cu: the place of every row at its ranks and, in hierarchical mode,
// in the messages to nodes; and the messages but for their rows. Route is the kernel that does it
// before the rows are packed. Where one kernel does both, each of its blocks counts all rows.
#ifndef SMFREE_CSRC_CUDA_KERNELS_DISPATCH_SEND_ROUTE_CUH_
#define SMFREE_CSRC_CUDA_KERNELS_DISPATCH_SEND_ROUTE_CUH_

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "csrc/cuda/host/kernels.h"
#include "csrc/cuda/kernels/packing.cuh"
#include "csrc/cuda/kernels/places.cuh"

namespace smfree::cuda {
namespace {

constexpr int32_t kTurnsBeforeAsking = 1024;  // a tenth of a millisecond: no block is so late

// The bits of so many rows that go to expert, rank or node `bin`.
struct RowBits {
  uint32_t* words;
  int32_t rows;

  __device__ uint32_t* of(int32_t bin) const { return words + bin * BitWords(rows); }
  // Sets the bit of `row`; whether it was set before.
  __device__ bool Set(int32_t bin, int32_t row) const {
    const uint32_t bit = 1u << (row % 32);
    return (atomicOr(of(bin) + row / 32, bit) & bit) != 0;
  }
  __device__ int32_t CountBelow(int32_t bin, int32_t row) const {
    const uint32_t* const bits = of(bin);
    int32_t count = __popc(bits[row / 32] & ((1u << (row % 32)) - 1));
    for (int32_t w = 0; w < row / 32; ++w) count += __popc(bits[w]);
    return count;
  }
  __device__ int32_t Count(int32_t bin) const {
    int32_t count = 0;
    for (int32_t w = 0; w < (rows + 31) / 32; ++w) count += __popc(of(bin)[w]);
    return count;
  }
};

// Rows [first_row, first_row + num_rows) of a dispatch, as a block routes them. Their bins are
// first the experts, then the ranks, then the nodes. A message of the wire is for a rank, or for a
// node in hierarchical mode, and names the experts there.
struct RoutedRows {
  const Messages& wire;
  RowBits bits;
  const int32_t* experts;  // [num_rows, K]
  const float* weights;
  int32_t first_row, num_rows;

  __device__ RoutedRows(const Messages& messages, const DispatchSendArrays& a,
                        const RowBits& row_bits, int32_t first)
      : wire(messages),
        bits(row_bits),
        experts(a.topk_idx + int64_t{first} * wire.g.top_k),
        weights(a.topk_weights + int64_t{first} * wire.g.top_k),
        first_row(first),
        num_rows(min(row_bits.rows, wire.op.tokens - first)) {}

  __device__ bool by_node() const { return wire.g.nodes.hierarchical; }
  __device__ int32_t wire_bin() const {  // the first one of those that messages are for
    return wire.g.num_experts + (by_node() ? wire.g.num_ranks : 0);
  }
  __device__ int32_t wire_experts() const { return wire.g.num_experts / wire.count(); }

  // What this thread needs first, and far away: to be asked for early.
  __device__ static int32_t FirstExpert(const KernelParams& k, const DispatchSendArrays& a,
                                        int64_t first_row) {
    const int64_t slot = first_row * k.g.top_k + threadIdx.x;
    return slot < int64_t{k.op.tokens} * k.g.top_k ? a.topk_idx[slot] : -1;
  }

  // By all threads of a block, which have met afterwards. Reports what is no routing, if the phase
  // has begun.
  __device__ void SetBits(const Begun& begun, int32_t first_expert) const {
    const GroupConstants& g = wire.g;
    const auto thread = static_cast<int32_t>(threadIdx.x);
    const auto threads = static_cast<int32_t>(blockDim.x);
    const int32_t num_words = RouteBins(g.nodes, g.num_experts) * BitWords(bits.rows);
    for (int32_t i = thread; i < num_words; i += threads) bits.words[i] = 0;
    __syncthreads();
    for (int32_t slot = thread; slot < num_rows * g.top_k; slot += threads) {
      const int32_t expert = slot == thread ? first_expert : experts[slot];
      const int32_t row = slot / g.top_k;
      if (expert == -1) continue;
      if (expert < -1 || expert >= g.num_experts || bits.Set(expert, row)) {
        if (begun.ok) {
          Report(g, wire.op, FaultKind::kInvalidRouting, begun.number,
                 {-1, first_row + row, g.num_experts, expert});
        }
        continue;
      }
      bits.Set(g.num_experts + expert / g.local_experts(), row);
      if (by_node()) bits.Set(wire_bin() + expert / wire_experts(), row);
    }
    __syncthreads();
  }

  // In the header of its message: how many copies there are for an expert.
  __device__ void WriteCopies(int32_t expert, int32_t copies) const {
    char* const header = wire.HeaderTo(expert / wire_experts());
    reinterpret_cast<int32_t*>(header + kHeaderIdentityBytes)[expert % wire_experts()] = copies;
  }

  // visit(d, i): the row is the i-th one in list d of those that begin at `first_bin`.
  // before(bin): how many rows of a bin stand before the block's.
  template <typename Before, typename Visit>
  __device__ void ForEachList(int32_t row, int32_t first_bin, int32_t lists, const Before& before,
                              const Visit& visit) const {
    for (int32_t list = 0; list < lists; ++list) {
      const int32_t bin = first_bin + list;
      if (!(bits.of(bin)[row / 32] >> (row % 32) & 1)) continue;
      visit(list, before(bin) + bits.CountBelow(bin, row));
    }
  }

  // To the messages of its row, which have rows_to[region] rows: the code of a slot in that which
  // its expert is behind, -1 in the others, and its weight. With the first slot of a row its places
  // there. Without `send` the places alone.
  template <typename Before>
  __device__ void WriteSlot(int32_t slot, const Before& before, const int32_t* rows_to,
                            Placing on_wire, bool send) const {
    const GroupConstants& g = wire.g;
    const int32_t row = slot / g.top_k;
    const int32_t k = slot % g.top_k;
    const int32_t expert = experts[slot];
    const float weight = weights[slot];
    const bool valid = expert >= 0 && expert < g.num_experts;
    const int32_t home = valid ? expert / wire_experts() : -1;
    const int32_t code = valid ? g.code.Encode(expert % wire_experts(),
                                               before(expert) + bits.CountBelow(expert, row))
                               : -1;
    ForEachList(row, wire_bin(), wire.count(), before, [&](int32_t region, int32_t i) {
      if (k == 0) on_wire.Add(region * wire.op.tokens + i);
      if (!send) return;
      char* const payload = wire.PayloadTo(region);
      const MessageLayout layout = LayoutOf(wire.op, rows_to[region]);
      const int64_t at = int64_t{i} * g.top_k + k;
      reinterpret_cast<int32_t*>(payload + layout.experts_offset)[at] = region == home ? code : -1;
      reinterpret_cast<float*>(payload + layout.slots_offset)[at] = weight;
    });
    if (k == 0) on_wire.End();
  }
};

// Waits for one block to publish its counts of this operation; false if it does not. Blocks that do
// not fit onto the device beside those that wait start when something else there has ended, which
// may be never. A flag of a later epoch is of a send that runs on this set at the same time.
__device__ bool WaitForBlock(const GroupConstants& g, const SetPointers& set,
                             const OperationParams& op, int64_t number, uint64_t epoch,
                             int32_t block) {
  int64_t begin = 0;
  for (int32_t turn = 1;; ++turn) {
    const uint64_t seen = load_acquire_gpu(set.route_flags + block);
    if (seen == epoch) return true;
    if (seen > epoch) {
      Report(g, op, FaultKind::kTwoInFlight, number, {-1, -1, number, number});
      return false;
    }
    __nanosleep(50);
    if (turn % kTurnsBeforeAsking != 0) continue;
    if (begin == 0) begin = NowNs();
    if (Faulted(g) || OthersFailed(g, op, number)) return false;
    if (NowNs() - begin > g.timeout_ns) {
      Report(g, op, FaultKind::kDeadline, number, {-1, -1, static_cast<int32_t>(gridDim.x), block});
      return false;
    }
  }
}

// The barrier of the blocks of one launch, with the same result in all threads of a block.
__device__ bool WaitForAllBlocks(const GroupConstants& g, const SetPointers& set,
                                 const OperationParams& op, int64_t number, uint64_t epoch) {
  bool ok = true;
  for (uint32_t block = threadIdx.x; block < gridDim.x; block += blockDim.x) {
    ok = WaitForBlock(g, set, op, number, epoch, static_cast<int32_t>(block)) && ok;
  }
  return __syncthreads_and(ok);
}

// What a send without a routing says: nothing goes anywhere.
__device__ void RouteNothing(const GroupConstants& g, const SetPointers& set,
                             const DispatchSendArrays& a, int32_t first_row, int32_t num_rows) {
  for (int32_t row = threadIdx.x; row < num_rows; row += kRouteThreads) {
    Placing(a.places, first_row + row, g.places_per_row).End();
    if (g.nodes.hierarchical) Placing(set.wire_places, first_row + row, g.wire_width).End();
  }
  if (blockIdx.x != 0) return;
  for (int32_t rank = threadIdx.x; rank < g.num_ranks; rank += kRouteThreads) {
    a.send_counts[rank] = 0;
    if (g.nodes.hierarchical) set.scratch->wire_rows[rank] = 0;
  }
}

// Every block takes part in the barrier, whatever is wrong with the rows.
__global__ void __launch_bounds__(kRouteThreads)
    Route(const __grid_constant__ KernelParams params,
          const __grid_constant__ DispatchSendArrays a, const int32_t rows_per_block) {
  const GroupConstants& g = params.g;
  const OperationParams& op = params.op;
  extern __shared__ uint32_t shared[];
  __shared__ Packing packing;
  const int32_t bins = RouteBins(g.nodes, g.num_experts);
  auto* const before = reinterpret_cast<int32_t*>(shared + bins * BitWords(rows_per_block));
  int32_t* const wire_rows = before + bins;
  const auto thread = static_cast<int32_t>(threadIdx.x);

  const int32_t first_expert =
      RoutedRows::FirstExpert(params, a, int64_t{blockIdx.x} * rows_per_block);
  const Begun begun = BeginSendPhase(g, op, params.sets);
  const SetPointers set = params.sets.At(begun.set);
  NoteBegin(set);
  const Messages wire{g, set, op, kWire, begun.number, packing.payload_at};
  const uint64_t epoch = set.scratch->epoch + 1;
  const RoutedRows rows(wire, a, RowBits{shared, rows_per_block},
                        static_cast<int32_t>(blockIdx.x) * rows_per_block);
  const bool by_node = rows.by_node();
  const int32_t wire_bin = rows.wire_bin();
  rows.SetBits(begun, first_expert);

  int32_t* const counts = set.route_counts + int64_t{blockIdx.x} * bins;
  for (int32_t bin = thread; bin < bins; bin += kRouteThreads) counts[bin] = rows.bits.Count(bin);
  __syncthreads();
  if (thread == 0) {
    __threadfence();
    store_release_gpu(set.route_flags + blockIdx.x, epoch);
  }
  if (!WaitForAllBlocks(g, set, op, begun.number, epoch)) {
    return RouteNothing(g, set, a, rows.first_row, rows.num_rows);
  }

  // `before`: in earlier blocks. wire_rows: in all.
  for (int32_t bin = thread; bin < bins; bin += kRouteThreads) {
    int32_t earlier = 0, all = 0;
#pragma unroll 16
    for (int32_t block = 0; block < static_cast<int32_t>(gridDim.x); ++block) {
      const int32_t count = __ldcg(set.route_counts + int64_t{block} * bins + bin);
      all += count;
      if (block < static_cast<int32_t>(blockIdx.x)) earlier += count;
    }
    before[bin] = earlier;
    if (bin >= wire_bin) wire_rows[bin - wire_bin] = all;
    if (blockIdx.x != 0) continue;
    if (bin >= g.num_experts + g.num_ranks) {
      set.scratch->wire_rows[bin - wire_bin] = all;
    } else if (bin >= g.num_experts) {
      a.send_counts[bin - g.num_experts] = all;
      if (by_node && begun.ok) WriteRowsToRank(wire, bin - g.num_experts, all);
    } else if (begun.ok) {
      rows.WriteCopies(bin, all);
    }
  }
  __syncthreads();
  if (begun.ok && op.in_areas) {
    (void)PlanPacking(wire, wire_rows, a.send_counts, int64_t{op.tokens} * g.wire_width, &packing);
  }
  if (blockIdx.x == 0 && begun.ok) {
    for (int32_t region = thread; region < wire.count(); region += kRouteThreads) {
      WriteHeader(wire, region, wire_rows[region]);
    }
  }

  const auto before_block = [before](int32_t bin) { return before[bin]; };
  for (int32_t slot = thread; slot < rows.num_rows * g.top_k; slot += kRouteThreads) {
    const int32_t row = slot / g.top_k;
    rows.WriteSlot(slot, before_block, wire_rows,
                   Placing(by_node ? set.wire_places : a.places, rows.first_row + row,
                           g.wire_width),
                   begun.ok);
    if (!by_node || slot % g.top_k != 0) continue;
    Placing at_ranks(a.places, rows.first_row + row, g.places_per_row);
    rows.ForEachList(row, g.num_experts, g.num_ranks, before_block,
                     [&](int32_t rank, int32_t i) { at_ranks.Add(rank * op.tokens + i); });
    at_ranks.End();
  }
}

// Rows of a block and its shared memory. There are no more blocks than SMs, each of which has room
// for one at least, whatever its shared memory.
struct RouteShape {
  int32_t rows_per_block, blocks;
  size_t shared_bytes;

  RouteShape(int64_t tokens, int32_t bins, int32_t num_sms) {
    const int64_t most_blocks = std::min(kMaxRouteBlocks, num_sms);
    rows_per_block = kRouteRows;
    while (tokens > rows_per_block * most_blocks) rows_per_block *= 2;
    blocks = static_cast<int32_t>((tokens + rows_per_block - 1) / rows_per_block);
    shared_bytes = sizeof(int32_t) * static_cast<size_t>(bins) *
                   static_cast<size_t>(BitWords(rows_per_block) + 2);
  }
};

}  // namespace
}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_KERNELS_DISPATCH_SEND_ROUTE_CUH_
