// SPDX-License-Identifier: Apache-2.0
//
// The relay of a dispatch, with which a dispatch_recv begins in hierarchical mode: for each node n
// and each row i of the message from there, on the wire, and each rank of this node that holds an
// expert of it, by ascending index j:
//
//   message n * L + j inside the node, row p = row i, with its CopyCodes and slots
//   relay[n,i,q] = j * T + p         p counts the rows to j in the order of i
//
// These are the messages of direct mode, but for the source that their headers name. Of all of them
// the first wire_rows rows are handed on, and the others have places in relay alone.
//
// Place    R1, R2  waits for the first chunk of all messages; writes relay, headers, codes and
//                  slots, and announces. Where the routing is known, relay is read.
// Forward  R1, R2  chunk by chunk as they arrive, a warp per piece of a row: reads it once, writes
//                  it once per rank.
//
// Launch: kThreads threads, and no more blocks than kBlocksPerSm per SM. Place: RelayBlocks.
// Forward: BlocksFor, all of them resident, because a block waits until another has handed over the
// chunk before its own.
//
// Byte floor: the rows of the wire messages read, those of the messages inside the node written.
#include "csrc/cuda/host/kernels.h"
#include "csrc/cuda/kernels/relay_plan.cuh"
#include "csrc/cuda/kernels/row_order.cuh"
#include "csrc/cuda/kernels/row_kinds.cuh"
#include "csrc/cuda/kernels/tiles.cuh"

namespace smfree::cuda {
namespace {

// What stands before the rows of message `region`: the counts of its experts come from those of the
// node, `of_node`.
__device__ void WriteFront(const Messages& m, int32_t region, int32_t rows, int32_t sent,
                           const char* of_node) {
  const GroupConstants& g = m.g;
  const OperationParams& op = m.op;
  const int32_t experts = op.experts ? g.local_experts() : 0;
  const auto* const from = reinterpret_cast<const int32_t*>(of_node + kHeaderIdentityBytes) +
                           g.nodes.IndexOf(region) * experts;
  auto* const to = reinterpret_cast<int32_t*>(m.HeaderTo(region) + kHeaderIdentityBytes);
  for (int32_t e = threadIdx.x; e < experts; e += blockDim.x) to[e] = __ldcg(from + e);
  if (threadIdx.x == 0) WriteHeader(m, region, rows, sent);
}

// Shared memory of a block that places rows.
struct Placed {
  Lists lists;
  Arrivals arrivals;
  DispatchPlan plan;
};

// Whether the lists of a tile are as long as the source says in its header, the same in all threads
// of a block.
__device__ bool AsHeaderSays(const Messages& wire, const RelayTile& tile, const Placed& shared) {
  const DispatchPlan& plan = shared.plan;
  const Lists& lists = shared.lists;
  const int32_t rows = plan.wire_rows[tile.node];
  const bool taken = rows == plan.wire_sent[tile.node];
  bool ok = true;
  for (int32_t i = threadIdx.x; i <= wire.g.nodes.ranks_per_node; i += blockDim.x) {
    const bool of_all = i == wire.g.nodes.ranks_per_node;
    const int32_t listed = of_all ? lists.num_rows : lists.total[i];
    const int32_t said = of_all ? rows : taken ? plan.sent[tile.first_region + i] : 0;
    if (listed == said) continue;
    ok = false;
    Report(wire.g, wire.op, FaultKind::kScheduleMismatch, wire.number,
           {wire.Peer(tile.node), -1, listed, said, HeaderOf(wire, tile.node)});
  }
  return __syncthreads_and(ok);
}

// Nothing of what a tile has is known.
__device__ void PlaceNothing(const GroupConstants& g, const OperationParams& op,
                             const RelayTile& tile, int32_t* relay) {
  for (int32_t at = threadIdx.x; at < tile.num_rows; at += blockDim.x) {
    Placing(relay, tile.node * op.tokens + tile.first_row + at, g.relay_width).End();
  }
}

// A tile whose lists are counted.
template <bool kRouted>
__device__ void PlaceTile(const Messages& wire, const Messages& node, const RelayTile& tile,
                          int32_t* relay, const Placed& shared) {
  const GroupConstants& g = wire.g;
  const SetPointers& set = wire.set;
  const OperationParams& op = wire.op;
  const Lists& lists = shared.lists;
  const DispatchPlan& plan = shared.plan;
  const int32_t rows = plan.wire_rows[tile.node];
  const int32_t per_node = g.nodes.ranks_per_node;
  const int32_t local_experts = g.local_experts();
  const char* const payload = wire.PayloadFrom(tile.node);
  const auto* const codes = reinterpret_cast<const int32_t*>(payload);
  const auto* const slots =
      reinterpret_cast<const float*>(payload + LayoutOf(op, rows).slots_offset);
  if (tile.first_row == 0) {
    WriteRelayRows(g, set, tile, plan.rows, rows);
    for (int32_t index = 0; index < per_node; ++index) {
      const int32_t region = tile.first_region + index;
      WriteFront(node, region, plan.rows[region], plan.sent[region], wire.HeaderFrom(tile.node));
      if (!op.in_areas || threadIdx.x != 0) continue;
      set.scratch->packed_at[kNode][region] = plan.node_at[region];
      Announce(node, region, plan.rows[region], /*rows_in_node=*/0);
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
      if (kRouted && k == 0) places.Add(index * op.tokens + position);
      const int32_t region = tile.first_region + index;
      if (position >= plan.rows[region]) continue;  // not handed on
      char* const to = node.PayloadTo(region);
      const MessageLayout layout = LayoutOf(op, plan.rows[region]);
      const int64_t there = int64_t{position} * g.top_k + k;
      if (kRouted) {
        const bool home = expert >= 0 && expert / local_experts == index;
        reinterpret_cast<int32_t*>(to + layout.experts_offset)[there] =
            home ? g.code.Encode(expert % local_experts, g.code.Index(code)) : -1;
      }
      if (op.slots) reinterpret_cast<float*>(to + layout.slots_offset)[there] = value;
    }
    if (kRouted && k == 0) places.End();
  }
}

template <bool kRouted>
__global__ void __launch_bounds__(kThreads)
    Place(const __grid_constant__ KernelParams params, const int32_t* known, int32_t* relay) {
  const GroupConstants& g = params.g;
  const OperationParams& op = params.op;
  __shared__ Placed shared;
  const Begun begun = BeginRecvPhase(g, op, params.sets);
  const SetPointers set = params.sets.At(begun.set);
  NoteBegin(set);
  if (!kRouted && !begun.ok) return;
  Lists& lists = shared.lists;
  DispatchPlan& plan = shared.plan;
  const Messages wire{
      g, set, op, kWire, begun.number, set.scratch->packed_at[kWire], plan.wire_at};
  const Messages node{g, set, op, kNode, begun.number, plan.node_at};
  bool ok = begun.ok, planned = false;
  ForEachRelayTile(g, op, [&](const RelayTile& tile) {
    if (!kRouted && ok) CountRelay(g, op, begun.number, known, tile, lists);
    if (ok && !planned) ok = planned = plan.Make(wire, node, shared.arrivals);
    if (kRouted && ok) {
      const auto* const codes = reinterpret_cast<const int32_t*>(wire.PayloadFrom(tile.node));
      lists.Count(op.tokens, g.nodes.ranks_per_node, tile.first_row, [&](int32_t row) {
        uint64_t indices = 0;
        for (int32_t k = 0; row < plan.wire_rows[tile.node] && k < g.top_k; ++k) {
          const int32_t code = __ldcg(codes + int64_t{row} * g.top_k + k);
          if (code >= 0) indices |= uint64_t{1} << (g.code.Expert(code) / g.local_experts());
        }
        return indices;
      });
    }
    if (ok && AsHeaderSays(wire, tile, shared)) {
      PlaceTile<kRouted>(wire, node, tile, relay, shared);
    } else if (kRouted) {
      PlaceNothing(g, op, tile, relay);
    }
  });
}

__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    Forward(const __grid_constant__ KernelParams params, const int32_t* relay) {
  const GroupConstants& g = params.g;
  const OperationParams& op = params.op;
  __shared__ RowOrder order;
  __shared__ Outgoing outgoing[kMaxRanks];
  __shared__ Arrivals arrivals;
  __shared__ char* targets[kWarps][kMaxTopK];
  __shared__ Rounds rounds;
  const Begun begun = BeginRecvPhase(g, op, params.sets);
  const SetPointers set = params.sets.At(begun.set);
  // A recv that runs again has forwarded before, and nobody waits for what it would send.
  if (!begun.ok || g.state->sets[begun.set].received == begun.number) return;
  SetScratch& scratch = *set.scratch;
  const Messages wire{g,
                      set,
                      op,
                      kWire,
                      begun.number,
                      scratch.packed_at[kWire],
                      scratch.received_at[kWire]};
  const Messages node{g, set, op, kNode, begun.number, scratch.packed_at[kNode]};
  for (int32_t region = threadIdx.x; region < node.count(); region += blockDim.x) {
    outgoing[region] = OutgoingTo(node, region, set.scratch->relay_node_rows[region]);
  }
  rounds.Clear();
  arrivals.Clear();
  if (threadIdx.x < kWarp) {
    order.Build(wire, set.scratch->relay_wire_rows, /*own_first=*/true);
  }
  __syncthreads();
  HandOverEmpty(node, outgoing);

  const int32_t warp_lane = static_cast<int32_t>(threadIdx.x) % kWarp;
  char** const to = targets[threadIdx.x / kWarp];
  ArrivingRows arriving{wire, order, set.scratch->relay_wire_rows, arrivals};
  int32_t tile_at = 0;  // the tile's chunk in the order
  const auto pack = [&](int32_t unit, int32_t piece) {
    const int32_t row = arriving.GoTo(unit);
    const int32_t from_node = arriving.region;
    const int32_t rows = set.scratch->relay_wire_rows[from_node];
    const int32_t place =
        warp_lane < g.relay_width ? RelayOf(g, op, relay, from_node, row)[warp_lane] : -1;
    const int32_t region = from_node * g.nodes.ranks_per_node + max(place, 0) / op.tokens;
    // What is not handed on comes last, since destinations ascend.
    const bool handed = place >= 0 && place % op.tokens < outgoing[region].chunks.rows;
    if (handed) to[warp_lane] = outgoing[region].first_row + place % op.tokens * op.stride;
    const int32_t count = __popc(__ballot_sync(~0u, handed));
    __syncwarp();
    if (!arriving.here) return;
    const char* const from = wire.PayloadFrom(from_node) + LayoutOf(op, rows).rows_offset +
                             row * op.stride;
    CopyMessageRow(op, piece, from, to, count);
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
      if (place % op.tokens >= outgoing[region].chunks.rows) continue;
      CountRow(node, region, outgoing[region], place % op.tokens);
    }
  });
}

cudaError_t LaunchForward(const KernelParams& k, const int32_t* relay, const LaunchParams& launch) {
  return LaunchKernel(Forward,
                      launch.BlocksFor(int64_t{k.g.nodes.count()} * k.op.tokens * k.op.pieces),
                      kThreads, 0, launch.stream, k, relay);
}

}  // namespace

cudaError_t LoadDispatchRelay() {
  return LoadKernels({Kernel(Place<true>), Kernel(Place<false>), Kernel(Forward)});
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
