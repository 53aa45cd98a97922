// SPDX-License-Identifier: Apache-2.0
//
// dispatch_send: for each row t of x and each rank d that holds an expert of it, ascending:
//
//   message to d, row i = x[t], CopyCodes of topk_idx[t,:], slots topk_weights[t,:]
//   places[t,p] = d * T + i          i counts the rows to d in the order of t
//
// In hierarchical mode there is a message to each node instead, to its relay; the same `places`.
//
// Route    S1, S2  a thread per slot. A bit per (expert, row) and (rank, row) of the block in
//                  shared memory makes every index a population count; the blocks add up their
//                  totals across a barrier, so all of them must be resident at once: they are
//                  no more than the SMs of the device, and kMaxRouteBlocks. Writes places,
//                  send_counts, headers, codes and slots.
// LayOut   S1, S2  in place of Route where the routing is known: headers and slots.
//                  In hierarchical mode after PlaceOnWire.
// Pack     S3, S4  a warp per piece of a row: reads it once, writes it once per destination. A
//                  block takes a tile of rows, one piece per warp, and counts the tile when it is
//                  written.
//
// Byte floor: T * row_bytes read, sum(send_counts) * row_bytes written.
#include "csrc/cuda/kernels/dispatch_send_route.cuh"
#include "csrc/cuda/host/launch.h"
#include "csrc/cuda/kernels/places.cuh"
#include "csrc/cuda/kernels/rows.cuh"
#include "csrc/cuda/kernels/tiles.cuh"

namespace smfree::cuda {
namespace {

// Whether no dispatch of this group can have made place `at`: they ascend, and are -1 at the end.
__device__ bool IsBroken(const Context& c, int64_t at, const WirePlaces& wire) {
  const int32_t place = wire.places[at];
  const int32_t before = at % c.wire_width == 0 ? 0 : wire.places[at - 1];
  return place < -1 || before < 0 || (at % c.wire_width != 0 && before >= place) ||
         place / c.tokens >= c.nodes.Regions(kWire) ||
         place % c.tokens >= wire.counts[place / c.tokens];
}

__global__ void LayOut(const Context c, const float* slots, const WirePlaces wire) {
  if (!c.nodes.hierarchical) NoteBegin(c);
  const Begun begun = BeginSendPhase(c);
  if (!begun.ok) return;
  const Messages messages{c, kWire, begun.number};
  const auto thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const auto threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  WriteHeaders(messages, wire.counts);
  for (int64_t at = thread; at < int64_t{c.tokens} * c.wire_width; at += threads) {
    const int32_t place = wire.places[at];
    if (place == -1) continue;
    if (IsBroken(c, at, wire)) {
      const auto row = static_cast<int32_t>(at / c.wire_width);
      Report(c, FaultKind::kInvalidArgument, begun.number, {-1, row, c.tokens, place});
      continue;
    }
    if (!c.slots) continue;
    const int32_t region = place / c.tokens;
    char* const message = messages.To(region) + c.layout.header_bytes;
    auto* const to =
        reinterpret_cast<float*>(message + LayoutOf(c, wire.counts[region]).slots_offset);
    for (int32_t k = 0; k < c.top_k; ++k) {
      to[int64_t{place % c.tokens} * c.top_k + k] = slots[at / c.wire_width * c.top_k + k];
    }
  }
}

template <typename Word>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    Pack(const Context c, const char* x, const WirePlaces wire) {
  __shared__ Outgoing outgoing[kMaxRanks];
  __shared__ char* targets[kWarps][kMaxTopK];
  __shared__ Rounds rounds;
  const Begun begun = BeginSendPhase(c);
  const Messages messages{c, kWire, begun.number};
  if (begun.ok) {
    for (int32_t region = threadIdx.x; region < messages.count(); region += blockDim.x) {
      outgoing[region] = OutgoingTo(messages, region, wire.counts[region]);
    }
    rounds.Clear();
    __syncthreads();
    HandOverEmpty(messages, outgoing);

    const auto warp = static_cast<int32_t>(threadIdx.x) / kWarp;
    const auto lane = static_cast<int32_t>(threadIdx.x) % kWarp;
    char** const to = targets[warp];
    const int32_t stride = static_cast<int32_t>(gridDim.x) * (kWarps / c.pieces);
    const auto place_of = [&](int32_t t) {
      return t < c.tokens && lane < c.wire_width
                 ? wire.places[int64_t{t} * c.wire_width + lane]
                 : -1;
    };
    int32_t next =
        place_of(static_cast<int32_t>(blockIdx.x) * (kWarps / c.pieces) + warp / c.pieces);
    const auto pack = [&](int32_t t, int32_t piece) {
      const int32_t place = next;
      next = place_of(t + stride);  // far away: early
      if (place >= 0) {
        to[lane] = outgoing[place / c.tokens].rows + place % c.tokens * c.layout.row_bytes;
      }
      const int32_t count = __popc(__ballot_sync(~0u, place >= 0));
      __syncwarp();
      CopyRow<Word>(Words(c.x_row_bytes, sizeof(Word), piece, c.pieces), x + t * c.x_row_bytes, to,
                    count);
    };
    ForEachTile(c, rounds, c.tokens, pack, [&](int32_t first_row, int32_t rows) {
      for (int32_t at = lane; at < rows * c.wire_width; at += kWarp) {
        const int32_t place = wire.places[int64_t{first_row} * c.wire_width + at];
        if (place < 0) continue;
        const int32_t region = place / c.tokens;
        CountRow(messages, region, outgoing[region].chunks, place % c.tokens);
      }
    });
  }
  if (!IsLastBlock(c) || threadIdx.x != 0) return;
  int64_t wire_rows = 0;
  for (int32_t region = 0; region < messages.count(); ++region) wire_rows += wire.counts[region];
  const bool ok = begun.ok && !Faulted(c);
  if (ok) NoteInternode(messages, wire.counts);
  EndPhase(c, begun, ok, wire_rows, c.tokens * c.x_row_bytes, wire_rows * c.x_row_bytes);
}

cudaError_t LaunchPack(const Context& c, const void* x, const WirePlaces& wire,
                       const Launch& launch) {
  const auto* const bytes = static_cast<const char*>(x);
  const auto pack = WordBytes(c) == 16 ? Pack<uint4> : WordBytes(c) == 4 ? Pack<uint32_t>
                                                                         : Pack<uint16_t>;
  return LaunchKernel(pack, launch.BlocksFor(c.tokens * c.pieces), kThreads, 0, launch.stream, c,
                      bytes, wire);
}

}  // namespace

size_t RouteSharedBytes(int64_t tokens, int32_t bins, int32_t num_sms) {
  return RouteShape(tokens, bins, num_sms).shared_bytes;
}

cudaError_t LoadDispatchSend(size_t route_shared_bytes) {
  return LoadKernels({Kernel(Route, route_shared_bytes), Kernel(PlaceOnWire), Kernel(LayOut),
                      Kernel(Pack<uint4>), Kernel(Pack<uint32_t>), Kernel(Pack<uint16_t>)});
}

cudaError_t LaunchDispatchSend(const Context& c, const DispatchSendArrays& arrays,
                               const Launch& launch) {
  const RouteShape shape(c.tokens, RouteBins(c.nodes, c.num_experts), launch.num_sms);
  const cudaError_t error = LaunchKernel(Route, shape.blocks, kRouteThreads, shape.shared_bytes,
                                         launch.stream, c, arrays, shape.rows_per_block);
  if (error != cudaSuccess) return error;
  return LaunchPack(c, arrays.x, {c, arrays.places, arrays.send_counts}, launch);
}

cudaError_t LaunchDispatchSendCached(const Context& c, const DispatchSendCachedArrays& arrays,
                                     const Launch& launch) {
  const WirePlaces wire(c, arrays.places, arrays.send_counts);
  if (c.nodes.hierarchical) {
    const cudaError_t error = LaunchKernel(PlaceOnWire, Launch::BlocksForPlaces(c.tokens), kThreads,
                                           0, launch.stream, c, arrays.places);
    if (error != cudaSuccess) return error;
  }
  const cudaError_t error =
      LaunchKernel(LayOut, launch.BlocksForItems(int64_t{c.tokens} * c.wire_width), kThreads, 0,
                   launch.stream, c, arrays.slots, wire);
  if (error != cudaSuccess) return error;
  return LaunchPack(c, arrays.x, wire, launch);
}

}  // namespace smfree::cuda
