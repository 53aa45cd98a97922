// SPDX-License-Identifier: Apache-2.0
//
// Messages on the device: where they are built and read, how their chunks are handed over (S4), and
// how they are waited for and verified (S7, S8).
#ifndef SMFREE_CSRC_CUDA_MESSAGES_CUH_
#define SMFREE_CSRC_CUDA_MESSAGES_CUH_

#include <cstdint>

#include "csrc/cuda/phase.cuh"

namespace smfree::cuda {

// Whether this kernel itself stores the message to `peer` there: a small one, to a near peer.
__device__ inline bool Pushes(const Context& c, int32_t peer) {
  return c.push && c.memories[peer] != nullptr;
}

// Where the message to `peer` is built: in the send region, or where the peer will read it.
__device__ inline char* MessageTo(const Context& c, int64_t number, int32_t peer) {
  if (peer == c.rank || Pushes(c, peer)) {
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

// The headers of all messages, of counts [R] that a handle says.
__device__ inline void WriteHeaders(const Context& c, int64_t number, const int32_t* counts) {
  if (blockIdx.x != 0) return;
  for (int32_t peer = threadIdx.x; peer < c.num_ranks; peer += blockDim.x) {
    const int32_t rows = counts[peer];
    if (rows < 0 || rows > c.tokens) {
      Report(c, FaultKind::kInvalidArgument, number, {peer, -1, c.tokens, rows});
    } else {
      WriteHeader(c, number, MessageTo(c, number, peer), rows);
    }
  }
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
  if (Pushes(c, peer)) {
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
// counts the tile. Warps do not wait for one another, unless one is kRounds ahead. In shared
// memory.
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
      __threadfence_block();  // the others' counts, before what the lanes below read
    }
    before = __shfl_sync(~0u, before, 0);
    if (before % kWarps != kWarps - 1) return false;
    __syncwarp();
    __threadfence();
    return true;
  }
};

// Row `row` of the message to `peer` is complete, as this thread has observed at gpu scope. Whoever
// completes a chunk hands it over, after the chunks before it: their blocks are running, so the
// wait is short, unless the handle is broken and names a row twice in place of another one.
__device__ inline void CountRow(const Context& c, int64_t number, int32_t peer,
                                const Chunks& chunks, int32_t row) {
  if (peer == c.rank) return;
  const int32_t chunk = chunks.Of(row);
  uint32_t& packed = c.scratch->packed[peer][chunk];
  if (atomicAdd(&packed, 1u) + 1 != static_cast<uint32_t>(chunks.RowsIn(chunk))) return;
  __threadfence();  // the others' counts, before what is handed over
  uint32_t& posted = c.scratch->posted[peer];
  const int64_t begin = NowNs();
  while (load_acquire_gpu(&posted) != static_cast<uint32_t>(chunk)) {
    __nanosleep(100);
    if (NowNs() - begin > static_cast<int64_t>(c.timeout_ns)) {
      return Report(c, FaultKind::kInvalidArgument, number, {peer, -1, chunks.rows, row});
    }
  }
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

// ---- waiting ------------------------------------------------------------------------------------

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
    if (blockIdx.x == 0 && c.among_processes) {
      const auto* const fault =
          reinterpret_cast<const uint32_t*>(c.memory + c.layout.FaultWordOffset());
      if (const uint32_t told = load_relaxed_system(fault)) {
        Report(c, FaultKind::kPeerFailed, number, {static_cast<int32_t>(told) - 1});
        return false;
      }
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
           {source, -1, rows < 0 ? c.tokens : rows, rows < 0 ? header.tokens : header.rows,
            header});
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
    for (size_t i = 0; i < sizeof(copy) / sizeof(copy[0]); ++i) copy[i] = __ldcg(words + i);
    ok = ok && Verify(c, number, source, expected_rows ? expected_rows[source] : -1, header);
    rows[source] = header.rows;
  }
  return __syncthreads_and(ok);
}

}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_MESSAGES_CUH_
