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
// Byte floor: the rows of the messages inside the node read, those of the wire messages written.
#include "csrc/cuda/host/launch.h"
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
  const Context& c = wire.c;
  Lists& lists = shared.lists;
  CountRelay(c, wire.number, relay, tile, lists);
  shared.arrivals.Clear(/*asks_others=*/tile.first_row == 0);
  __syncthreads();
  bool ok = true;
  const int32_t per_node = c.nodes.ranks_per_node;
  for (int32_t index = threadIdx.x; index < per_node; index += blockDim.x) {
    int32_t rows = 0;
    ok = OpenMessage(node, tile.first_region + index, lists.total[index], rows, shared.arrivals) &&
         ok;
  }
  if (!__syncthreads_and(ok)) return;
  if (tile.first_row == 0) {
    WriteRelayRows(c, tile, lists);
    if (threadIdx.x == 0) WriteHeader(wire, tile.node, lists.rows);
  }
  if (!c.slots) return;

  char* const message = wire.To(tile.node) + c.layout.header_bytes;
  auto* const to = reinterpret_cast<float*>(message + LayoutOf(c, lists.rows).slots_offset);
  const int32_t num_slots = min(tile.num_rows, lists.rows - tile.first_row) * c.top_k;
  for (int32_t slot = threadIdx.x; slot < num_slots; slot += blockDim.x) {
    const int32_t at = slot / c.top_k;
    const int32_t k = slot % c.top_k;
    float sum = 0.0f;
    for (int32_t index = 0; index < per_node; ++index) {
      if (!lists.Has(index, at)) continue;
      const char* const from = node.From(tile.first_region + index) + c.layout.header_bytes;
      const auto* const values =
          reinterpret_cast<const float*>(from + LayoutOf(c, lists.total[index]).slots_offset);
      const int64_t position = lists.Position(index, at);
      sum = __fadd_rn(sum, __ldcg(values + position * c.top_k + k));
    }
    to[int64_t{tile.first_row} * c.top_k + slot] = sum;
  }
}

__global__ void __launch_bounds__(kThreads) LayOut(const Context c, const int32_t* relay) {
  __shared__ LaidOut shared;
  const Begun begun = BeginSendPhase(c);
  if (!begun.ok) return;
  const Messages wire{c, kWire, begun.number}, node{c, kNode, begun.number};
  ForEachRelayTile(c, [&](const RelayTile& tile) { LayOutTile(wire, node, tile, relay, shared); });
}

template <typename T, typename Word>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    Reduce(const Context c, const int32_t* relay, const int32_t* recv_counts) {
  __shared__ Sums sums;
  __shared__ Arrivals arrivals;
  const Begun begun = BeginSendPhase(c);
  const Messages wire{c, kWire, begun.number}, node{c, kNode, begun.number};
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % kWarp;
  const auto terms_of = [&](int32_t from, int32_t row, int32_t, Term* terms) {
    const int32_t place = lane < c.relay_width ? RelayOf(c, relay, from, row)[lane] : -1;
    bool here = true;
    if (place >= 0) {
      const int32_t region = from * c.nodes.ranks_per_node + place / c.tokens;
      const int32_t rows = c.scratch->relay_node_rows[region];
      const Chunks chunks(rows, c.chunks);
      here = WaitForChunks(node, region, ChunksThrough(chunks.Of(place % c.tokens), chunks.count),
                           arrivals);
      terms[lane] = {node.From(region) + c.layout.header_bytes + LayoutOf(c, rows).rows_offset +
                         place % c.tokens * c.layout.row_bytes,
                     1.0f};
    }
    here = __all_sync(~0u, here);
    return here ? __popc(__ballot_sync(~0u, place >= 0)) : -1;
  };
  if (begun.ok) {
    arrivals.Clear();  // and Pack meets
    sums.Pack<T, Word>(wire, c.scratch->relay_wire_rows, terms_of);
  }
  if (!IsLastBlock(c) || threadIdx.x != 0) return;
  const bool ok = begun.ok && !Faulted(c);
  int64_t sent_rows = 0, read_rows = 0, wire_rows = 0;
  for (int32_t region = 0; ok && region < node.count(); ++region) {
    sent_rows += recv_counts[region];
    read_rows += c.scratch->relay_node_rows[region];
  }
  for (int32_t n = 0; ok && n < wire.count(); ++n) wire_rows += c.scratch->relay_wire_rows[n];
  if (ok) {
    NoteInternode(wire, c.scratch->relay_wire_rows);
    NoteRelayed(wire, c.scratch->relay_wire_rows);
  }
  EndPhase(c, begun, ok, sent_rows,
           (static_cast<int64_t>(c.scratch->copies) + read_rows) * c.x_row_bytes,
           (sent_rows + wire_rows) * c.x_row_bytes);
}

constexpr auto kReduce = [](auto element, auto word) {
  return Reduce<decltype(element), decltype(word)>;
};

}  // namespace

cudaError_t LoadCombineRelay() {
  const cudaError_t error = LoadKernels({Kernel(LayOut)});
  return error == cudaSuccess ? LoadKernelsFor(kReduce) : error;
}

cudaError_t LaunchCombineRelay(const Context& c, const CombineSendArrays& arrays,
                               const Launch& launch) {
  const cudaError_t error = LaunchKernel(LayOut, RelayBlocks(c, launch), kThreads, 0, launch.stream,
                                         c, arrays.relay);
  if (error != cudaSuccess) return error;
  const auto kernel = KernelFor(launch.dtype, WordBytes(c), kReduce);
  return LaunchKernel(kernel, launch.BlocksFor(int64_t{c.nodes.count()} * c.tokens * c.pieces),
                      kThreads, 0, launch.stream, c, arrays.relay, arrays.recv_counts);
}

}  // namespace smfree::cuda
