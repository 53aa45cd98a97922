// SPDX-License-Identifier: Apache-2.0
//
// The relay of a combine, with which a combine_send ends in hierarchical mode: to the rank of this
// index in node n, for its i-th row here, over the places j * T + p = relay[n,i,:], ascending in j:
//
//   message n on the wire, row i = sum of row p of message n * L + j inside the node
//                   float32, rounded once, to the wire; NaN where j has not kept row p or, under
//                   Overflow::kDrop, without it
//   slots: sum of the slots there                             float32
//
// LayOut  R1, R2  waits for the first chunk of all messages; writes headers and slots, announces.
// Reduce  R1, R2  a warp per piece of a row: waits for the chunks that it needs, reads the terms
//                 once, writes their sum.
//
// Launch: kThreads threads, and no more blocks than kBlocksPerSm per SM. LayOut: RelayBlocks.
// Reduce: BlocksFor, all of them resident, because a block waits until another has handed over the
// chunk before its own.
//
// Byte floor: the rows of the messages inside the node read, those of the wire messages written.
#include "csrc/cuda/host/kernels.h"
#include "csrc/cuda/kernels/relay_plan.cuh"
#include "csrc/cuda/kernels/sums.cuh"

namespace smfree::cuda {
namespace {

// Shared memory of a block that lays out messages.
struct LaidOut {
  Lists lists;
  Arrivals arrivals;
  CombinePlan plan;
};

// Whether what a tile's ranks return is possible by the handle, the same in all threads of a block.
__device__ bool IsPossible(const Messages& wire, const Messages& node, const RelayTile& tile,
                           const LaidOut& shared) {
  const GroupConstants& g = wire.g;
  const OperationParams& op = wire.op;
  const Lists& lists = shared.lists;
  const bool all_return = int64_t{g.num_ranks} * op.tokens <= op.wire_rows;
  bool ok = lists.num_rows == shared.plan.wire_rows[tile.node];
  if (!ok && threadIdx.x == 0) {
    Report(g, op, FaultKind::kInvalidArgument, wire.number,
           {wire.Peer(tile.node), -1, lists.num_rows, shared.plan.wire_rows[tile.node]});
  }
  for (int32_t index = threadIdx.x; index < g.nodes.ranks_per_node; index += blockDim.x) {
    const int32_t region = tile.first_region + index;
    const int32_t rows = shared.plan.returned[region];
    if (all_return ? rows == lists.total[index] : rows <= lists.total[index]) continue;
    ok = false;
    Report(g, op, FaultKind::kScheduleMismatch, wire.number,
           {node.Peer(region), -1, lists.total[index], rows, HeaderOf(node, region)});
  }
  return __syncthreads_and(ok);
}

// A tile whose lists are counted.
__device__ void LayOutTile(const Messages& wire, const Messages& node, const RelayTile& tile,
                           const LaidOut& shared) {
  const GroupConstants& g = wire.g;
  const SetPointers& set = wire.set;
  const OperationParams& op = wire.op;
  const Lists& lists = shared.lists;
  const CombinePlan& plan = shared.plan;
  const int32_t per_node = g.nodes.ranks_per_node;
  if (tile.first_row == 0) {
    WriteRelayRows(g, set, tile, plan.returned, lists.num_rows);
    if (threadIdx.x == 0) {
      WriteHeader(wire, tile.node, lists.num_rows);
      if (op.in_areas) {
        set.scratch->packed_at[kWire][tile.node] = plan.wire_at[tile.node];
        Announce(wire, tile.node, lists.num_rows, /*rows_in_node=*/0);
      }
    }
  }
  if (!op.slots) return;

  float* const to = SlotsTo(wire, tile.node, lists.num_rows);
  const int32_t num_slots = min(tile.num_rows, lists.num_rows - tile.first_row) * g.top_k;
  for (int32_t slot = threadIdx.x; slot < num_slots; slot += blockDim.x) {
    const int32_t at = slot / g.top_k;
    const int32_t k = slot % g.top_k;
    float sum = 0.0f;
    for (int32_t index = 0; index < per_node; ++index) {
      if (!lists.Has(index, at)) continue;
      const char* const from = node.PayloadFrom(tile.first_region + index);
      const int32_t rows = plan.returned[tile.first_region + index];
      const auto* const values =
          reinterpret_cast<const float*>(from + LayoutOf(op, rows).slots_offset);
      const int64_t position = lists.Position(index, at);
      if (position >= rows) continue;
      sum = __fadd_rn(sum, __ldcg(values + position * g.top_k + k));
    }
    to[int64_t{tile.first_row} * g.top_k + slot] = sum;
  }
}

__global__ void __launch_bounds__(kThreads)
    LayOut(const __grid_constant__ KernelParams params, const int32_t* relay) {
  const GroupConstants& g = params.g;
  const OperationParams& op = params.op;
  __shared__ LaidOut shared;
  const Begun begun = BeginSendPhase(g, op, params.sets);
  const SetPointers set = params.sets.At(begun.set);
  if (!begun.ok) return;
  CombinePlan& plan = shared.plan;
  const Messages wire{g, set, op, kWire, begun.number, plan.wire_at};
  const Messages node{
      g, set, op, kNode, begun.number, set.scratch->packed_at[kNode], plan.node_at};
  bool ok = true, planned = false;
  ForEachRelayTile(g, op, [&](const RelayTile& tile) {
    if (!ok) return;
    CountRelay(g, op, begun.number, relay, tile, shared.lists);
    if (!planned) ok = planned = plan.Make(wire, node, relay, shared.arrivals);
    if (ok && IsPossible(wire, node, tile, shared)) LayOutTile(wire, node, tile, shared);
  });
}

template <typename Rows>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    Reduce(const __grid_constant__ KernelParams params,
           const __grid_constant__ RowFormat format, const int32_t* relay,
           const int32_t* recv_counts) {
  const GroupConstants& g = params.g;
  const OperationParams& op = params.op;
  __shared__ Sums sums;
  __shared__ Arrivals arrivals;
  const Begun begun = BeginSendPhase(g, op, params.sets);
  const SetPointers set = params.sets.At(begun.set);
  SetScratch& scratch = *set.scratch;
  const Messages wire{g, set, op, kWire, begun.number, scratch.packed_at[kWire]};
  const Messages node{g,
                      set,
                      op,
                      kNode,
                      begun.number,
                      scratch.packed_at[kNode],
                      scratch.received_at[kNode]};
  const int32_t warp_lane = static_cast<int32_t>(threadIdx.x) % kWarp;
  const auto terms_of = [&](int32_t from, int32_t row, int32_t, Term* terms) {
    const int32_t place =
        warp_lane < g.relay_width ? RelayOf(g, op, relay, from, row)[warp_lane] : -1;
    const int32_t region = place < 0 ? 0 : from * g.nodes.ranks_per_node + place / op.tokens;
    const int32_t rows = place < 0 ? 0 : set.scratch->relay_node_rows[region];
    const bool returned = place >= 0 && place % op.tokens < rows;
    const uint32_t those = __ballot_sync(~0u, returned);
    bool here = true;
    if (returned) {
      const Chunks chunks(rows, op.chunks);
      here = WaitForChunks(node, region, ChunksThrough(chunks.Of(place % op.tokens), chunks.count),
                           arrivals);
      terms[__popc(those & ((1u << warp_lane) - 1))] = {
          node.PayloadFrom(region) + LayoutOf(op, rows).rows_offset + place % op.tokens * op.stride,
          1.0f, 0};
    }
    here = __all_sync(~0u, here);
    if (!here) return -1;
    const bool is_lost = !g.drop_overflow && __any_sync(~0u, place >= 0 && !returned);
    return is_lost ? 0 : __popc(those);
  };
  if (begun.ok) {
    arrivals.Clear();  // and Pack meets
    sums.Pack(wire, set.scratch->relay_wire_rows, terms_of,
              [&](int32_t piece, const Term* terms, int32_t count, char* out) {
                Rows::SumMessages(op, piece, format, terms, count, out);
              });
  }
  if (!IsLastBlock(set) || threadIdx.x != 0) return;
  const Ending ending(g, set);
  const bool ok = begun.ok && !ending.faulted;
  int64_t sent_rows = 0, read_rows = 0, wire_rows = 0;
  for (int32_t region = 0; ok && region < node.count(); ++region) {
    sent_rows += recv_counts[region];
    read_rows += set.scratch->relay_node_rows[region];
  }
  for (int32_t n = 0; ok && n < wire.count(); ++n) wire_rows += set.scratch->relay_wire_rows[n];
  if (ok) {
    NoteInternode(wire, set.scratch->relay_wire_rows);
    NoteRelayed(wire, set.scratch->relay_wire_rows);
  }
  EndPhase(g, set, op, begun, ending, ok, sent_rows,
           static_cast<int64_t>(set.scratch->copies) * op.row_bytes + read_rows * op.stride,
           (sent_rows + wire_rows) * op.stride);
}

constexpr auto kReduce = [](auto rows) { return Reduce<decltype(rows)>; };

}  // namespace

cudaError_t LoadCombineRelay() {
  const cudaError_t error = LoadKernels({Kernel(LayOut)});
  return error == cudaSuccess ? LoadKernelsFor(kReduce) : error;
}

cudaError_t LaunchCombineRelay(const KernelParams& k, const CombineSendArrays& arrays,
                               const LaunchParams& launch) {
  const cudaError_t error = LaunchKernel(LayOut, RelayBlocks(k.g, k.op, launch), kThreads, 0,
                                         launch.stream, k, arrays.relay);
  if (error != cudaSuccess) return error;
  return LaunchKernel(KernelFor(arrays.y.format, kReduce),
                      launch.BlocksFor(int64_t{k.g.nodes.count()} * k.op.tokens * k.op.pieces),
                      kThreads, 0, launch.stream, k, arrays.y.format, arrays.relay,
                      arrays.recv_counts);
}

}  // namespace smfree::cuda
