// SPDX-License-Identifier: Apache-2.0
//
// The relay of a combine, with which a combine_send ends in hierarchical mode: to the rank of this
// index in node n, for its i-th row here, over the places j * T + p = relay[n,i,:], ascending in j:
//
//   message n on the wire, row i = sum of row p of message n * L + j inside the node
//                                                             float32, rounded once
//   slots: sum of the slots there                             float32
//
// LayOut  R1, R2  waits for the first chunk of each message; writes headers and slots.
// Reduce  R1, R2  a warp per piece of a row: waits for the chunks that it needs, reads the terms
//                 once, writes their sum.
//
// Launch: kThreads threads, and no more blocks than kBlocksPerSm per SM. LayOut: RelayBlocks.
// Reduce: BlocksFor, all of them resident, because a block waits until another has handed over the
// chunk before its own.
//
// Byte floor: the rows of the messages inside the node read, those of the wire messages written.
#include "csrc/cuda/host/kernels.h"
#include "csrc/cuda/kernels/relay.cuh"
#include "csrc/cuda/kernels/sums.cuh"

namespace smfree::cuda {
namespace {

// Shared memory of a block that lays out messages.
struct LaidOut {
  Lists lists;
  Arrivals arrivals;
};

__device__ void LayOutTile(const Messages& wire, const Messages& node, const RelayTile& tile,
                           const int32_t* relay, LaidOut& shared) {
  const GroupConstants& g = wire.g;
  const LanePointers& lane = wire.lane;
  const OperationParams& op = wire.op;
  Lists& lists = shared.lists;
  CountRelay(g, op, wire.number, relay, tile, lists);
  shared.arrivals.Clear(/*asks_others=*/tile.first_row == 0);
  __syncthreads();
  bool ok = true;
  const int32_t per_node = g.nodes.ranks_per_node;
  for (int32_t index = threadIdx.x; index < per_node; index += blockDim.x) {
    int32_t rows = 0;
    ok = OpenMessage(node, tile.first_region + index, lists.total[index], rows, shared.arrivals) &&
         ok;
  }
  if (!__syncthreads_and(ok)) return;
  if (tile.first_row == 0) {
    WriteRelayRows(g, lane, tile, lists);
    if (threadIdx.x == 0) WriteHeader(wire, tile.node, lists.num_rows);
  }
  if (!op.slots) return;

  char* const message = wire.To(tile.node) + g.layout.header_bytes;
  auto* const to = reinterpret_cast<float*>(message + LayoutOf(g, op, lists.num_rows).slots_offset);
  const int32_t num_slots = min(tile.num_rows, lists.num_rows - tile.first_row) * g.top_k;
  for (int32_t slot = threadIdx.x; slot < num_slots; slot += blockDim.x) {
    const int32_t at = slot / g.top_k;
    const int32_t k = slot % g.top_k;
    float sum = 0.0f;
    for (int32_t index = 0; index < per_node; ++index) {
      if (!lists.Has(index, at)) continue;
      const char* const from = node.From(tile.first_region + index) + g.layout.header_bytes;
      const auto* const values =
          reinterpret_cast<const float*>(from + LayoutOf(g, op, lists.total[index]).slots_offset);
      const int64_t position = lists.Position(index, at);
      sum = __fadd_rn(sum, __ldcg(values + position * g.top_k + k));
    }
    to[int64_t{tile.first_row} * g.top_k + slot] = sum;
  }
}

__global__ void __launch_bounds__(kThreads)
    LayOut(const KernelParams params, const int32_t* relay) {
  const GroupConstants& g = params.g;
  const LanePointers& lane = params.lane;
  const OperationParams& op = params.op;
  __shared__ LaidOut shared;
  const Begun begun = BeginSendPhase(g, lane, op);
  if (!begun.ok) return;
  const Messages wire{g, lane, op, kWire, begun.number}, node{g, lane, op, kNode, begun.number};
  ForEachRelayTile(g, op,
                   [&](const RelayTile& tile) { LayOutTile(wire, node, tile, relay, shared); });
}

template <typename T, typename Word>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    Reduce(const KernelParams params, const int32_t* relay, const int32_t* recv_counts) {
  const GroupConstants& g = params.g;
  const LanePointers& lane = params.lane;
  const OperationParams& op = params.op;
  __shared__ Sums sums;
  __shared__ Arrivals arrivals;
  const Begun begun = BeginSendPhase(g, lane, op);
  const Messages wire{g, lane, op, kWire, begun.number}, node{g, lane, op, kNode, begun.number};
  const int32_t warp_lane = static_cast<int32_t>(threadIdx.x) % kWarp;
  const auto terms_of = [&](int32_t from, int32_t row, int32_t, Term* terms) {
    const int32_t place =
        warp_lane < g.relay_width ? RelayOf(g, op, relay, from, row)[warp_lane] : -1;
    bool here = true;
    if (place >= 0) {
      const int32_t region = from * g.nodes.ranks_per_node + place / op.tokens;
      const int32_t rows = lane.scratch->relay_node_rows[region];
      const Chunks chunks(rows, op.chunks);
      here = WaitForChunks(node, region, ChunksThrough(chunks.Of(place % op.tokens), chunks.count),
                           arrivals);
      terms[warp_lane] = {node.From(region) + g.layout.header_bytes +
                              LayoutOf(g, op, rows).rows_offset +
                              place % op.tokens * g.layout.row_bytes,
                          1.0f};
    }
    here = __all_sync(~0u, here);
    return here ? __popc(__ballot_sync(~0u, place >= 0)) : -1;
  };
  if (begun.ok) {
    arrivals.Clear();  // and Pack meets
    sums.Pack<T, Word>(wire, lane.scratch->relay_wire_rows, terms_of);
  }
  if (!IsLastBlock(lane) || threadIdx.x != 0) return;
  const bool ok = begun.ok && !Faulted(g);
  int64_t sent_rows = 0, read_rows = 0, wire_rows = 0;
  for (int32_t region = 0; ok && region < node.count(); ++region) {
    sent_rows += recv_counts[region];
    read_rows += lane.scratch->relay_node_rows[region];
  }
  for (int32_t n = 0; ok && n < wire.count(); ++n) wire_rows += lane.scratch->relay_wire_rows[n];
  if (ok) {
    NoteInternode(wire, lane.scratch->relay_wire_rows);
    NoteRelayed(wire, lane.scratch->relay_wire_rows);
  }
  EndPhase(g, lane, op, begun, ok, sent_rows,
           (static_cast<int64_t>(lane.scratch->copies) + read_rows) * g.x_row_bytes,
           (sent_rows + wire_rows) * g.x_row_bytes);
}

constexpr auto kReduce = [](auto element, auto word) {
  return Reduce<decltype(element), decltype(word)>;
};

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
  const auto kernel = KernelFor(launch.dtype, WordBytes(k.g), kReduce);
  return LaunchKernel(kernel,
                      launch.BlocksFor(int64_t{k.g.nodes.count()} * k.op.tokens * k.op.pieces),
                      kThreads, 0, launch.stream, k, arrays.relay, arrays.recv_counts);
}

}  // namespace smfree::cuda
