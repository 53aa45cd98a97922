// SPDX-License-Identifier: Apache-2.0
//
// What the kernels of all phases share: memory order, faults, and the begin and end of a phase.
// Steps S1 … S10 are those of PROTOCOL.md.
#ifndef SMFREE_CSRC_CUDA_KERNELS_PHASE_CUH_
#define SMFREE_CSRC_CUDA_KERNELS_PHASE_CUH_

#include <cstdint>

#include "csrc/cuda/host/launch.h"
#include "csrc/cuda/host/state.h"
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
// Of flags where being late does no harm.
__device__ inline uint32_t load_relaxed_system(const uint32_t* word) {
  uint32_t value;
  asm volatile("ld.relaxed.sys.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}

// The sum of `value` over the lanes up to this one, by all lanes of a warp.
template <typename T>
__device__ T SumUpToLane(T value) {
  const auto lane = static_cast<int32_t>(threadIdx.x) % kWarp;
  for (int32_t distance = 1; distance < kWarp; distance *= 2) {
    const T other = __shfl_up_sync(~0u, value, distance);
    if (lane >= distance) value += other;
  }
  return value;
}

// ---- faults -------------------------------------------------------------------------------------

__device__ inline bool Faulted(const Context& c) {
  return load_acquire_gpu(&c.state->faulted) != 0;
}

struct FaultDetail {
  int32_t peer = -1;
  int32_t row = -1;
  int64_t expected = 0;
  int64_t seen = 0;
  RegionHeader header = {};  // kScheduleMismatch: of the message that was seen
};

// Records the rank's first fault and tells the host and the other ranks.
__device__ inline void Report(const Context& c, FaultKind kind, int64_t number,
                              const FaultDetail& detail) {
  if (atomicCAS(&c.state->faulted, 0u, 1u) != 0u) return;
  volatile FaultRecord& fault = c.host->fault;
  fault.kind = kind;
  fault.phase = c.phase;
  fault.lane = c.lane;
  fault.derivation = c.derivation;
  fault.call_site = c.call_site;
  fault.peer = detail.peer;
  fault.row = detail.row;
  fault.number = number;
  fault.expected = detail.expected;
  fault.seen = detail.seen;
  fault.seen_call_site = detail.header.call_site;
  fault.seen_operation = detail.header.operation;
  fault.seen_derivation = detail.header.derivation;
  fault.seen_number = detail.header.number;
  fault.time_ns = NowNs();
  __threadfence_system();  // before `ready`; pairs with the host's acquire of it in Check
  fault.ready = 1;
  *static_cast<volatile uint32_t*>(c.group_failed) = 1;
  if (!c.among_processes || kind == FaultKind::kPeerFailed) return;  // that peer has told all
  for (int32_t peer = 0; peer < c.num_ranks; ++peer) {
    if (peer == c.rank || c.memories[peer] == nullptr) continue;  // the mover tells far ones
    char* const word = c.memories[peer] + c.layout.FaultWordOffset();
    *reinterpret_cast<volatile uint64_t*>(word) = static_cast<uint64_t>(c.rank) + 1;
  }
}

// ---- begin and end of a phase -------------------------------------------------------------------

struct Begun {
  bool ok;         // else the phase does nothing but to poison its outputs
  int64_t number;  // k
};

// S1, the same in every block of every kernel of a send phase: `sent` changes at the very end. By all
// threads of a block, and the same for all of them: a fault may be told at any moment.
__device__ inline Begun BeginSendPhase(const Context& c) {
  // All loads at once: they are far apart.
  LaneState lane = c.scratch->state;
  const bool faulted = Faulted(c);
  const Token token = Token::Read(c.token);
  const int32_t position = c.position[0];
  const bool first = blockIdx.x == 0 && threadIdx.x == 0;
  Begun begun{false, lane.sent + 1};
  if (faulted) {
    // It takes no further part.
  } else if (!token.used_once()) {
    if (first) Report(c, FaultKind::kInvalidArgument, begun.number, {});
  } else if (position != c.rank) {
    if (first) Report(c, FaultKind::kInvalidArgument, begun.number, {-1, -1, c.rank, position});
  } else if (lane.sent != lane.received) {
    if (first) {
      Report(c, FaultKind::kTwoInFlight, begun.number, {-1, -1, lane.sent, lane.received});
    }
  } else {
    begun.ok = BeginSend(lane, begun.number) == FaultKind::kNone;
  }
  begun.ok = __syncthreads_and(begun.ok);
  return begun;
}

// The same for a recv phase. A zero token is not looked at here.
__device__ inline Begun BeginRecvPhase(const Context& c) {
  const LaneState lane = c.scratch->state;
  const bool faulted = Faulted(c);
  const Token token = Token::Read(c.token);
  const bool first = blockIdx.x == 0 && threadIdx.x == 0;
  Begun begun{false, token.number};
  if (faulted) {
    // It takes no further part.
  } else if (!token.used_once()) {
    if (first) Report(c, FaultKind::kInvalidArgument, token.number, {});
  } else if (!MayReceive(lane, token.number)) {
    if (first) {
      Report(c, FaultKind::kTwoInFlight, token.number, {-1, -1, token.number, lane.sent});
    }
  } else {
    begun.ok = true;
  }
  begun.ok = __syncthreads_and(begun.ok);
  return begun;
}

// The cotangent of a dispatch or combine that nothing depends on: nothing was sent, all is zero.
__device__ inline bool NothingWasSent(const Context& c) { return Token::Read(c.token).zero(); }

// Called by the first kernel of a phase.
__device__ inline void NoteBegin(const Context& c) {
  if (blockIdx.x == 0 && threadIdx.x == 0) c.scratch->begin_ns = NowNs();
}

// Whether this is the last block of the grid to get here, the same in all of its threads. What the
// others did before is visible to it.
__device__ inline bool IsLastBlock(const Context& c) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    last = add_acq_rel_gpu(&c.scratch->blocks_done, 1) + 1 == gridDim.x;
    if (last) c.scratch->blocks_done = 0;
  }
  __syncthreads();
  return last;
}

// S10, or the end of a send phase: by one thread of the last block. Counters are added to without
// being read: each read would cost a microsecond.
__device__ inline void EndPhase(const Context& c, const Begun& begun, bool ok, int64_t wire_rows,
                                int64_t bytes_read, int64_t bytes_written) {
  LaneScratch& scratch = *c.scratch;
  const int64_t begin_ns = scratch.begin_ns;
  const auto arrival_ns = static_cast<int64_t>(scratch.last_arrival_ns);
  const bool send = IsSend(c.phase);
  const auto phase = static_cast<int32_t>(c.phase);
  if (send) atomicAdd(&scratch.epoch, 1ull);
  if (ok && send) scratch.state.sent = begun.number;
  if (ok && !send) FinishRecv(scratch.state, begun.number);
  Token{1.0f, begun.number}.Write(c.token_out);
  scratch.last_arrival_ns = 0;
  scratch.copies = 0;
  if (!ok) return;
  atomicAdd(&c.state->calls[phase], 1ull);
  atomicAdd(&c.state->rows[phase], static_cast<unsigned long long>(wire_rows));
  if (arrival_ns > begin_ns) {
    atomicAdd(&c.state->wait_ns[phase], static_cast<unsigned long long>(arrival_ns - begin_ns));
  }
  scratch.trace[begun.number % kTracedOperations][phase] = {begun.number, begin_ns, NowNs(),
                                                            bytes_read, bytes_written};
}

}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_KERNELS_PHASE_CUH_
