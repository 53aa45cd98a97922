// SPDX-License-Identifier: Apache-2.0
//
// Messages on the device: where they are built and read, how their chunks are handed over (S4), and
// how they are waited for and verified (S7, S8). A message is named by its leg and its region there
// (nodes.h); in direct mode a region is the rank at the other end.
#ifndef SMFREE_CSRC_CUDA_KERNELS_MESSAGES_CUH_
#define SMFREE_CSRC_CUDA_KERNELS_MESSAGES_CUH_

#include <cstdint>

#include "csrc/core/patience.h"
#include "csrc/cuda/kernels/phase.cuh"

namespace smfree::cuda {

// The messages of one operation on one leg, from this rank and to it.
struct Messages {
  const GroupConstants& g;
  const LanePointers& lane;
  const OperationParams& op;
  Leg leg;
  int64_t number;

  __device__ int32_t count() const { return g.nodes.Regions(leg); }
  __device__ int32_t Peer(int32_t region) const { return g.nodes.Peer(leg, g.rank, region); }
  // A rank's message to itself is built where it will be read, by an earlier kernel of the stream.
  __device__ bool IsOwn(int32_t region) const { return Peer(region) == g.rank; }
  // Whether the kernel itself stores the message at its peer: a small one, to a near peer.
  __device__ bool Pushes(int32_t region) const {
    return op.push && g.memories[Peer(region)] != nullptr;
  }

  // Where a message is built: in the send region, or where the peer will read it.
  __device__ char* To(int32_t region) const {
    if (IsOwn(region) || Pushes(region)) {
      const int32_t there = g.nodes.RegionAtPeer(leg, g.rank, region);
      return g.memories[Peer(region)] + g.layout.RecvRegionOffset(leg, lane.index, number, there);
    }
    return g.memory + g.layout.SendRegionOffset(leg, lane.index, number, region);
  }
  __device__ const char* From(int32_t region) const {
    return g.memory + g.layout.RecvRegionOffset(leg, lane.index, number, region);
  }
};

__device__ inline MessageLayout LayoutOf(const GroupConstants& g, const OperationParams& op,
                                         int64_t rows) {
  return MessageLayout(rows, op.experts, op.slots, g.layout.row_bytes);
}

// Counts the bytes of the messages with counts[region] rows that leave the node. By one thread.
__device__ inline void NoteInternode(const Messages& m, const int32_t* counts) {
  const GroupConstants& g = m.g;
  const OperationParams& op = m.op;
  if (g.nodes.count() == 1) return;
  int64_t bytes = 0;
  for (int32_t region = 0; region < m.count(); ++region) {
    const bool leaves = g.nodes.NodeOf(m.Peer(region)) != g.nodes.NodeOf(g.rank);
    if (leaves) bytes += LayoutOf(g, op, counts[region]).bytes;
  }
  atomicAdd(&g.state->internode_bytes[static_cast<int32_t>(op.operation)],
            static_cast<unsigned long long>(bytes));
}

// And those of what a relay sends on.
__device__ inline void NoteRelayed(const Messages& m, const int32_t* counts) {
  const GroupConstants& g = m.g;
  const OperationParams& op = m.op;
  int64_t rows = 0, bytes = 0;
  for (int32_t region = 0; region < m.count(); ++region) {
    rows += counts[region];
    bytes += LayoutOf(g, op, counts[region]).bytes;
  }
  atomicAdd(&g.state->rows_relayed, static_cast<unsigned long long>(rows));
  atomicAdd(&g.state->bytes_relayed, static_cast<unsigned long long>(bytes));
}

__device__ inline void WriteHeader(const Messages& m, int32_t region, int32_t rows) {
  const GroupConstants& g = m.g;
  const OperationParams& op = m.op;
  *reinterpret_cast<RegionHeader*>(m.To(region)) = {
      m.number,  op.call_site, op.operation, op.lane,  op.derivation, g.rank,
      op.tokens, rows,         op.experts,   op.slots, op.chunks};
}

// The headers of all messages, of counts that a handle says.
__device__ inline void WriteHeaders(const Messages& m, const int32_t* counts) {
  if (blockIdx.x != 0) return;
  for (int32_t region = threadIdx.x; region < m.count(); region += blockDim.x) {
    const int32_t rows = counts[region];
    if (rows < 0 || rows > m.op.tokens) {
      Report(m.g, m.op, FaultKind::kInvalidArgument, m.number, {region, -1, m.op.tokens, rows});
    } else {
      WriteHeader(m, region, rows);
    }
  }
}

// One message that this rank packs.
struct Outgoing {
  char* first_row;
  Chunks chunks;
};

__device__ inline Outgoing OutgoingTo(const Messages& m, int32_t region, int32_t rows) {
  return {m.To(region) + m.g.layout.header_bytes + LayoutOf(m.g, m.op, rows).rows_offset,
          Chunks(rows, m.op.chunks)};
}

// The bytes of a chunk in its message.
struct ChunkBytes {
  int64_t begin, end;

  __device__ ChunkBytes(const GroupConstants& g, const OperationParams& op, const Chunks& chunks,
                        int32_t chunk) {
    const int64_t rows_begin = g.layout.header_bytes + LayoutOf(g, op, chunks.rows).rows_offset;
    begin = chunk == 0 ? 0 : rows_begin + chunks.Begin(chunk) * g.layout.row_bytes;
    end = rows_begin + chunks.End(chunk) * g.layout.row_bytes;
  }
};

// S4: hands chunk `chunk` of a message over. All of it has been written by now, as this thread has
// observed.
__device__ inline void HandOver(const Messages& m, int32_t region, const Chunks& chunks,
                                int32_t chunk) {
  const GroupConstants& g = m.g;
  const LanePointers& lane = m.lane;
  const OperationParams& op = m.op;
  const uint64_t signal = SignalAfterChunk(m.number, chunk, chunks.count);
  if (m.Pushes(region)) {
    const int32_t there = g.nodes.RegionAtPeer(m.leg, g.rank, region);
    char* const word =
        g.memories[m.Peer(region)] + g.layout.SignalOffset(m.leg, lane.index, m.number, there);
    store_release_system(reinterpret_cast<uint64_t*>(word), signal);
    return;
  }
  // The kernel behind this one puts what is for other nodes (put_messages.cu).
  if (g.puts_on_device && g.memories[m.Peer(region)] == nullptr) return;
  const ChunkBytes range(g, op, chunks, chunk);
  const uint64_t ticket = atomicAdd(&g.state->queue_tail, 1ull);
  Descriptor& entry = g.queue[ticket & g.queue_mask];
  entry.signal = signal;
  entry.begin = range.begin;
  entry.bytes = range.end - range.begin;
  entry.lane_index = lane.index;
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
  const GroupConstants& g = m.g;
  const LanePointers& lane = m.lane;
  const OperationParams& op = m.op;
  const int32_t chunk = chunks.Of(row);
  uint32_t& packed = lane.scratch->packed[region][chunk];
  if (atomicAdd(&packed, 1u) + 1 != static_cast<uint32_t>(chunks.RowsIn(chunk))) return;
  __threadfence();  // the others' counts, before what is handed over
  uint32_t& posted = lane.scratch->posted[region];
  const int64_t begin = NowNs();
  while (load_acquire_gpu(&posted) != static_cast<uint32_t>(chunk)) {
    __nanosleep(100);
    if (Faulted(g)) return;
    if (NowNs() - begin <= 2 * g.timeout_ns) continue;
    return Report(g, op, FaultKind::kInvalidArgument, m.number,
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

// S7: until `wanted` chunks (kAllChunks: all) of a message are here. False if the rank is at fault,
// as after the deadline.
__device__ inline bool WaitForChunks(const Messages& m, int32_t region, int32_t wanted,
                                     Arrivals& arrivals) {
  if (m.IsOwn(region)) return true;
  const GroupConstants& g = m.g;
  const LanePointers& lane = m.lane;
  const OperationParams& op = m.op;
  volatile int32_t& here = arrivals.chunks[region];
  const char* const word = g.memory + g.layout.SignalOffset(m.leg, lane.index, m.number, region);
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
    if (Faulted(g)) return false;
    const bool asks = looks && (arrivals.asks || turn % kTurnsOfTheOthers == kTurnsOfTheOthers - 1);
    if (asks && load_relaxed_system(g.group_failed)) {
      atomicExch(&g.state->faulted, 1u);
      return false;
    }
    if (asks && g.among_processes) {
      const auto* const fault =
          reinterpret_cast<const uint32_t*>(g.memory + g.layout.FaultWordOffset());
      if (const uint32_t told = load_relaxed_system(fault)) {
        Report(g, op, FaultKind::kPeerFailed, m.number, {static_cast<int32_t>(told) - 1});
        return false;
      }
    }
    const bool for_relay = m.leg != g.nodes.FirstLeg(op.operation);
    if (NowNs() - begin > PatienceNs(g.timeout_ns, for_relay)) {
      const uint64_t seen = load_acquire_system(reinterpret_cast<const uint64_t*>(word));
      Report(g, op, FaultKind::kDeadline, m.number, {m.Peer(region), -1, m.number, NumberOf(seen)});
      return false;
    }
  }
  __threadfence_block();  // `here`, before what it vouches for
  if (begin != 0 && blockIdx.x == 0) {
    atomicMax(&lane.scratch->last_arrival_ns, static_cast<unsigned long long>(NowNs()));
  }
  return true;
}

// S8, of a message whose first chunk is here. `rows` is what the handle says, or -1 for any number.
__device__ inline bool Verify(const Messages& m, int32_t region, int32_t rows,
                              const RegionHeader& header) {
  const GroupConstants& g = m.g;
  const OperationParams& op = m.op;
  const int32_t peer = m.Peer(region);
  const bool same = header.number == m.number && header.call_site == op.call_site &&
                    header.operation == op.operation && header.lane == op.lane &&
                    header.derivation == op.derivation && header.source == peer &&
                    header.tokens == op.tokens && header.experts == op.experts &&
                    header.slots == op.slots && header.rows >= 0 && header.rows <= op.tokens &&
                    header.chunks == op.chunks && (rows < 0 || header.rows == rows);
  if (!same) {
    Report(g, op, FaultKind::kScheduleMismatch, m.number,
           {peer, -1, rows < 0 ? op.tokens : rows, rows < 0 ? header.tokens : header.rows, header});
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
