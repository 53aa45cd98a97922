// SPDX-License-Identifier: Apache-2.0
//
// Messages on the device: where they are built and read, and how their chunks are handed over (S4).
// A message is named by its leg and its region there (nodes.h); in direct mode a region is the rank
// at the other end.
#ifndef SMFREE_CSRC_CUDA_KERNELS_MESSAGES_CUH_
#define SMFREE_CSRC_CUDA_KERNELS_MESSAGES_CUH_

#include <cstdint>

#include "csrc/cuda/kernels/phase.cuh"

namespace smfree::cuda {

// The messages of one operation on one leg, from this rank and to it.
struct Messages {
  const GroupConstants& g;
  const SetPointers& set;
  const OperationParams& op;
  Leg leg;
  int64_t number;
  // In areas: where the payload of each message begins there.
  const int64_t* packed_at = nullptr;
  const int64_t* received_at = nullptr;
  // How many rows of each received message were sent, where fewer may be kept.
  const int32_t* sent_rows = nullptr;

  __device__ int32_t count() const { return g.nodes.Regions(leg); }
  __device__ int32_t Peer(int32_t region) const { return g.nodes.Peer(leg, g.rank, region); }
  // A rank's message to itself is built where it will be read, by an earlier kernel of the stream.
  __device__ bool IsOwn(int32_t region) const { return Peer(region) == g.rank; }
  // Null for a far peer. Read once for an SM: the table never changes.
  __device__ char* MemoryOf(int32_t region) const {
    const auto* const words = reinterpret_cast<const unsigned long long*>(g.memories);
    return reinterpret_cast<char*>(__ldg(words + Peer(region)));
  }
  // Whether the kernel itself stores the message at its peer: a small one, to a near peer.
  __device__ bool Pushes(int32_t region) const { return op.push && MemoryOf(region) != nullptr; }

  // Where a message is built: its header in the send region, or where the peer will read it; its
  // payload behind the header, or in the area.
  __device__ char* HeaderTo(int32_t region) const {
    if (IsOwn(region) || Pushes(region)) {
      const int32_t there = g.nodes.RegionAtPeer(leg, g.rank, region);
      return MemoryOf(region) + g.layout.RecvRegionOffset(leg, set.index, number, there);
    }
    return g.memory + g.layout.SendRegionOffset(leg, set.index, number, region);
  }
  __device__ char* PayloadTo(int32_t region) const {
    return op.in_areas ? InPackedArea(region) : HeaderTo(region) + g.layout.header_bytes;
  }
  // And where it is read.
  __device__ const char* HeaderFrom(int32_t region) const {
    return g.memory + g.layout.RecvRegionOffset(leg, set.index, number, region);
  }
  __device__ const char* PayloadFrom(int32_t region) const {
    if (!op.in_areas) return HeaderFrom(region) + g.layout.header_bytes;
    if (IsOwn(region)) return InPackedArea(region);
    return g.memory + g.layout.RecvAreaOffset(leg, set.index, number) + received_at[region];
  }
  // How a message lies where `rows` of its rows are received. What is not kept does not move into
  // an area.
  __device__ MessageLayout LayoutFrom(int32_t region, int32_t rows) const {
    const bool all_there = sent_rows != nullptr && (!op.in_areas || IsOwn(region));
    return MessageLayout(all_there ? sent_rows[region] : rows, op.experts, op.slots, op.stride);
  }
  // How it was cut into chunks. If not all of it is kept, all chunks have to be here before any row
  // is read.
  __device__ Chunks ChunksFrom(int32_t region, int32_t rows) const {
    const bool whole = sent_rows == nullptr || sent_rows[region] == rows;
    return Chunks(rows, whole ? op.chunks : 1);
  }

 private:
  __device__ char* InPackedArea(int32_t region) const {
    return g.memory + g.layout.SendAreaOffset(leg, set.index, number) + packed_at[region];
  }
};

__device__ inline MessageLayout LayoutOf(const OperationParams& op, int64_t rows) {
  return MessageLayout(rows, op.experts, op.slots, op.stride);
}

// Counts the bytes of the messages with counts[region] rows that leave the node. By one thread.
__device__ inline void NoteInternode(const Messages& m, const int32_t* counts) {
  const GroupConstants& g = m.g;
  const OperationParams& op = m.op;
  if (g.nodes.count() == 1) return;
  int64_t bytes = 0;
  for (int32_t region = 0; region < m.count(); ++region) {
    const bool leaves = g.nodes.NodeOf(m.Peer(region)) != g.nodes.NodeOf(g.rank);
    if (leaves) bytes += LayoutOf(op, counts[region]).bytes;
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
    bytes += LayoutOf(op, counts[region]).bytes;
  }
  atomicAdd(&g.state->rows_relayed, static_cast<unsigned long long>(rows));
  atomicAdd(&g.state->bytes_relayed, static_cast<unsigned long long>(bytes));
}

// `sent`: rows that the source has sent, of which a relay may hand on fewer.
__device__ inline void WriteHeader(const Messages& m, int32_t region, int32_t rows, int32_t sent) {
  const GroupConstants& g = m.g;
  const OperationParams& op = m.op;
  *reinterpret_cast<RegionHeader*>(m.HeaderTo(region)) = {
      m.number,  op.call_site, op.operation, op.lane, op.derivation,
      g.rank,    op.tokens,    rows,         static_cast<int32_t>(op.stride),
      op.experts, op.slots,    op.chunks,    sent};
}
__device__ inline void WriteHeader(const Messages& m, int32_t region, int32_t rows) {
  WriteHeader(m, region, rows, rows);
}

// In the header of a message on the wire of hierarchical mode, in a dispatch: its rows by rank.
__device__ inline int64_t RowsByRankOffset(const GroupConstants& g) {
  return kHeaderIdentityBytes + g.num_experts / g.nodes.Regions(kWire) * kCountBytes;
}
__device__ inline void WriteRowsToRank(const Messages& m, int32_t rank, int32_t rows) {
  char* const header = m.HeaderTo(m.g.nodes.NodeOf(rank));
  reinterpret_cast<int32_t*>(header + RowsByRankOffset(m.g))[m.g.nodes.IndexOf(rank)] = rows;
}

// The headers of all messages, of counts that PlanPacking has found possible.
__device__ inline void WriteHeaders(const Messages& m, const int32_t* counts) {
  if (blockIdx.x != 0) return;
  for (int32_t region = threadIdx.x; region < m.count(); region += blockDim.x) {
    WriteHeader(m, region, counts[region]);
  }
}

// Where the slots of a message with `rows` rows are built.
__device__ inline float* SlotsTo(const Messages& m, int32_t region, int32_t rows) {
  return reinterpret_cast<float*>(m.PayloadTo(region) + LayoutOf(m.op, rows).slots_offset);
}

// One message that this rank packs.
struct Outgoing {
  char* first_row;
  Chunks chunks;
};

__device__ inline Outgoing OutgoingTo(const Messages& m, int32_t region, int32_t rows) {
  return {m.PayloadTo(region) + LayoutOf(m.op, rows).rows_offset, Chunks(rows, m.op.chunks)};
}

// Raises `arrived` at a near peer. What the message vouches for is stored there, as this thread has
// observed.
__device__ inline void RaiseAtPeer(const Messages& m, int32_t region, uint64_t signal) {
  const GroupConstants& g = m.g;
  const int32_t there = g.nodes.RegionAtPeer(m.leg, g.rank, region);
  char* const word =
      m.MemoryOf(region) + g.layout.SignalOffset(m.leg, m.set.index, m.number, there);
  store_release_system(reinterpret_cast<uint64_t*>(word), signal);
}

// S4 of a phase that is one kernel, by the threads of its last block: all messages are complete.
__device__ inline void HandOverAll(const Messages& m) {
  for (int32_t region = threadIdx.x; region < m.count(); region += blockDim.x) {
    if (!m.IsOwn(region)) RaiseAtPeer(m, region, SignalAfterChunk(m.number, 0, 1));
  }
}

// S4: hands chunk `chunk` of a message over. All of it has been written by now, as this thread has
// observed.
__device__ inline void HandOver(const Messages& m, int32_t region, const Outgoing& outgoing,
                                int32_t chunk) {
  const Chunks& chunks = outgoing.chunks;
  const GroupConstants& g = m.g;
  const SetPointers& set = m.set;
  const OperationParams& op = m.op;
  const uint64_t signal = SignalAfterChunk(m.number, chunk, chunks.count);
  if (m.Pushes(region)) return RaiseAtPeer(m, region, signal);
  // The kernel behind this one puts what is for other nodes (put_messages.cu).
  if (g.puts_on_device && m.MemoryOf(region) == nullptr) return;
  const uint64_t ticket = atomicAdd(&g.state->queue_tail, 1ull);
  Descriptor& entry = g.queue[ticket & g.queue_mask];
  entry.signal = signal;
  entry.payload = m.PayloadTo(region) - g.memory;
  entry.set = set.index;
  entry.leg = m.leg;
  entry.region = region;
  entry.rows = chunks.rows;
  entry.tokens = op.tokens;
  entry.stride = static_cast<int32_t>(op.stride);
  entry.operation = op.operation;
  entry.derivation = op.derivation;
  entry.chunk = static_cast<int16_t>(chunk);
  entry.chunks = static_cast<int16_t>(op.chunks);
  entry.experts = static_cast<int8_t>(op.experts);
  entry.slots = static_cast<int8_t>(op.slots);
  entry.lane = static_cast<int16_t>(op.lane);
  store_release_system(&entry.ticket, ticket + 1);  // pairs with the mover's loop
}

// Row `row` of a message is complete, as this thread has observed at gpu scope. Whoever completes a
// chunk hands it over, after the chunks before it. Their blocks are running: the wait is short,
// unless they wait for rows from others first, or the handle is broken and names a row twice in
// place of another one. So it is longer than any wait for others before it is taken for that.
__device__ inline void CountRow(const Messages& m, int32_t region, const Outgoing& outgoing,
                                int32_t row) {
  if (m.IsOwn(region)) return;
  const GroupConstants& g = m.g;
  const SetPointers& set = m.set;
  const OperationParams& op = m.op;
  const Chunks& chunks = outgoing.chunks;
  const int32_t chunk = chunks.Of(row);
  uint32_t& packed = set.scratch->packed[region][chunk];
  if (atomicAdd(&packed, 1u) + 1 != static_cast<uint32_t>(chunks.RowsIn(chunk))) return;
  __threadfence();  // the others' counts, before what is handed over
  uint32_t& posted = set.scratch->posted[region];
  const int64_t begin = NowNs();
  while (load_acquire_gpu(&posted) != static_cast<uint32_t>(chunk)) {
    __nanosleep(100);
    if (Faulted(g)) return;
    if (NowNs() - begin <= 2 * g.timeout_ns) continue;
    return Report(g, op, FaultKind::kInvalidArgument, m.number,
                  {m.Peer(region), -1, chunks.rows, row});
  }
  packed = 0;
  HandOver(m, region, outgoing, chunk);
  store_release_gpu(&posted, chunk + 1 == chunks.count ? 0u : static_cast<uint32_t>(chunk) + 1);
}

// Messages without rows are complete once their header is written, by the kernel before this one.
__device__ inline void HandOverEmpty(const Messages& m, const Outgoing* outgoing) {
  if (blockIdx.x != 0) return;
  for (int32_t region = threadIdx.x; region < m.count(); region += blockDim.x) {
    if (!m.IsOwn(region) && outgoing[region].chunks.rows == 0) {
      HandOver(m, region, outgoing[region], 0);
    }
  }
}

}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_KERNELS_MESSAGES_CUH_
