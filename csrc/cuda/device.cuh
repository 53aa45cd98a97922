// SPDX-License-Identifier: Apache-2.0
//
// What the kernels of all phases share: begin and end of a phase, faults, and the hand-over of
// chunks. Steps S1 … S10 are those of PROTOCOL.md.
#ifndef SMFREE_CSRC_CUDA_DEVICE_CUH_
#define SMFREE_CSRC_CUDA_DEVICE_CUH_

#include <cstdint>

#include "csrc/cuda/launch.h"
#include "csrc/cuda/state.h"
#include "csrc/protocol/signals.h"
#include "csrc/protocol/token.h"

namespace smfree::cuda {

constexpr int32_t kWarp = 32;
constexpr int32_t kWarps = kThreads / kWarp;

// ---- time and memory order -----------------------------------------------------------------------

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

// ---- faults --------------------------------------------------------------------------------------

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
}

// ---- begin and end of a phase --------------------------------------------------------------------

struct Begun {
  bool ok;         // else the phase does nothing but to poison its outputs
  int64_t number;  // k
};

// S1, the same in every block of every kernel of a send phase: `sent` changes at the very end.
__device__ inline Begun BeginSendPhase(const Context& c) {
  // All loads at once: they are far apart.
  LaneState lane = c.scratch->state;
  const bool faulted = Faulted(c);
  const Token token = Token::Read(c.token);
  const int32_t position = c.position[0];
  const bool first = blockIdx.x == 0 && threadIdx.x == 0;
  Begun begun{false, lane.sent + 1};
  if (faulted) return begun;
  if (!token.used_once()) {
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
  return begun;
}

// The same for a recv phase. A zero token is not looked at here.
__device__ inline Begun BeginRecvPhase(const Context& c) {
  const LaneState lane = c.scratch->state;
  const bool faulted = Faulted(c);
  const Token token = Token::Read(c.token);
  const bool first = blockIdx.x == 0 && threadIdx.x == 0;
  Begun begun{false, token.number};
  if (faulted) return begun;
  if (!token.used_once()) {
    if (first) Report(c, FaultKind::kInvalidArgument, token.number, {});
  } else if (!MayReceive(lane, token.number)) {
    if (first) {
      Report(c, FaultKind::kTwoInFlight, token.number, {-1, -1, token.number, lane.sent});
    }
  } else {
    begun.ok = true;
  }
  return begun;
}

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
  const bool send = c.phase == Phase::kDispatchSend || c.phase == Phase::kCombineSend;
  const auto phase = static_cast<int32_t>(c.phase);
  if (send) atomicAdd(&scratch.epoch, 1ull);
  if (ok && send) scratch.state.sent = begun.number;
  if (ok && !send) FinishRecv(scratch.state, begun.number);
  Token{1.0f, begun.number, 0, 0}.Write(c.token_out);
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

// ---- messages ------------------------------------------------------------------------------------

// Where the message to `peer` is built: in the send region, or where the peer will read it.
__device__ inline char* MessageTo(const Context& c, int64_t number, int32_t peer) {
  if (peer == c.rank || c.push) {
    return c.memories[peer] + c.layout.RecvRegionOffset(kWire, c.lane_index, number, c.rank);
  }
  return c.memory + c.layout.SendRegionOffset(kWire, c.lane_index, number, peer);
}
__device__ inline const char* MessageFrom(const Context& c, int64_t number, int32_t source) {
  return c.memory + c.layout.RecvRegionOffset(kWire, c.lane_index, number, source);
}
__device__ inline MessageLayout LayoutOf(const Context& c, int64_t rows) {
  return MessageLayout(rows, c.experts, c.slots, c.layout.row_bytes);
}

__device__ inline void WriteHeader(const Context& c, int64_t number, char* message, int32_t rows) {
  *reinterpret_cast<RegionHeader*>(message) = {
      number,   c.call_site, c.operation, c.lane,  c.derivation, c.rank,
      c.tokens, rows,        c.experts,   c.slots, c.chunks};
}

// One message that this rank packs.
struct Outgoing {
  char* rows;  // its first row
  Chunks chunks;
};

__device__ inline Outgoing OutgoingTo(const Context& c, int64_t number, int32_t peer,
                                      int32_t rows) {
  return {MessageTo(c, number, peer) + c.layout.header_bytes + LayoutOf(c, rows).rows_offset,
          Chunks(rows, c.chunks)};
}

// S4: hands chunk `chunk` of the message to `peer` over. All of it has been written by now, as this
// thread has observed.
__device__ inline void HandOver(const Context& c, int64_t number, int32_t peer,
                                const Chunks& chunks, int32_t chunk) {
  const uint64_t signal = SignalAfterChunk(number, chunk, chunks.count);
  if (c.push) {
    char* const word =
        c.memories[peer] + c.layout.SignalOffset(kWire, c.lane_index, number, c.rank);
    store_release_system(reinterpret_cast<uint64_t*>(word), signal);
    return;
  }
  const int64_t rows_begin = c.layout.header_bytes + LayoutOf(c, chunks.rows).rows_offset;
  const int64_t begin = chunk == 0 ? 0 : rows_begin + chunks.Begin(chunk) * c.layout.row_bytes;
  const int64_t end = rows_begin + chunks.End(chunk) * c.layout.row_bytes;
  const uint64_t ticket = atomicAdd(&c.state->queue_tail, 1ull);
  Descriptor& entry = c.queue[ticket & c.queue_mask];
  entry.signal = signal;
  entry.begin = begin;
  entry.bytes = end - begin;
  entry.lane_index = c.lane_index;
  entry.peer = peer;
  store_release_system(&entry.ticket, ticket + 1);  // pairs with the mover's loop
}

// A block packs one tile of rows per round, a piece per warp, and the last warp to end its piece
// counts the tile. Warps do not wait for one another, unless one is kRounds ahead. In shared memory.
struct Rounds {
  static constexpr uint32_t kRounds = 4;
  uint32_t ended[kRounds];  // pieces, ever, of the rounds that share the word

  // By all threads of a block, which meet afterwards.
  __device__ void Clear() {
    if (threadIdx.x < kRounds) ended[threadIdx.x] = 0;
  }
  // Before a warp's work in `round`, by all of its lanes.
  __device__ void Begin(uint32_t round) {
    volatile uint32_t& word = ended[round % kRounds];
    while (word < round / kRounds * kWarps) __nanosleep(20);
    __syncwarp();
  }
  // After it, the same in all lanes: whether this was the block's last piece of the round. If so,
  // all of them are visible at gpu scope to what this warp does next.
  __device__ bool End(uint32_t round) {
    __syncwarp();
    uint32_t before = 0;
    if (threadIdx.x % kWarp == 0) {
      __threadfence_block();  // the piece, before the count
      before = atomicAdd(&ended[round % kRounds], 1u);
    }
    before = __shfl_sync(~0u, before, 0);
    if (before % kWarps != kWarps - 1) return false;
    __threadfence();
    return true;
  }
};

// Row `row` of the message to `peer` is complete, as this thread has observed at gpu scope. Whoever
// completes a chunk hands it over, after the chunks before it: their blocks are running, so the wait
// is short.
__device__ inline void CountRow(const Context& c, int64_t number, int32_t peer,
                                const Chunks& chunks, int32_t row) {
  if (peer == c.rank) return;
  const int32_t chunk = chunks.Of(row);
  uint32_t& packed = c.scratch->packed[peer][chunk];
  if (atomicAdd(&packed, 1u) + 1 != static_cast<uint32_t>(chunks.RowsIn(chunk))) return;
  __threadfence();  // the others' counts, before what is handed over
  uint32_t& posted = c.scratch->posted[peer];
  while (load_acquire_gpu(&posted) != static_cast<uint32_t>(chunk)) __nanosleep(100);
  packed = 0;
  HandOver(c, number, peer, chunks, chunk);
  store_release_gpu(&posted, chunk + 1 == chunks.count ? 0u : static_cast<uint32_t>(chunk) + 1);
}

// Messages without rows are complete once their header is written, by the kernel before this one.
__device__ inline void HandOverEmpty(const Context& c, int64_t number, const Outgoing* outgoing) {
  if (blockIdx.x != 0) return;
  for (int32_t peer = threadIdx.x; peer < c.num_ranks; peer += blockDim.x) {
    if (peer != c.rank && outgoing[peer].chunks.rows == 0) {
      HandOver(c, number, peer, outgoing[peer].chunks, 0);
    }
  }
}

// ---- waiting -------------------------------------------------------------------------------------

// The chunks that a block has seen arrive, in shared memory: one warp at a time looks at the signal
// for all of them. Thousands of warps that do would keep the mover's store from it.
struct Arrivals {
  int32_t chunks[kMaxRanks];
  uint32_t looking[kMaxRanks];

  // By all threads of a block, which meet afterwards.
  __device__ void Clear() {
    for (int32_t source = threadIdx.x; source < kMaxRanks; source += blockDim.x) {
      chunks[source] = 0;
      looking[source] = 0;
    }
  }
};

// S7: until `wanted` chunks (kAllChunks: all) of operation `number` from `source` are here. False
// if the rank is at fault, as after the deadline.
__device__ inline bool WaitForChunks(const Context& c, int64_t number, int32_t source,
                                     int32_t wanted, Arrivals& arrivals) {
  if (source == c.rank) return true;
  volatile int32_t& here = arrivals.chunks[source];
  const char* const word = c.memory + c.layout.SignalOffset(kWire, c.lane_index, number, source);
  int64_t begin = 0;
  for (int32_t turn = 0; here < wanted; ++turn) {
    if (atomicExch(&arrivals.looking[source], 1u) == 0) {
      const uint64_t seen = load_acquire_system(reinterpret_cast<const uint64_t*>(word));
      const int32_t chunks = ChunksArrived(seen, number);
      __threadfence_block();  // what the signal vouches for, before `here`
      if (chunks > here) here = chunks;
      atomicExch(&arrivals.looking[source], 0u);
      if (chunks >= wanted) break;
    }
    if (begin == 0) begin = NowNs();
    __nanosleep(turn < 4 ? 100 : 2000);
    if (turn % 16 != 15) continue;
    if (Faulted(c)) return false;
    // Host memory is far: one block asks whether another rank is at fault.
    if (blockIdx.x == 0 && load_relaxed_system(c.group_failed)) {
      atomicExch(&c.state->faulted, 1u);
      return false;
    }
    if (NowNs() - begin > static_cast<int64_t>(c.timeout_ns)) {
      const uint64_t seen = load_acquire_system(reinterpret_cast<const uint64_t*>(word));
      Report(c, FaultKind::kDeadline, number, {source, -1, number, NumberOf(seen)});
      return false;
    }
  }
  __threadfence_block();  // `here`, before what it vouches for
  if (begin != 0 && blockIdx.x == 0) {
    atomicMax(&c.scratch->last_arrival_ns, static_cast<unsigned long long>(NowNs()));
  }
  return true;
}

// S8, of the message from `source`, whose first chunk is here. `rows` is what the handle says, or
// -1 for any number.
__device__ inline bool Verify(const Context& c, int64_t number, int32_t source, int32_t rows,
                              const RegionHeader& header) {
  const bool same = header.number == number && header.call_site == c.call_site &&
                    header.operation == c.operation && header.lane == c.lane &&
                    header.derivation == c.derivation && header.source == source &&
                    header.tokens == c.tokens && header.experts == c.experts &&
                    header.slots == c.slots && header.rows >= 0 && header.rows <= c.tokens &&
                    header.chunks == c.chunks &&
                    (rows < 0 || header.rows == rows);
  if (!same) {
    Report(c, FaultKind::kScheduleMismatch, number,
           {source, -1, rows < 0 ? c.tokens : rows, rows < 0 ? header.tokens : header.rows, header});
  }
  return same;
}

// S7 and S8 for the first chunk of every source, by all threads of a block: fills rows[s].
// `expected_rows` [R] may be null. The same result in all threads.
__device__ inline bool OpenMessages(const Context& c, int64_t number, const int32_t* expected_rows,
                                    int32_t* rows, Arrivals& arrivals) {
  arrivals.Clear();
  __syncthreads();
  bool ok = true;
  for (int32_t source = threadIdx.x; source < c.num_ranks; source += blockDim.x) {
    if (!WaitForChunks(c, number, source, 1, arrivals)) {
      ok = false;
      continue;
    }
    const auto* const words =
        reinterpret_cast<const uint64_t*>(MessageFrom(c, number, source));
    union {
      RegionHeader header;
      uint64_t copy[sizeof(RegionHeader) / sizeof(uint64_t)];
    };
    for (size_t i = 0; i < sizeof(RegionHeader) / sizeof(uint64_t); ++i) copy[i] = __ldcg(words + i);
    ok = ok && Verify(c, number, source, expected_rows ? expected_rows[source] : -1, header);
    rows[source] = header.rows;
  }
  return __syncthreads_and(ok);
}

}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_DEVICE_CUH_
