// SPDX-License-Identifier: Apache-2.0
//
// Messages on the device: where they are built and read, how their chunks are handed over (S4), and
// how they are waited for and verified (S7, S8). A message is named by its leg and its region there
// (nodes.h); in direct mode a region is the rank at the other end.
#ifndef SMFREE_CSRC_CUDA_KERNELS_MESSAGES_CUH_
#define SMFREE_CSRC_CUDA_KERNELS_MESSAGES_CUH_

#include <cstdint>

#include "csrc/cuda/kernels/phase.cuh"

namespace smfree::cuda {

// The messages of one operation on one leg, from this rank and to it.
struct Messages {
  const Context& c;
  Leg leg;
  int64_t number;

  __device__ int32_t count() const { return c.nodes.Regions(leg); }
  __device__ int32_t Peer(int32_t region) const { return c.nodes.Peer(leg, c.rank, region); }
  // A rank's message to itself is built where it will be read, by an earlier kernel of the stream.
  __device__ bool IsOwn(int32_t region) const { return Peer(region) == c.rank; }
  // Whether the kernel itself stores the message at its peer: a small one, to a near peer.
  __device__ bool Pushes(int32_t region) const {
    return c.push && c.memories[Peer(region)] != nullptr;
  }

  // Where a message is built: in the send region, or where the peer will read it.
  __device__ char* To(int32_t region) const {
    if (IsOwn(region) || Pushes(region)) {
      const int32_t there = c.nodes.RegionAtPeer(leg, c.rank, region);
      return c.memories[Peer(region)] +
             c.layout.RecvRegionOffset(leg, c.lane_index, number, there);
    }
    return c.memory + c.layout.SendRegionOffset(leg, c.lane_index, number, region);
  }
  __device__ const char* From(int32_t region) const {
    return c.memory + c.layout.RecvRegionOffset(leg, c.lane_index, number, region);
  }
};

__device__ inline MessageLayout LayoutOf(const Context& c, int64_t rows) {
  return MessageLayout(rows, c.experts, c.slots, c.layout.row_bytes);
}

// Counts the bytes of the messages with counts[region] rows that leave the node. By one thread.
__device__ inline void NoteInternode(const Messages& m, const int32_t* counts) {
  const Context& c = m.c;
  if (c.nodes.count() == 1) return;
  int64_t bytes = 0;
  for (int32_t region = 0; region < m.count(); ++region) {
    const bool leaves = c.nodes.NodeOf(m.Peer(region)) != c.nodes.NodeOf(c.rank);
    if (leaves) bytes += LayoutOf(c, counts[region]).bytes;
  }
  atomicAdd(&c.state->internode_bytes[static_cast<int32_t>(c.operation)],
            static_cast<unsigned long long>(bytes));
}

// And those of what a relay sends on.
__device__ inline void NoteRelayed(const Messages& m, const int32_t* counts) {
  const Context& c = m.c;
  int64_t rows = 0, bytes = 0;
  for (int32_t region = 0; region < m.count(); ++region) {
    rows += counts[region];
    bytes += LayoutOf(c, counts[region]).bytes;
  }
  atomicAdd(&c.state->rows_relayed, static_cast<unsigned long long>(rows));
  atomicAdd(&c.state->bytes_relayed, static_cast<unsigned long long>(bytes));
}

__device__ inline void WriteHeader(const Messages& m, int32_t region, int32_t rows) {
  const Context& c = m.c;
  *reinterpret_cast<RegionHeader*>(m.To(region)) = {
      m.number, c.call_site, c.operation, c.lane,  c.derivation, c.rank,
      c.tokens, rows,        c.experts,   c.slots, c.chunks};
}

// The headers of all messages, of counts that a handle says.
__device__ inline void WriteHeaders(const Messages& m, const int32_t* counts) {
  if (blockIdx.x != 0) return;
  for (int32_t region = threadIdx.x; region < m.count(); region += blockDim.x) {
    const int32_t rows = counts[region];
    if (rows < 0 || rows > m.c.tokens) {
      Report(m.c, FaultKind::kInvalidArgument, m.number, {region, -1, m.c.tokens, rows});
    } else {
      WriteHeader(m, region, rows);
    }
  }
}

// One message that this rank packs.
struct Outgoing {
  char* rows;  // its first row
  Chunks chunks;
};

__device__ inline Outgoing OutgoingTo(const Messages& m, int32_t region, int32_t rows) {
  return {m.To(region) + m.c.layout.header_bytes + LayoutOf(m.c, rows).rows_offset,
          Chunks(rows, m.c.chunks)};
}

// The bytes of a chunk in its message.
struct ChunkBytes {
  int64_t begin, end;

  __device__ ChunkBytes(const Context& c, const Chunks& chunks, int32_t chunk) {
    const int64_t rows_begin = c.layout.header_bytes + LayoutOf(c, chunks.rows).rows_offset;
    begin = chunk == 0 ? 0 : rows_begin + chunks.Begin(chunk) * c.layout.row_bytes;
    end = rows_begin + chunks.End(chunk) * c.layout.row_bytes;
  }
};

// S4: hands chunk `chunk` of a message over. All of it has been written by now, as this thread has
// observed.
__device__ inline void HandOver(const Messages& m, int32_t region, const Chunks& chunks,
                                int32_t chunk) {
  const Context& c = m.c;
  const uint64_t signal = SignalAfterChunk(m.number, chunk, chunks.count);
  if (m.Pushes(region)) {
    const int32_t there = c.nodes.RegionAtPeer(m.leg, c.rank, region);
    char* const word = c.memories[m.Peer(region)] +
                       c.layout.SignalOffset(m.leg, c.lane_index, m.number, there);
    store_release_system(reinterpret_cast<uint64_t*>(word), signal);
    return;
  }
  // The kernel behind this one puts what is for other nodes (put_messages.cu).
  if (c.puts_on_device && c.memories[m.Peer(region)] == nullptr) return;
  const ChunkBytes part(c, chunks, chunk);
  const uint64_t ticket = atomicAdd(&c.state->queue_tail, 1ull);
  Descriptor& entry = c.queue[ticket & c.queue_mask];
  entry.signal = signal;
  entry.begin = part.begin;
  entry.bytes = part.end - part.begin;
  entry.lane_index = c.lane_index;
  entry.leg = m.leg;
  entry.region = region;
  store_release_system(&entry.ticket, ticket + 1);  // pairs with the mover's loop
}

// Row `row` of a message is complete, as this thread has observed at gpu scope. Whoever completes a
// chunk hands it over, after the chunks before it. Their blocks are running: the wait is short,
// unless they wait for rows from others first, or the handle is broken and names a row twice in
// place of another one. So it is longer than any wait for others before it is taken for that.
__device__ inline void CountRow(const Messages& m, int32_t region, const Chunks& chunks,
                                int32_t row) {
  if (m.IsOwn(region)) return;
  const Context& c = m.c;
  const int32_t chunk = chunks.Of(row);
  uint32_t& packed = c.scratch->packed[region][chunk];
  if (atomicAdd(&packed, 1u) + 1 != static_cast<uint32_t>(chunks.RowsIn(chunk))) return;
  __threadfence();  // the others' counts, before what is handed over
  uint32_t& posted = c.scratch->posted[region];
  const int64_t begin = NowNs();
  while (load_acquire_gpu(&posted) != static_cast<uint32_t>(chunk)) {
    __nanosleep(100);
    if (Faulted(c)) return;
    if (NowNs() - begin <= 2 * static_cast<int64_t>(c.timeout_ns)) continue;
    return Report(c, FaultKind::kInvalidArgument, m.number,
                  {m.Peer(region), -1, chunks.rows, row});
  }
  packed = 0;
  HandOver(m, region, chunks, chunk);
  store_release_gpu(&posted, chunk + 1 == chunks.count ? 0u : static_cast<uint32_t>(chunk) + 1);
}

// Messages without rows are complete once their header is written, by the kernel before this one.
__device__ inline void HandOverEmpty(const Messages& m, const Outgoing* outgoing) {
  if (blockIdx.x != 0) return;
  for (int32_t region = threadIdx.x; region < m.count(); region += blockDim.x) {
    if (!m.IsOwn(region) && outgoing[region].chunks.rows == 0) {
      HandOver(m, region, outgoing[region].chunks, 0);
    }
  }
}

// ---- waiting ------------------------------------------------------------------------------------

// The chunks that a block has seen arrive, in shared memory: one warp at a time looks at the signal
// for all of them. Thousands of warps that do would keep the mover's store from it.
struct Arrivals {
  int32_t chunks[kMaxRanks];
  uint32_t looking[kMaxRanks];
  // Whether this block asks all the time if other ranks are at fault. The word is in host memory,
  // and many that read there slow the copy engine down: one thread of one block, for each message,
  // does. All others ask rarely (kTurnsOfTheOthers), in case that block waits for nothing.
  bool asks;

  // By all threads of a block, which meet afterwards.
  __device__ void Clear(bool asks_others = blockIdx.x == 0) {
    asks = asks_others;
    for (int32_t region = threadIdx.x; region < kMaxRanks; region += blockDim.x) {
      chunks[region] = 0;
      looking[region] = 0;
    }
  }
};

constexpr int32_t kTurnsOfTheOthers = 4096;  // some ten milliseconds

// How long a wait for a peer may last. Who waits for a relay is more patient than the relay, so
// that the fault names the rank that is silent, not one that waits for it.
__device__ inline int64_t PatienceNs(const Messages& m) {
  const auto timeout_ns = static_cast<int64_t>(m.c.timeout_ns);
  if (m.leg == m.c.nodes.FirstLeg(m.c.operation)) return timeout_ns;
  return timeout_ns + min(int64_t{1'000'000'000}, timeout_ns / 4);
}

// S7: until `wanted` chunks (kAllChunks: all) of a message are here. False if the rank is at fault,
// as after the deadline.
__device__ inline bool WaitForChunks(const Messages& m, int32_t region, int32_t wanted,
                                     Arrivals& arrivals) {
  if (m.IsOwn(region)) return true;
  const Context& c = m.c;
  volatile int32_t& here = arrivals.chunks[region];
  const char* const word = c.memory + c.layout.SignalOffset(m.leg, c.lane_index, m.number, region);
  int64_t begin = 0;
  for (int32_t turn = 0; here < wanted; ++turn) {
    const bool looks = atomicExch(&arrivals.looking[region], 1u) == 0;
    if (looks) {
      const uint64_t seen = load_acquire_system(reinterpret_cast<const uint64_t*>(word));
      const int32_t chunks = ChunksArrived(seen, m.number);
      __threadfence_block();  // what the signal vouches for, before `here`
      if (chunks > here) here = chunks;
      atomicExch(&arrivals.looking[region], 0u);
      if (chunks >= wanted) break;
    }
    if (begin == 0) begin = NowNs();
    __nanosleep(turn < 4 ? 100 : 2000);
    if (turn % 16 != 15) continue;
    if (Faulted(c)) return false;
    const bool asks = looks && (arrivals.asks || turn % kTurnsOfTheOthers == kTurnsOfTheOthers - 1);
    if (asks && load_relaxed_system(c.group_failed)) {
      atomicExch(&c.state->faulted, 1u);
      return false;
    }
    if (asks && c.among_processes) {
      const auto* const fault =
          reinterpret_cast<const uint32_t*>(c.memory + c.layout.FaultWordOffset());
      if (const uint32_t told = load_relaxed_system(fault)) {
        Report(c, FaultKind::kPeerFailed, m.number, {static_cast<int32_t>(told) - 1});
        return false;
      }
    }
    if (NowNs() - begin > PatienceNs(m)) {
      const uint64_t seen = load_acquire_system(reinterpret_cast<const uint64_t*>(word));
      Report(c, FaultKind::kDeadline, m.number,
             {m.Peer(region), -1, m.number, NumberOf(seen)});
      return false;
    }
  }
  __threadfence_block();  // `here`, before what it vouches for
  if (begin != 0 && blockIdx.x == 0) {
    atomicMax(&c.scratch->last_arrival_ns, static_cast<unsigned long long>(NowNs()));
  }
  return true;
}

// S8, of a message whose first chunk is here. `rows` is what the handle says, or -1 for any number.
__device__ inline bool Verify(const Messages& m, int32_t region, int32_t rows,
                              const RegionHeader& header) {
  const Context& c = m.c;
  const int32_t peer = m.Peer(region);
  const bool same = header.number == m.number && header.call_site == c.call_site &&
                    header.operation == c.operation && header.lane == c.lane &&
                    header.derivation == c.derivation && header.source == peer &&
                    header.tokens == c.tokens && header.experts == c.experts &&
                    header.slots == c.slots && header.rows >= 0 && header.rows <= c.tokens &&
                    header.chunks == c.chunks &&
                    (rows < 0 || header.rows == rows);
  if (!same) {
    Report(c, FaultKind::kScheduleMismatch, m.number,
           {peer, -1, rows < 0 ? c.tokens : rows, rows < 0 ? header.tokens : header.rows, header});
  }
  return same;
}

// S7 and S8 for the first chunk of a message: fills in `rows`. `expected_rows` may be -1.
__device__ inline bool OpenMessage(const Messages& m, int32_t region, int32_t expected_rows,
                                   int32_t& rows, Arrivals& arrivals) {
  if (!WaitForChunks(m, region, 1, arrivals)) return false;
  const auto* const words = reinterpret_cast<const uint64_t*>(m.From(region));
  union {
    RegionHeader header;
    uint64_t copy[sizeof(RegionHeader) / sizeof(uint64_t)];
  };
  for (size_t i = 0; i < sizeof(copy) / sizeof(copy[0]); ++i) copy[i] = __ldcg(words + i);
  rows = header.rows;
  return Verify(m, region, expected_rows, header);
}

// The same for all messages, by all threads of a block, with the same result in all of them.
// `expected_rows` may be null.
__device__ inline bool OpenMessages(const Messages& m, const int32_t* expected_rows, int32_t* rows,
                                    Arrivals& arrivals) {
  arrivals.Clear();
  __syncthreads();
  bool ok = true;
  for (int32_t region = threadIdx.x; region < m.count(); region += blockDim.x) {
    const int32_t expected = expected_rows ? expected_rows[region] : -1;
    ok = OpenMessage(m, region, expected, rows[region], arrivals) && ok;
  }
  return __syncthreads_and(ok);
}

}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_KERNELS_MESSAGES_CUH_
