// SPDX-License-Identifier: Apache-2.0
//
// Place and Mark, the kernels with which dispatch_recv.cu begins: which row of the expert-grouped
// array every received copy becomes.
#ifndef SMFREE_CSRC_CUDA_KERNELS_DISPATCH_RECV_PLACE_CUH_
#define SMFREE_CSRC_CUDA_KERNELS_DISPATCH_RECV_PLACE_CUH_

#include <cstdint>

#include "csrc/cuda/kernels/messages.cuh"

namespace smfree::cuda {
namespace {

__device__ void WriteSources(const GroupConstants& g, const LanePointers& lane,
                             const int32_t* rows) {
  if (blockIdx.x != 0) return;
  for (int32_t source = threadIdx.x; source < g.num_ranks; source += blockDim.x) {
    lane.scratch->source_rows[source] = rows[source];
  }
}

// The rows of each local expert, as they are laid out in the expert-grouped array.
struct ExpertRows {
  int32_t start;
  int32_t end;      // of its place, filled up to the alignment, or cut at the capacity
  int32_t dropped;  // copies that did not fit
};

// Groups, and in first[s * El + e] the row of the first copy from source s for expert e. By all
// threads of a block.
__device__ void LayOutGroups(const Messages& m, int32_t capacity, ExpertRows* groups,
                             int32_t* first) {
  const GroupConstants& g = m.g;
  const int32_t local_experts = g.local_experts();
  for (int32_t e = threadIdx.x; e < local_experts; e += blockDim.x) {
    int32_t count = 0;
#pragma unroll 4
    for (int32_t source = 0; source < g.num_ranks; ++source) {
      const char* const header = m.From(source) + kHeaderIdentityBytes;
      first[source * local_experts + e] = count;
      count += __ldcg(reinterpret_cast<const int32_t*>(header) + e);
    }
    groups[e].dropped = count;  // for now
  }
  __syncthreads();
  if (threadIdx.x < kWarp) {  // an exclusive sum of the aligned counts, cut at the capacity
    const int32_t warp_lane = static_cast<int32_t>(threadIdx.x);
    int64_t start = 0;
    for (int32_t base = 0; base < local_experts; base += kWarp) {
      const int32_t e = base + warp_lane;
      const int32_t count = e < local_experts ? groups[e].dropped : 0;
      const int32_t aligned =
          (count + g.expert_alignment - 1) / g.expert_alignment * g.expert_alignment;
      const auto up_to = SumUpToLane<int64_t>(aligned);
      if (e < local_experts) {
        const auto begin = static_cast<int32_t>(min(start + up_to - aligned, int64_t{capacity}));
        const auto end = static_cast<int32_t>(min(start + up_to, int64_t{capacity}));
        groups[e] = {begin, end, max(0, count - (end - begin))};
      }
      start += __shfl_sync(~0u, up_to, kWarp - 1);
    }
  }
  __syncthreads();
  for (int32_t i = threadIdx.x; i < g.num_experts; i += blockDim.x) {
    first[i] += groups[i % local_experts].start;
  }
  __syncthreads();
}

struct PlaceArrays {
  int32_t capacity;  // N
  int32_t* group_sizes;
  int32_t* num_dropped;
  int32_t* rows;
  int32_t* recv_counts;
  int32_t* relay;  // null in hierarchical mode, where the relay has filled it in
};

__global__ void __launch_bounds__(kThreads) Place(const KernelParams params, const PlaceArrays a) {
  const GroupConstants& g = params.g;
  const LanePointers& lane = params.lane;
  const OperationParams& op = params.op;
  extern __shared__ int32_t shared[];
  __shared__ int32_t source_rows[kMaxRanks];
  __shared__ Arrivals arrivals;
  const int32_t local_experts = g.local_experts();
  auto* const groups = reinterpret_cast<ExpertRows*>(shared);
  auto* const first = reinterpret_cast<int32_t*>(groups + local_experts);
  const auto thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const auto threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t slots = int64_t{g.num_ranks} * op.tokens * g.top_k;

  if (a.relay) {
    if (thread == 0) *a.relay = -1;
    NoteBegin(lane);
  }
  const Begun begun = BeginRecvPhase(g, lane, op);
  const Messages messages{g, lane, op, g.nodes.LastLeg(Operation::kDispatch), begun.number};
  if (!begun.ok || !OpenMessages(messages, nullptr, source_rows, arrivals)) {
    for (int64_t i = thread; i < slots; i += threads) a.rows[i] = -1;
    for (int64_t i = thread; i < local_experts; i += threads) a.group_sizes[i] = 0;
    for (int64_t i = thread; i < g.num_ranks; i += threads) a.recv_counts[i] = 0;
    if (thread == 0) *a.num_dropped = 0;
    return;
  }
  LayOutGroups(messages, a.capacity, groups, first);
  WriteSources(g, lane, source_rows);
  if (blockIdx.x == 0) {
    for (int32_t e = threadIdx.x; e < local_experts; e += blockDim.x) {
      a.group_sizes[e] = groups[e].end - groups[e].start;
    }
    for (int32_t s = threadIdx.x; s < g.num_ranks; s += blockDim.x) {
      a.recv_counts[s] = source_rows[s];
    }
  }
  int32_t dropped = 0;
  for (int32_t e = threadIdx.x % kWarp; e < local_experts; e += kWarp) dropped += groups[e].dropped;
  dropped = __reduce_add_sync(~0u, dropped);
  if (thread == 0) {
    *a.num_dropped = dropped;
    atomicAdd(&g.state->rows_dropped, static_cast<unsigned long long>(dropped));
    lane.scratch->overflowed = dropped > 0 && !g.drop_overflow;
    if (lane.scratch->overflowed) {
      volatile OverflowRecord& overflow = g.host->overflow;
      overflow.lane = op.lane;
      overflow.derivation = op.derivation;
      overflow.call_site = op.call_site;
      overflow.number = begun.number;
      overflow.dropped = dropped;
      overflow.capacity = a.capacity;
      __threadfence_system();  // pairs with the host's acquire in Check
      overflow.ready = 1;
    }
  }
  for (int64_t at = thread; at < slots; at += threads) {
    const auto source = static_cast<int32_t>(at / (int64_t{op.tokens} * g.top_k));
    const int64_t slot = at % (int64_t{op.tokens} * g.top_k);  // of that source
    int32_t n = -1;
    if (slot / g.top_k < source_rows[source]) {
      const char* const message = messages.From(source) + g.layout.header_bytes;
      const int32_t code = __ldcg(reinterpret_cast<const int32_t*>(message) + slot);
      if (code >= 0 && g.code.Expert(code) < local_experts) {
        const int32_t expert = g.code.Expert(code);
        n = first[source * local_experts + expert] + g.code.Index(code);
        if (n >= groups[expert].end) n = -1;
      }
    }
    a.rows[at] = n;
    if (n >= 0) lane.row_tags[n] = static_cast<uint32_t>(begun.number);
  }
}

__global__ void __launch_bounds__(kThreads) Mark(const KernelParams params, const int32_t capacity,
                                                 const int32_t* rows, const int32_t* recv_counts) {
  const GroupConstants& g = params.g;
  const LanePointers& lane = params.lane;
  const OperationParams& op = params.op;
  __shared__ int32_t source_rows[kMaxRanks];
  __shared__ Arrivals arrivals;
  if (!g.nodes.hierarchical) NoteBegin(lane);
  if (NothingWasSent(op)) return;
  const Begun begun = BeginRecvPhase(g, lane, op);
  const Messages messages{g, lane, op, g.nodes.LastLeg(Operation::kDispatch), begun.number};
  if (!begun.ok || !OpenMessages(messages, recv_counts, source_rows, arrivals)) return;
  WriteSources(g, lane, source_rows);
  if (blockIdx.x == 0 && threadIdx.x == 0) lane.scratch->overflowed = 0;
  const auto thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const auto threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t slots_per_source = int64_t{op.tokens} * g.top_k;
  for (int64_t at = thread; at < g.num_ranks * slots_per_source; at += threads) {
    const auto source = static_cast<int32_t>(at / slots_per_source);
    if (at % slots_per_source / g.top_k >= source_rows[source]) continue;
    const int32_t n = rows[at];
    if (n < -1 || n >= capacity) {
      Report(g, op, FaultKind::kInvalidArgument, begun.number, {source, -1, capacity - 1, n});
    } else if (n >= 0) {
      lane.row_tags[n] = static_cast<uint32_t>(begun.number);
    }
  }
}

}  // namespace
}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_KERNELS_DISPATCH_RECV_PLACE_CUH_
