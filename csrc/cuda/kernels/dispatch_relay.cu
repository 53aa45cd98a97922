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
// Launch: kThreads threads, and no more blocks than kBlocksPerSm per SM. Place: RelayBlocks.
// Forward: BlocksFor, all of them resident, because a block waits until another has handed over the
// chunk before its own.
//
// Byte floor: the rows of the wire messages read, those of the messages inside the node written.
#include "csrc/cuda/host/kernels.h"
#include "csrc/cuda/kernels/relay.cuh"
#include "csrc/cuda/kernels/row_order.cuh"
#include "csrc/cuda/kernels/rows.cuh"
#include "csrc/cuda/kernels/tiles.cuh"

namespace smfree::cuda {
namespace {

// What stands before the rows of message `region`: the counts of its experts come from those of the
// node, `of_node`.
__device__ void WriteFront(const Messages& m, int32_t region, int32_t rows, const char* of_node) {
  const GroupConstants& g = m.g;
  const OperationParams& op = m.op;
  const int32_t experts = op.experts ? g.local_experts() : 0;
  const auto* const from = reinterpret_cast<const int32_t*>(of_node + kHeaderIdentityBytes) +
                           g.nodes.IndexOf(region) * experts;
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
  const GroupConstants& g = wire.g;
  const LanePointers& lane = wire.lane;
  const OperationParams& op = wire.op;
  Lists& lists = shared.lists;
  if (!kRouted && begun) CountRelay(g, op, wire.number, known, tile, lists);
  shared.arrivals.Clear(/*asks_others=*/tile.first_row == 0);
  __syncthreads();
  bool ok = begun;
  if (ok && threadIdx.x == 0) {
    ok = OpenMessage(wire, tile.node, kRouted ? -1 : lists.num_rows, shared.rows, shared.arrivals);
  }
  if (!__syncthreads_and(ok)) {
    for (int32_t at = threadIdx.x; kRouted && at < tile.num_rows; at += blockDim.x) {
      Placing(relay, tile.node * op.tokens + tile.first_row + at, g.relay_width).End();
    }
    return;
  }

  const int32_t rows = shared.rows;
  const int32_t per_node = g.nodes.ranks_per_node;
  const int32_t local_experts = g.local_experts();
  const char* const message = wire.From(tile.node);
  const char* const front = message + g.layout.header_bytes;
  const auto* const codes = reinterpret_cast<const int32_t*>(front);
  const auto* const slots =
      reinterpret_cast<const float*>(front + LayoutOf(g, op, rows).slots_offset);
  if (kRouted) {
    lists.Count(op.tokens, per_node, tile.first_row, [&](int32_t row) {
      uint64_t indices = 0;
      for (int32_t k = 0; row < rows && k < g.top_k; ++k) {
        const int32_t code = __ldcg(codes + int64_t{row} * g.top_k + k);
        if (code >= 0) indices |= uint64_t{1} << (g.code.Expert(code) / local_experts);
      }
      return indices;
    });
  }
  if (tile.first_row == 0) {
    WriteRelayRows(g, lane, tile, lists);
    for (int32_t index = 0; index < per_node; ++index) {
      WriteFront(node, tile.first_region + index, lists.total[index], message);
    }
  }

  // A thread per slot.
  for (int32_t slot = threadIdx.x; slot < tile.num_rows * g.top_k; slot += blockDim.x) {
    const int32_t at = slot / g.top_k;
    const int32_t k = slot % g.top_k;
    const int32_t row = tile.first_row + at;
    const int64_t from = int64_t{row} * g.top_k + k;
    const int32_t code = kRouted && row < rows ? __ldcg(codes + from) : -1;
    const int32_t expert = code < 0 ? -1 : g.code.Expert(code);
    const float value = op.slots && row < rows ? __ldcg(slots + from) : 0.0f;
    Placing places(relay, tile.node * op.tokens + row, g.relay_width);
    for (int32_t index = 0; row < rows && index < per_node; ++index) {
      if (!lists.Has(index, at)) continue;
      const int32_t position = lists.Position(index, at);
      char* const to = node.To(tile.first_region + index) + g.layout.header_bytes;
      const MessageLayout layout = LayoutOf(g, op, lists.total[index]);
      const int64_t there = int64_t{position} * g.top_k + k;
      if (kRouted) {
        const bool home = expert >= 0 && expert / local_experts == index;
        reinterpret_cast<int32_t*>(to + layout.experts_offset)[there] =
            home ? g.code.Encode(expert % local_experts, g.code.Index(code)) : -1;
        if (k == 0) places.Add(index * op.tokens + position);
      }
      if (op.slots) reinterpret_cast<float*>(to + layout.slots_offset)[there] = value;
    }
    if (kRouted && k == 0) places.End();
  }
}

template <bool kRouted>
__global__ void __launch_bounds__(kThreads)
    Place(const KernelParams params, const int32_t* known, int32_t* relay) {
  const GroupConstants& g = params.g;
  const LanePointers& lane = params.lane;
  const OperationParams& op = params.op;
  __shared__ Placed shared;
  NoteBegin(lane);
  if (!kRouted && NothingWasSent(op)) return;
  const Begun begun = BeginRecvPhase(g, lane, op);
  const Messages wire{g, lane, op, kWire, begun.number}, node{g, lane, op, kNode, begun.number};
  ForEachRelayTile(g, op, [&](const RelayTile& tile) {
    PlaceTile<kRouted>(wire, node, begun.ok, tile, known, relay, shared);
  });
}

template <typename Word>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    Forward(const KernelParams params, const int32_t* relay) {
  const GroupConstants& g = params.g;
  const LanePointers& lane = params.lane;
  const OperationParams& op = params.op;
  __shared__ RowOrder order;
  __shared__ Outgoing outgoing[kMaxRanks];
  __shared__ Arrivals arrivals;
  __shared__ char* targets[kWarps][kMaxTopK];
  __shared__ Rounds rounds;
  if (NothingWasSent(op)) return;
  const Begun begun = BeginRecvPhase(g, lane, op);
  // A recv that runs again has forwarded before, and nobody waits for what it would send.
  if (!begun.ok || lane.scratch->state.received == begun.number) return;
  const Messages wire{g, lane, op, kWire, begun.number}, node{g, lane, op, kNode, begun.number};
  for (int32_t region = threadIdx.x; region < node.count(); region += blockDim.x) {
    outgoing[region] = OutgoingTo(node, region, lane.scratch->relay_node_rows[region]);
  }
  rounds.Clear();
  arrivals.Clear();
  if (threadIdx.x < kWarp) {
    order.Build(wire, lane.scratch->relay_wire_rows, /*own_first=*/true);
  }
  __syncthreads();
  HandOverEmpty(node, outgoing);

  const int32_t warp_lane = static_cast<int32_t>(threadIdx.x) % kWarp;
  char** const to = targets[threadIdx.x / kWarp];
  ArrivingRows arriving{wire, order, lane.scratch->relay_wire_rows, arrivals};
  int32_t tile_at = 0;  // the tile's chunk in the order
  const auto pack = [&](int32_t unit, int32_t piece) {
    const int32_t row = arriving.GoTo(unit);
    const int32_t from_node = arriving.region;
    const int32_t rows = lane.scratch->relay_wire_rows[from_node];
    const int32_t place =
        warp_lane < g.relay_width ? RelayOf(g, op, relay, from_node, row)[warp_lane] : -1;
    if (place >= 0) {
      const int32_t region = from_node * g.nodes.ranks_per_node + place / op.tokens;
      to[warp_lane] = outgoing[region].first_row + place % op.tokens * g.layout.row_bytes;
    }
    const int32_t count = __popc(__ballot_sync(~0u, place >= 0));
    __syncwarp();
    if (!arriving.here) return;
    const char* const from = wire.From(from_node) + g.layout.header_bytes +
                             LayoutOf(g, op, rows).rows_offset + row * g.layout.row_bytes;
    CopyRow<Word>(Words(g.x_row_bytes, sizeof(Word), piece, op.pieces), from, to, count);
  };
  ForEachTile(op, rounds, order.num_rows, pack, [&](int32_t first, int32_t rows) {
    if (Faulted(g)) return;  // the tile may not be complete
    tile_at = order.Find(first, tile_at);
    for (int32_t i = warp_lane; i < rows * g.relay_width; i += kWarp) {
      const int32_t unit = first + i / g.relay_width;
      const ChunkRows& chunk = order.chunks[order.Find(unit, tile_at)];
      const int32_t row = chunk.row + unit - chunk.first;
      const int32_t place = RelayOf(g, op, relay, chunk.region, row)[i % g.relay_width];
      if (place < 0) continue;
      const int32_t region = chunk.region * g.nodes.ranks_per_node + place / op.tokens;
      CountRow(node, region, outgoing[region].chunks, place % op.tokens);
    }
  });
}

cudaError_t LaunchForward(const KernelParams& k, const int32_t* relay, const LaunchParams& launch) {
  const auto forward = WordBytes(k.g) == 16  ? Forward<uint4>
                       : WordBytes(k.g) == 4 ? Forward<uint32_t>
                                             : Forward<uint16_t>;
  return LaunchKernel(forward,
                      launch.BlocksFor(int64_t{k.g.nodes.count()} * k.op.tokens * k.op.pieces),
                      kThreads, 0, launch.stream, k, relay);
}

}  // namespace

cudaError_t LoadDispatchRelay() {
  return LoadKernels({Kernel(Place<true>), Kernel(Place<false>), Kernel(Forward<uint4>),
                      Kernel(Forward<uint32_t>), Kernel(Forward<uint16_t>)});
}

cudaError_t LaunchDispatchRelay(const KernelParams& k, const DispatchRecvArrays& arrays,
                                const LaunchParams& launch) {
  const cudaError_t error = LaunchKernel(Place<true>, RelayBlocks(k.g, k.op, launch), kThreads, 0,
                                         launch.stream, k, nullptr, arrays.relay);
  return error != cudaSuccess ? error : LaunchForward(k, arrays.relay, launch);
}

cudaError_t LaunchDispatchRelayCached(const KernelParams& k, const DispatchRecvCachedArrays& arrays,
                                      const LaunchParams& launch) {
  const cudaError_t error = LaunchKernel(Place<false>, RelayBlocks(k.g, k.op, launch), kThreads, 0,
                                         launch.stream, k, arrays.relay, nullptr);
  return error != cudaSuccess ? error : LaunchForward(k, arrays.relay, launch);
}

}  // namespace smfree::cuda
