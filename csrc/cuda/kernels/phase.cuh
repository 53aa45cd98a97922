// SPDX-License-Identifier: Apache-2.0
//
// What the kernels of all phases share: memory order, faults, and the start and end of a phase.
// Steps S1 … S10 are those of PROTOCOL.md.
#ifndef SMFREE_CSRC_CUDA_KERNELS_PHASE_CUH_
#define SMFREE_CSRC_CUDA_KERNELS_PHASE_CUH_

#include <cstdint>

#include "csrc/cuda/host/kernels.h"
#include "csrc/cuda/host/state.h"
#include "csrc/protocol/sets.h"
#include "csrc/protocol/signals.h"
#include "csrc/protocol/token.h"

namespace smfree::cuda {

constexpr int32_t kWarp = 32;
constexpr int32_t kWarps = kThreads / kWarp;

// ---- time and memory order ----------------------------------------------------------------------

__device__ inline int64_t NowNs() {
  uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return static_cast<int64_t>(now);
}

// Scope gpu: between blocks of one device. Acquire and release at once, because the thread that
// completes a count goes on to publish what the others have counted.
__device__ inline uint32_t add_acq_rel_gpu(uint32_t* word, uint32_t value) {
  uint32_t old;
  asm volatile("atom.add.acq_rel.gpu.u32 %0, [%1], %2;"
               : "=r"(old) : "l"(word), "r"(value) : "memory");
  return old;
}
__device__ inline uint32_t load_acquire_gpu(const uint32_t* word) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}
__device__ inline void store_release_gpu(uint32_t* word, uint32_t value) {
  asm volatile("st.release.gpu.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}
__device__ inline uint64_t load_acquire_gpu(const uint64_t* word) {
  uint64_t value;
  asm volatile("ld.acquire.gpu.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
}
__device__ inline void store_release_gpu(uint64_t* word, uint64_t value) {
  asm volatile("st.release.gpu.u64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
}
// For flags that may be seen late without harm.
__device__ inline uint32_t load_relaxed_system(const uint32_t* word) {
  uint32_t value;
  asm volatile("ld.relaxed.sys.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}

__device__ inline void store_relaxed_system(uint64_t* word, uint64_t value) {
  asm volatile("st.relaxed.sys.u64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
}

// The sum of `value` over the threads of a warp up to this one, by all of them.
template <typename T>
__device__ T SumUpToLane(T value) {
  const auto warp_lane = static_cast<int32_t>(threadIdx.x) % kWarp;
  for (int32_t distance = 1; distance < kWarp; distance *= 2) {
    const T other = __shfl_up_sync(~0u, value, distance);
    if (warp_lane >= distance) value += other;
  }
  return value;
}

// ---- faults -------------------------------------------------------------------------------------

__device__ inline bool Faulted(const GroupConstants& g) {
  return load_acquire_gpu(&g.state->faulted) != 0;
}

struct FaultDetail {
  int32_t peer = -1;
  int32_t row = -1;
  int64_t expected = 0;
  int64_t seen = 0;
  RegionHeader header = {};  // kScheduleMismatch: of the message that was seen
};

// Records the rank's first fault and tells the host and the other ranks. Out of line: it is rare, and
// in line it takes registers and room in the instruction cache from what is not.
__device__ __noinline__ inline void Report(const GroupConstants& g, const OperationParams& op,
                                           FaultKind kind, int64_t number,
                                           const FaultDetail& detail) {
  if (atomicCAS(&g.state->faulted, 0u, 1u) != 0u) return;
  volatile FaultRecord& fault = g.host->fault;
  fault.kind = kind;
  fault.phase = op.phase;
  fault.lane = op.lane;
  fault.derivation = op.derivation;
  fault.call_site = op.call_site;
  fault.peer = detail.peer;
  fault.row = detail.row;
  fault.number = number;
  fault.expected = detail.expected;
  fault.seen = detail.seen;
  fault.seen_call_site = detail.header.call_site;
  fault.seen_operation = detail.header.operation;
  fault.seen_derivation = detail.header.derivation;
  fault.seen_number = detail.header.number;
  fault.stride = op.stride;
  fault.seen_stride = detail.header.stride;
  fault.time_ns = NowNs();
  __threadfence_system();  // before `ready`; pairs with the host's acquire of it in Check
  fault.ready = 1;
  *static_cast<volatile uint32_t*>(g.group_failed) = 1;
  if (!g.among_processes || kind == FaultKind::kPeerFailed) return;  // that peer has told all
  for (int32_t peer = 0; peer < g.num_ranks; ++peer) {
    if (peer == g.rank || g.memories[peer] == nullptr) continue;  // the mover tells far ones
    char* const word = g.memories[peer] + g.layout.FaultWordOffset();
    *reinterpret_cast<volatile uint64_t*>(word) = static_cast<uint64_t>(g.rank) + 1;
  }
}

// Whether another rank has failed, here or in another process: then this one has failed as well.
// The words are in host memory, or written by other hosts: to be asked for rarely.
__device__ inline bool OthersFailed(const GroupConstants& g, const OperationParams& op,
                                    int64_t number) {
  if (load_relaxed_system(g.group_failed)) {
    atomicExch(&g.state->faulted, 1u);
    return true;
  }
  if (!g.among_processes) return false;
  const auto* const word =
      reinterpret_cast<const uint32_t*>(g.memory + g.layout.FaultWordOffset());
  const uint32_t told = load_relaxed_system(word);
  if (told == 0) return false;
  Report(g, op, FaultKind::kPeerFailed, number, {static_cast<int32_t>(told) - 1});
  return true;
}

// ---- start and end of a phase -------------------------------------------------------------------

struct Begun {
  bool ok;         // else the phase does nothing but to poison its outputs
  int64_t number;  // k
  int32_t set;     // one of the rank's, also if not ok
};

// The state of a set, the same in all threads of a warp: each has read that of one set, so that
// knowing which one is asked for costs no further load.
__device__ inline LaneState StateOf(const LaneState& mine, int32_t set) {
  return {__shfl_sync(~0u, mine.sent, set), __shfl_sync(~0u, mine.received, set)};
}
__device__ inline LaneState LoadSetOfThread(const GroupConstants& g, const SetsOfRank& sets) {
  const auto warp_lane = static_cast<int32_t>(threadIdx.x) % kWarp;
  return warp_lane < sets.count ? g.state->sets[warp_lane] : LaneState{};
}

// S1, the same in every block of every kernel of a send phase: what it depends on changes at the
// very end. By all threads of a block, and the same for all of them: a fault may be told at any
// moment.
__device__ inline Begun BeginSendPhase(const GroupConstants& g, const OperationParams& op,
                                       const SetsOfRank& sets) {
  // All loads at once: they are far away.
  const LaneState mine = LoadSetOfThread(g, sets);
  const uint32_t in_flight = g.state->in_flight;
  const int32_t num_sets = g.state->num_sets;
  const int64_t sends = g.state->sends;
  const Token token = Token::Read(op.token);
  const int32_t position = op.position[0];
  const bool faulted = Faulted(g);  // an acquire, behind which other loads would wait for it
  const bool first = blockIdx.x == 0 && threadIdx.x == 0;
  const int32_t set = FirstFreeSet(in_flight, num_sets);
  const LaneState state = StateOf(mine, set % kMaxSets);
  Begun begun{false, NumberInSet(sends, state.sent), set < num_sets ? set : 0};
  if (faulted) {
    // It takes no further part.
  } else if (!token.used_once()) {
    if (first) Report(g, op, FaultKind::kInvalidArgument, begun.number, {});
  } else if (position != g.rank) {
    if (first) Report(g, op, FaultKind::kInvalidArgument, begun.number, {-1, -1, g.rank, position});
  } else if (set == num_sets) {
    if (first) Report(g, op, FaultKind::kNoFreeSet, begun.number, {-1, -1, num_sets, 0});
  } else {
    begun.ok = true;
  }
  begun.ok = __syncthreads_and(begun.ok);
  return begun;
}

// The same for a recv phase.
__device__ inline Begun BeginRecvPhase(const GroupConstants& g, const OperationParams& op,
                                       const SetsOfRank& sets) {
  const LaneState mine = LoadSetOfThread(g, sets);
  const Token token = Token::Read(op.token);
  const bool faulted = Faulted(g);  // the last of all loads, see BeginSendPhase
  const bool first = blockIdx.x == 0 && threadIdx.x == 0;
  const bool known = !token.zero() && token.set() >= 0 && token.set() < sets.count;
  Begun begun{false, token.zero() ? kNoOperation : token.number, known ? token.set() : 0};
  const LaneState state = StateOf(mine, begun.set);
  if (faulted || token.zero()) {
    // It takes no further part; or nothing was sent, see NothingWasSent.
  } else if (!token.used_once()) {
    if (first) Report(g, op, FaultKind::kInvalidArgument, token.number, {});
  } else if (!known || !MayReceive(state, token.number)) {
    if (first) {
      Report(g, op, FaultKind::kTwoInFlight, token.number, {-1, -1, token.number, state.sent});
    }
  } else {
    begun.ok = true;
  }
  begun.ok = __syncthreads_and(begun.ok);
  return begun;
}

// The cotangent of a dispatch or combine that nothing depends on: nothing was sent, all is zero.
__device__ inline bool NothingWasSent(const OperationParams& op) {
  return Token::Read(op.token).zero();
}

// Called by the first kernel of a phase.
__device__ inline void NoteBegin(const SetPointers& set) {
  if (blockIdx.x != 0 || threadIdx.x != 0) return;
  set.scratch->begin_ns = NowNs();
  atomicAdd(&set.scratch->phases_begun, 1u);  // nobody waits for what it returns
}

// Whether this is the last block of the grid to get here, the same in all of its threads. What the
// others did before is visible to it.
__device__ inline bool IsLastBlock(const SetPointers& set) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    last = add_acq_rel_gpu(&set.scratch->blocks_done, 1) + 1 == gridDim.x;
    if (last) set.scratch->blocks_done = 0;
  }
  __syncthreads();
  return last;
}

// What EndPhase reads, and whether the rank has failed, as the last block finds it: all loads at
// once.
struct Ending {
  int64_t begin_ns, arrival_ns, sends;
  uint32_t phases_begun, phases_ended;
  bool faulted;

  __device__ Ending(const GroupConstants& g, const SetPointers& set)
      : begin_ns(set.scratch->begin_ns),
        arrival_ns(static_cast<int64_t>(set.scratch->last_arrival_ns)),
        sends(g.state->sends),
        phases_begun(set.scratch->phases_begun),
        phases_ended(set.scratch->phases_ended),
        faulted(Faulted(g)) {}
};

// S10, or the end of a send phase: by one thread of the last block. Counters are added to without
// being read: each read would cost a microsecond. S1 takes no set whose operation has been sent;
// one that is being sent at the same time (a CUDA graph may run side by side what no data orders)
// is seen here, since it takes the same set.
__device__ inline void EndPhase(const GroupConstants& g, const SetPointers& set,
                                const OperationParams& op, const Begun& begun,
                                const Ending& ending, bool ok, int64_t wire_rows,
                                int64_t bytes_read, int64_t bytes_written) {
  SetScratch& scratch = *set.scratch;
  const int64_t sends = ending.sends;
  const bool send = IsSend(op.phase);
  // A send that began beside this one may have ended since, and counted.
  const bool overtaken = send && ok && OperationOfNumber(begun.number) != sends;
  if (ending.phases_begun != ending.phases_ended + 1 || overtaken) {
    Report(g, op, FaultKind::kTwoInFlight, begun.number, {-1, -1, begun.number, begun.number});
    ok = false;
  }
  scratch.phases_ended = ending.phases_begun;
  const auto phase = static_cast<int32_t>(op.phase);
  if (send) atomicAdd(&scratch.epoch, 1ull);
  RankState& rank = *g.state;
  if (ok && send) {
    rank.sets[begun.set].sent = begun.number;
    atomicOr(&rank.in_flight, 1u << begun.set);  // a phase of another set may run beside this one
    rank.sends = sends + 1;
  } else if (ok) {
    FinishRecv(rank.sets[begun.set], begun.number);
    atomicAnd(&rank.in_flight, ~(1u << begun.set));
  }
  Token::InSet(begun.number, begun.set).Write(op.token_out);
  scratch.last_arrival_ns = 0;
  scratch.copies = 0;
  if (!ok) return;
  atomicAdd(&g.state->calls[phase], 1ull);
  atomicAdd(&g.state->rows[phase], static_cast<unsigned long long>(wire_rows));
  atomicAdd(&g.state->bytes[phase], static_cast<unsigned long long>(wire_rows * op.stride));
  if (ending.arrival_ns > ending.begin_ns) {
    atomicAdd(&g.state->wait_ns[phase],
              static_cast<unsigned long long>(ending.arrival_ns - ending.begin_ns));
  }
  const int64_t operation = OperationOfNumber(begun.number);
  scratch.trace[operation % kTracedOperations][phase] = {
      op.lane, op.derivation, begun.number, ending.begin_ns, NowNs(), bytes_read, bytes_written};
}

}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_KERNELS_PHASE_CUH_
