// SPDX-License-Identifier: Apache-2.0
//
// The relay of a dispatch, with which a dispatch_recv begins in hierarchical mode: for each node n
// and each row i of the message from there, on the wire, and each rank of this node that holds an
// expert of it, by ascending index j:
//
//   message n * L + j inside the node, row p = row i, with its CopyCodes and slots
//   relay[n,i,q] = j * T + p         p counts the rows to j in the order of i
//
// These are the messages of direct mode, but for the source that their headers name.
//
// Place    R1, R2  waits for the first chunk of each message; writes relay, headers, codes and
//                  slots. Where the routing is known, relay is read.
// Forward  R1, R2  chunk by chunk as they arrive, a warp per piece of a row: reads it once, writes
//                  it once per rank.
//
// Byte floor: the rows of the wire messages read, those of the messages inside the node written.
#include "csrc/cuda/host/launch.h"
#include "csrc/cuda/kernels/relay.cuh"
#include "csrc/cuda/kernels/rows.cuh"
#include "csrc/cuda/kernels/tiles.cuh"

namespace smfree::cuda {
namespace {

// What stands before the rows of message `region`: the counts of its experts come from those of the
// node, `of_node`.
__device__ void WriteFront(const Messages& m, int32_t region, int32_t rows, const char* of_node) {
  const Context& c = m.c;
  const int32_t experts = c.experts ? c.local_experts() : 0;
  const auto* const from = reinterpret_cast<const int32_t*>(of_node + kHeaderIdentityBytes) +
                           c.nodes.IndexOf(region) * experts;
  auto* const to = reinterpret_cast<int32_t*>(m.To(region) + kHeaderIdentityBytes);
  for (int32_t e = threadIdx.x; e < experts; e += blockDim.x) to[e] = __ldcg(from + e);
  if (threadIdx.x == 0) WriteHeader(m, region, rows);
}

// Shared memory of a block that places rows.
struct Placed {
  Lists lists;
  Arrivals arrivals;
  int32_t rows;  // of the message on the wire
};

template <bool kRouted>
__device__ void PlaceTile(const Messages& wire, const Messages& node, bool begun,
                          const RelayTile& tile, const int32_t* known, int32_t* relay,
                          Placed& shared) {
  const Context& c = wire.c;
  Lists& lists = shared.lists;
  if (!kRouted && begun) CountRelay(c, wire.number, known, tile, lists);
  shared.arrivals.Clear(/*asks_others=*/tile.first_row == 0);
  __syncthreads();
  bool ok = begun;
  if (ok && threadIdx.x == 0) {
    ok = OpenMessage(wire, tile.node, kRouted ? -1 : lists.rows, shared.rows, shared.arrivals);
  }
  if (!__syncthreads_and(ok)) {
    for (int32_t at = threadIdx.x; kRouted && at < tile.num_rows; at += blockDim.x) {
      Placing(relay, tile.node * c.tokens + tile.first_row + at, c.relay_width).End();
    }
    return;
  }

  const int32_t rows = shared.rows;
  const int32_t per_node = c.nodes.ranks_per_node;
  const int32_t local_experts = c.local_experts();
  const char* const message = wire.From(tile.node);
  const char* const front = message + c.layout.header_bytes;
  const auto* const codes = reinterpret_cast<const int32_t*>(front);
  const auto* const slots =
      reinterpret_cast<const float*>(front + LayoutOf(c, rows).slots_offset);
  if (kRouted) {
    lists.Count(c.tokens, per_node, tile.first_row, [&](int32_t row) {
      uint64_t indices = 0;
      for (int32_t k = 0; row < rows && k < c.top_k; ++k) {
        const int32_t code = __ldcg(codes + int64_t{row} * c.top_k + k);
        if (code >= 0) indices |= uint64_t{1} << (c.code.Expert(code) / local_experts);
      }
      return indices;
    });
  }
  if (tile.first_row == 0) {
    WriteRelayRows(c, tile, lists);
    for (int32_t index = 0; index < per_node; ++index) {
      WriteFront(node, tile.first_region + index, lists.total[index], message);
    }
  }

  // A thread per slot.
  for (int32_t slot = threadIdx.x; slot < tile.num_rows * c.top_k; slot += blockDim.x) {
    const int32_t at = slot / c.top_k;
    const int32_t k = slot % c.top_k;
    const int32_t row = tile.first_row + at;
    const int64_t from = int64_t{row} * c.top_k + k;
    const int32_t code = kRouted && row < rows ? __ldcg(codes + from) : -1;
    const int32_t expert = code < 0 ? -1 : c.code.Expert(code);
    const float value = c.slots && row < rows ? __ldcg(slots + from) : 0.0f;
    Placing places(relay, tile.node * c.tokens + row, c.relay_width);
    for (int32_t index = 0; row < rows && index < per_node; ++index) {
      if (!lists.Has(index, at)) continue;
      const int32_t position = lists.Position(index, at);
      char* const to = node.To(tile.first_region + index) + c.layout.header_bytes;
      const MessageLayout layout = LayoutOf(c, lists.total[index]);
      const int64_t there = int64_t{position} * c.top_k + k;
      if (kRouted) {
        const bool home = expert >= 0 && expert / local_experts == index;
        reinterpret_cast<int32_t*>(to + layout.experts_offset)[there] =
            home ? c.code.Encode(expert % local_experts, c.code.Index(code)) : -1;
        if (k == 0) places.Add(index * c.tokens + position);
      }
      if (c.slots) reinterpret_cast<float*>(to + layout.slots_offset)[there] = value;
    }
    if (kRouted && k == 0) places.End();
  }
}

template <bool kRouted>
__global__ void __launch_bounds__(kThreads)
    Place(const Context c, const int32_t* known, int32_t* relay) {
  __shared__ Placed shared;
  NoteBegin(c);
  if (!kRouted && NothingWasSent(c)) return;
  const Begun begun = BeginRecvPhase(c);
  const Messages wire{c, kWire, begun.number}, node{c, kNode, begun.number};
  ForEachRelayTile(c, [&](const RelayTile& tile) {
    PlaceTile<kRouted>(wire, node, begun.ok, tile, known, relay, shared);
  });
}

template <typename Word>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    Forward(const Context c, const int32_t* relay) {
  __shared__ Segments segments;
  __shared__ Outgoing outgoing[kMaxRanks];
  __shared__ Arrivals arrivals;
  __shared__ char* targets[kWarps][kMaxTopK];
  __shared__ Rounds rounds;
  if (NothingWasSent(c)) return;
  const Begun begun = BeginRecvPhase(c);
  // A recv that runs again has forwarded before, and nobody waits for what it would send.
  if (!begun.ok || c.scratch->state.received == begun.number) return;
  const Messages wire{c, kWire, begun.number}, node{c, kNode, begun.number};
  for (int32_t region = threadIdx.x; region < node.count(); region += blockDim.x) {
    outgoing[region] = OutgoingTo(node, region, c.scratch->relay_node_rows[region]);
  }
  rounds.Clear();
  arrivals.Clear();
  if (threadIdx.x < kWarp) {
    segments.Build(wire, c.scratch->relay_wire_rows, /*own_first=*/true);
  }
  __syncthreads();
  HandOverEmpty(node, outgoing);

  const int32_t lane = static_cast<int32_t>(threadIdx.x) % kWarp;
  char** const to = targets[threadIdx.x / kWarp];
  int32_t at = 0, tile_at = 0;  // segments of this warp's row and of the tile
  int32_t waited_for = -1, waited_chunk = -1;
  bool here = true;
  const auto pack = [&](int32_t unit, int32_t piece) {
    at = segments.Find(unit, at);
    const Segment& segment = segments.segment[at];
    const int32_t row = segment.row + unit - segment.first;
    const int32_t rows = c.scratch->relay_wire_rows[segment.region];
    if (segment.region != waited_for || segment.chunk != waited_chunk) {
      waited_for = segment.region;
      waited_chunk = segment.chunk;
      const int32_t wanted = ChunksThrough(waited_chunk, Chunks(rows, c.chunks).count);
      if (lane == 0) here = WaitForChunks(wire, waited_for, wanted, arrivals);
      here = __shfl_sync(~0u, here, 0);
    }
    const int32_t place = lane < c.relay_width ? RelayOf(c, relay, segment.region, row)[lane] : -1;
    if (place >= 0) {
      const int32_t region = segment.region * c.nodes.ranks_per_node + place / c.tokens;
      to[lane] = outgoing[region].rows + place % c.tokens * c.layout.row_bytes;
    }
    const int32_t count = __popc(__ballot_sync(~0u, place >= 0));
    __syncwarp();
    if (!here) return;
    const char* const from = wire.From(segment.region) + c.layout.header_bytes +
                             LayoutOf(c, rows).rows_offset + row * c.layout.row_bytes;
    CopyRow<Word>(Words(c.x_row_bytes, sizeof(Word), piece, c.pieces), from, to, count);
  };
  ForEachTile(c, rounds, segments.rows, pack, [&](int32_t first, int32_t rows) {
    if (Faulted(c)) return;  // the tile may not be complete
    tile_at = segments.Find(first, tile_at);
    for (int32_t i = lane; i < rows * c.relay_width; i += kWarp) {
      const int32_t unit = first + i / c.relay_width;
      const Segment& segment = segments.segment[segments.Find(unit, tile_at)];
      const int32_t row = segment.row + unit - segment.first;
      const int32_t place = RelayOf(c, relay, segment.region, row)[i % c.relay_width];
      if (place < 0) continue;
      const int32_t region = segment.region * c.nodes.ranks_per_node + place / c.tokens;
      CountRow(node, region, outgoing[region].chunks, place % c.tokens);
    }
  });
}

cudaError_t LaunchForward(const Context& c, const int32_t* relay, const Launch& launch) {
  const auto forward = WordBytes(c) == 16 ? Forward<uint4> : WordBytes(c) == 4 ? Forward<uint32_t>
                                                                               : Forward<uint16_t>;
  return LaunchKernel(forward, launch.BlocksFor(int64_t{c.nodes.count()} * c.tokens * c.pieces),
                      kThreads, 0, launch.stream, c, relay);
}

}  // namespace

cudaError_t LoadDispatchRelay() {
  return LoadKernels({Kernel(Place<true>), Kernel(Place<false>), Kernel(Forward<uint4>),
                      Kernel(Forward<uint32_t>), Kernel(Forward<uint16_t>)});
}

cudaError_t LaunchDispatchRelay(const Context& c, const DispatchRecvArrays& arrays,
                                const Launch& launch) {
  const cudaError_t error = LaunchKernel(Place<true>, RelayBlocks(c, launch), kThreads, 0,
                                         launch.stream, c, nullptr, arrays.relay);
  return error != cudaSuccess ? error : LaunchForward(c, arrays.relay, launch);
}

cudaError_t LaunchDispatchRelayCached(const Context& c, const DispatchRecvCachedArrays& arrays,
                                      const Launch& launch) {
  const cudaError_t error = LaunchKernel(Place<false>, RelayBlocks(c, launch), kThreads, 0,
                                         launch.stream, c, arrays.relay, nullptr);
  return error != cudaSuccess ? error : LaunchForward(c, arrays.relay, launch);
}

}  // namespace smfree::cuda
