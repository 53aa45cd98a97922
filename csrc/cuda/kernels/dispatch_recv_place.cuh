// SPDX-License-Identifier: Apache-2.0
//
// Which row of the expert-grouped array every received copy becomes: Place and Mark, the kernels
// with which dispatch_recv.cu begins, and what Place shares with the one kernel of small operations.
#ifndef SMFREE_CSRC_CUDA_KERNELS_DISPATCH_RECV_PLACE_CUH_
#define SMFREE_CSRC_CUDA_KERNELS_DISPATCH_RECV_PLACE_CUH_

#include <cstdint>

#include "csrc/cuda/kernels/arrivals.cuh"
#include "csrc/cuda/kernels/packing.cuh"

namespace smfree::cuda {
namespace {

// What a block knows of the messages that it receives, in shared memory.
struct Received {
  int32_t sent[kMaxRanks];       // rows of each
  int32_t by_source[kMaxRanks];  // of which it is what a relay has handed on; else the same
  int32_t rows[kMaxRanks];       // and how many of them are kept: wire_rows of all
  int32_t first_row[kMaxRanks];  // of those kept: how many the messages before have
  int64_t payload_at[kMaxRanks];
  bool is_cut;  // not all that the sources have sent are kept

  // From `sent`; by all threads of a block, which have met. The first block notes it for the
  // kernels to come.
  __device__ void Plan(const Messages& m) {
    const GroupConstants& g = m.g;
    if (threadIdx.x >= kThreads - kWarp) {  // it has the least to do before
      const int32_t warp_lane = static_cast<int32_t>(threadIdx.x) % kWarp;
      bool lacks = false;
      const auto is_own = [&](int32_t source) { return m.IsOwn(source); };
      for (int32_t source = warp_lane; source < g.num_ranks; source += kWarp) {
        rows[source] = sent[source];
        by_source[source] = g.nodes.hierarchical ? HeaderOf(m, source).sent : sent[source];
        lacks = lacks || by_source[source] != sent[source];
      }
      __syncwarp();
      const int64_t all = LayOutMessages(m, rows, first_row, payload_at, is_own).rows;
      lacks = __any_sync(~0u, lacks || all > m.op.wire_rows);
      if (warp_lane == 0) is_cut = lacks;
      if (all > m.op.wire_rows) {
        __syncwarp();
        for (int32_t source = warp_lane; source < g.num_ranks; source += kWarp) {
          rows[source] = KeptRows(first_row[source], sent[source], m.op.wire_rows);
        }
        __syncwarp();
        (void)LayOutMessages(m, rows, first_row, payload_at, is_own);
      }
    }
    __syncthreads();
    if (blockIdx.x != 0) return;
    SetScratch& scratch = *m.set.scratch;
    for (int32_t source = threadIdx.x; source < g.num_ranks; source += blockDim.x) {
      scratch.source_sent[source] = sent[source];
      scratch.source_rows[source] = rows[source];
      scratch.source_first[source] = first_row[source];
      scratch.received_at[m.leg][source] = payload_at[source];
    }
  }
};

// The rows of each local expert, as they are laid out in the expert-grouped array.
struct ExpertRows {
  int32_t start;
  int32_t end;      // of its place, filled up to the alignment, or cut at the capacity
  int32_t rows;     // copies there
  int32_t dropped;  // and those that did not fit
};

// Copies that each message has for each local expert, as its header says. By all threads of a
// block, into shared memory; they have not met afterwards.
__device__ void ReadCopies(const Messages& m, int32_t* copies) {
  const int32_t local_experts = m.g.local_experts();
  for (int32_t i = threadIdx.x; i < m.g.num_experts; i += blockDim.x) {
    const char* const header = m.HeaderFrom(i / local_experts) + kHeaderIdentityBytes;
    copies[i] = __ldcg(reinterpret_cast<const int32_t*>(header) + i % local_experts);
  }
}

// The CopyCodes of a message, a row's one behind the other.
__device__ const int32_t* CodesFrom(const Messages& m, int32_t source) {
  return reinterpret_cast<const int32_t*>(m.PayloadFrom(source));
}

// Makes `copies`, as ReadCopies has left them, those of the kept rows, where not all are kept. By
// all threads of a block, which have met. Returns, to all of them, how many copies are not kept.
__device__ int32_t CountKeptCopies(const Messages& m, const Received& received, int32_t* copies) {
  const GroupConstants& g = m.g;
  __shared__ int32_t cut;
  const int32_t local_experts = g.local_experts();
  if (threadIdx.x == 0) cut = 0;
  __syncthreads();
  for (int32_t i = threadIdx.x; i < g.num_experts; i += blockDim.x) {
    const int32_t source = i / local_experts;
    if (received.rows[source] == received.by_source[source]) continue;
    atomicAdd(&cut, copies[i]);
    copies[i] = 0;
  }
  __syncthreads();
  for (int32_t source = 0; source < g.num_ranks; ++source) {
    const int32_t rows = received.rows[source];
    if (rows == received.by_source[source]) continue;
    const int32_t* const codes = CodesFrom(m, source);
    for (int32_t slot = threadIdx.x; slot < rows * g.top_k; slot += blockDim.x) {
      const int32_t code = __ldcg(codes + slot);
      if (code < 0 || g.code.Expert(code) >= local_experts) continue;
      atomicAdd(copies + source * local_experts + g.code.Expert(code), 1);
      atomicSub(&cut, 1);
    }
  }
  __syncthreads();
  return cut;
}

// Groups, and in first[s * El + e], where there were the copies from source s for expert e, the row
// of the first of them. Of the array, or of each part of `part_rows` where groups are padded,
// `capacity` rows are filled. By all threads of a block, which have met.
__device__ void LayOutGroups(const GroupConstants& g, int32_t part_rows, int32_t capacity,
                             ExpertRows* groups, int32_t* first) {
  __shared__ int64_t of_warp[kWarps];  // rows of the groups of its threads
  const int32_t warp = static_cast<int32_t>(threadIdx.x) / kWarp;
  const int32_t local_experts = g.local_experts();
  int64_t before = 0;  // rows of the groups before those of this round
  for (int32_t base = 0; base < local_experts; base += kThreads) {
    const int32_t e = base + static_cast<int32_t>(threadIdx.x);
    const bool is_expert = e < local_experts;
    int32_t count = 0;
#pragma unroll 4
    for (int32_t source = 0; is_expert && source < g.num_ranks; ++source) {
      int32_t& of_source = first[source * local_experts + e];
      const int32_t copies = of_source;
      of_source = count;
      count += copies;
    }
    // An exclusive sum of the aligned counts, or equal parts; cut at the capacity.
    const int32_t aligned =
        (count + g.expert_alignment - 1) / g.expert_alignment * g.expert_alignment;
    const auto up_to = SumUpToLane<int64_t>(aligned);
    if (threadIdx.x % kWarp == kWarp - 1) of_warp[warp] = up_to;
    __syncthreads();
    int64_t start = before + up_to - aligned;
    for (int32_t w = 0; w < kWarps; ++w) {
      before += of_warp[w];
      if (w < warp) start += of_warp[w];
    }
    if (is_expert) {
      const int64_t part = g.padded_groups ? int64_t{e} * part_rows : 0;
      const int64_t at = g.padded_groups ? part : start;
      const auto begin = static_cast<int32_t>(min(at, part + capacity));
      const auto end = static_cast<int32_t>(min(at + aligned, part + capacity));
      const int32_t rows = min(count, end - begin);
      groups[e] = {begin, end, rows, count - rows};
      for (int32_t source = 0; source < g.num_ranks; ++source) {
        first[source * local_experts + e] += begin;
      }
    }
    __syncthreads();
  }
}

// Which expert has got the most copies. By one thread.
__device__ void NoteBusiest(const GroupConstants& g, const ExpertRows* groups,
                            volatile OverflowRecord& overflow) {
  int32_t busiest = 0, most = 0;
  for (int32_t e = 0; e < g.local_experts(); ++e) {
    const int32_t copies = groups[e].rows + groups[e].dropped;
    if (copies > most) {
      busiest = e;
      most = copies;
    }
  }
  overflow.busiest_expert = g.rank * g.local_experts() + busiest;
  overflow.its_copies = most;
}

struct PlaceArrays {
  int32_t rows_capacity;    // N
  const int32_t* capacity;  // how many of them, or of each padded group's, may be filled
  int32_t* group_sizes;
  int32_t* num_rows;
  int32_t* num_dropped;
  int32_t* rows;
  int32_t* recv_counts;
  int32_t* relay;  // null in hierarchical mode, where the relay has filled it in
};

// Where copies go, as a block knows it, in dynamic shared memory (PlaceSharedBytes).
struct Groups {
  ExpertRows* of;  // by local expert
  int32_t* first;  // by source and local expert: the row of the first copy

  __device__ Groups(int32_t* shared, int32_t local_experts)
      : of(reinterpret_cast<ExpertRows*>(shared)),
        first(reinterpret_cast<int32_t*>(of + local_experts)) {}

  // The row of the copy that a slot of a message is, or -1: `code` is its CopyCode.
  __device__ int32_t RowOf(const GroupConstants& g, int32_t source, int32_t code) const {
    const int32_t local_experts = g.local_experts();
    if (code < 0 || g.code.Expert(code) >= local_experts) return -1;
    const int32_t expert = g.code.Expert(code);
    const int32_t n = first[source * local_experts + expert] + g.code.Index(code);
    return n < of[expert].end ? n : -1;
  }

  // The sum of value(group), by a warp.
  template <typename Value>
  __device__ int32_t Sum(const GroupConstants& g, const Value& value) const {
    int32_t sum = 0;
    for (int32_t e = threadIdx.x % kWarp; e < g.local_experts(); e += kWarp) sum += value(of[e]);
    return __reduce_add_sync(~0u, sum);
  }

  // Whether row n is one that no copy becomes, and that is zero: one that fills a group up, or, but
  // in padded groups, one past all of them.
  __device__ bool IsPadding(const GroupConstants& g, int32_t n) const {
    const int32_t expert =
        LastUpTo(g.local_experts(), n, [this](int32_t e) { return of[e].start; });
    const ExpertRows& group = of[expert];
    return n - group.start >= group.rows && (!g.padded_groups || n < group.end);
  }
};

// What has come, the same in all threads of all blocks.
struct Placed {
  bool ok;           // else the rank has failed
  bool overflowed;   // not all copies fit, and none may be dropped
  int32_t num_rows;  // of messages, that are kept
};

// S7 and S8 of a routed dispatch, by all threads of all blocks: waits for the first chunk of every
// source, and lays out the groups. The first block tells the program of them.
__device__ Placed PlaceGroups(const Messages& messages, const PlaceArrays& a, const Begun& begun,
                              Received& received, Arrivals& arrivals, const Groups& groups) {
  const GroupConstants& g = messages.g;
  const SetPointers& set = messages.set;
  const OperationParams& op = messages.op;
  const int32_t local_experts = g.local_experts();
  const auto thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const auto threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  if (a.relay) {
    if (thread == 0) *a.relay = -1;
    NoteBegin(set);
  }
  if (!begun.ok || !OpenMessages(messages, nullptr, received.sent, arrivals)) {
    const int64_t slots = int64_t{op.wire_rows} * g.top_k;
    for (int64_t i = thread; i < slots; i += threads) a.rows[i] = -1;
    for (int64_t i = thread; i < local_experts; i += threads) {
      a.group_sizes[i] = 0;
      a.num_rows[i] = 0;
    }
    for (int64_t i = thread; i < g.num_ranks; i += threads) a.recv_counts[i] = 0;
    if (thread == 0) *a.num_dropped = 0;
    return {};
  }
  ReadCopies(messages, groups.first);
  received.Plan(messages);
  const int32_t cut = received.is_cut ? CountKeptCopies(messages, received, groups.first) : 0;
  const int32_t part_rows = g.padded_groups ? a.rows_capacity / local_experts : a.rows_capacity;
  const int32_t capacity = min(max(*a.capacity, 0) / g.expert_alignment * g.expert_alignment,
                               part_rows);
  LayOutGroups(g, part_rows, capacity, groups.of, groups.first);
  if (blockIdx.x == 0) {
    for (int32_t e = threadIdx.x; e < local_experts; e += blockDim.x) {
      a.group_sizes[e] = groups.of[e].end - groups.of[e].start;
      a.num_rows[e] = groups.of[e].rows;
    }
    for (int32_t s = threadIdx.x; s < g.num_ranks; s += blockDim.x) {
      a.recv_counts[s] = received.rows[s];
    }
  }
  const int32_t dropped = cut + groups.Sum(g, [](const ExpertRows& e) { return e.dropped; });
  const bool overflowed = dropped > 0 && !g.drop_overflow;
  if (thread == 0) {
    *a.num_dropped = dropped;
    atomicAdd(&g.state->rows_dropped, static_cast<unsigned long long>(dropped));
    set.scratch->overflowed = overflowed;
    if (overflowed) {
      int64_t sent = 0;
      for (int32_t s = 0; s < g.num_ranks; ++s) sent += received.by_source[s];
      volatile OverflowRecord& overflow = g.host->overflow;
      overflow.on_wire = sent > op.wire_rows;
      overflow.at_relay = received.is_cut;
      overflow.lane = op.lane;
      overflow.derivation = op.derivation;
      overflow.call_site = op.call_site;
      overflow.number = begun.number;
      overflow.dropped = dropped;
      overflow.received = sent;
      overflow.capacity = overflow.on_wire ? op.wire_rows : capacity;
      NoteBusiest(g, groups.of, overflow);
      __threadfence_system();  // pairs with the host's acquire in Check
      overflow.ready = 1;
    }
  }
  const int32_t last = g.num_ranks - 1;
  return {true, overflowed, received.first_row[last] + received.rows[last]};
}

__global__ void __launch_bounds__(kThreads)
    Place(const __grid_constant__ KernelParams params, const __grid_constant__ PlaceArrays a) {
  const GroupConstants& g = params.g;
  const OperationParams& op = params.op;
  extern __shared__ int32_t shared[];
  __shared__ Received received;
  __shared__ Arrivals arrivals;
  const Begun begun = BeginRecvPhase(g, op, params.sets);
  const SetPointers set = params.sets.At(begun.set);
  const Leg leg = g.nodes.LastLeg(Operation::kDispatch);
  const Messages messages{
      g, set, op, leg, begun.number, set.scratch->packed_at[leg], received.payload_at};
  const Groups groups(shared, g.local_experts());
  const Placed placed = PlaceGroups(messages, a, begun, received, arrivals, groups);
  if (!placed.ok) return;
  const auto thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const auto threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t at = thread; at < int64_t{op.wire_rows} * g.top_k; at += threads) {
    const auto row = static_cast<int32_t>(at / g.top_k);
    int32_t n = -1;
    if (row < placed.num_rows) {
      const int32_t source = MessageOf(received.first_row, g.num_ranks, row);
      const int64_t slot = at - int64_t{received.first_row[source]} * g.top_k;
      n = groups.RowOf(g, source, __ldcg(CodesFrom(messages, source) + slot));
    }
    a.rows[at] = n;
    if (n >= 0) set.row_tags[n] = static_cast<uint32_t>(begun.number);
  }
}

__global__ void __launch_bounds__(kThreads)
    Mark(const __grid_constant__ KernelParams params, const int32_t capacity,
                                                 const int32_t* rows, const int32_t* recv_counts) {
  const GroupConstants& g = params.g;
  const OperationParams& op = params.op;
  __shared__ Received received;
  __shared__ Arrivals arrivals;
  const Begun begun = BeginRecvPhase(g, op, params.sets);
  const SetPointers set = params.sets.At(begun.set);
  if (!g.nodes.hierarchical) NoteBegin(set);
  const Messages messages{g, set, op, g.nodes.LastLeg(Operation::kDispatch), begun.number};
  if (!begun.ok || !OpenMessages(messages, nullptr, received.sent, arrivals)) return;
  received.Plan(messages);
  for (int32_t source = threadIdx.x; source < g.num_ranks; source += blockDim.x) {
    const int32_t rows_here = received.rows[source];
    if (rows_here == recv_counts[source]) continue;
    Report(g, op, FaultKind::kScheduleMismatch, begun.number,
           {source, -1, recv_counts[source], rows_here, HeaderOf(messages, source)});
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) set.scratch->overflowed = 0;
  const auto thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const auto threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int32_t last = g.num_ranks - 1;
  const int32_t num_rows = received.first_row[last] + received.rows[last];
  for (int64_t at = thread; at < int64_t{num_rows} * g.top_k; at += threads) {
    const int32_t n = rows[at];
    if (n < -1 || n >= capacity) {
      const auto row = static_cast<int32_t>(at / g.top_k);
      const int32_t source = MessageOf(received.first_row, g.num_ranks, row);
      Report(g, op, FaultKind::kInvalidArgument, begun.number, {source, -1, capacity - 1, n});
    } else if (n >= 0) {
      set.row_tags[n] = static_cast<uint32_t>(begun.number);
    }
  }
}

}  // namespace
}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_KERNELS_DISPATCH_RECV_PLACE_CUH_
