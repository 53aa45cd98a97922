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
//                  shared memory makes every position a population count; the blocks add up their
//                  totals across a barrier, so all of them must be resident at once: they are
//                  no more than the SMs of the device, and kMaxRouteBlocks. Writes places,
//                  send_counts, headers, codes and slots.
// LayOut   S1, S2  in place of Route where the routing is known: headers and slots.
//                  In hierarchical mode after PlaceOnWire.
// Pack     S3, S4  a warp per piece of a row: reads it once, quantises it where the wire asks for
//                  that, writes it once per destination. A block takes a tile of rows, one piece
//                  per warp, and counts the tile when it is written.
//
// RouteAndPack  S1 – S6  in place of Route and Pack for small operations (small.h). A block counts
//                  all rows as Route does its own, and has the places of a tile in shared memory
//                  when it packs it. The last block raises all signals.
//
// Launch: Route as RouteShape says: kRouteThreads threads, a block per rows_per_block rows, all of
// them resident. PlaceOnWire: kThreads, a block per kPlacedRows rows. LayOut: kThreads, any number
// of blocks, PackingBytes of shared memory. Pack: kThreads, no more than kBlocksPerSm blocks per SM
// (BlocksFor), so that all are resident: a block waits until another has handed over the chunk
// before its own. RouteAndPack: kThreads, any number of blocks, FusedRouteBytes of shared memory.
//
// Byte floor: T rows of the program read, sum(send_counts) rows of messages written.
#include "csrc/cuda/kernels/dispatch_send_route.cuh"
#include "csrc/cuda/host/kernels.h"
#include "csrc/cuda/kernels/places.cuh"
#include "csrc/cuda/kernels/row_kinds.cuh"
#include "csrc/cuda/kernels/tiles.cuh"

namespace smfree::cuda {
namespace {

// Whether no dispatch of this group can have made place `at`: they ascend, and are -1 at the end.
__device__ bool IsBroken(const GroupConstants& g, const OperationParams& op, int64_t at,
                         const WirePlaces& wire) {
  const int32_t place = wire.places[at];
  const int32_t before = at % g.wire_width == 0 ? 0 : wire.places[at - 1];
  return place < -1 || before < 0 || (at % g.wire_width != 0 && before >= place) ||
         place / op.tokens >= g.nodes.Regions(kWire) ||
         place % op.tokens >= wire.counts[place / op.tokens];
}

__global__ void LayOut(const __grid_constant__ KernelParams params, const float* slots,
                       const HandlePlaces handle) {
  const GroupConstants& g = params.g;
  const OperationParams& op = params.op;
  const Begun begun = BeginSendPhase(g, op, params.sets);
  const SetPointers set = params.sets.At(begun.set);
  const WirePlaces wire(g, set, handle.places, handle.send_counts);
  if (!g.nodes.hierarchical) NoteBegin(set);
  if (!begun.ok) return;
  extern __shared__ Packing packing[];  // one, or none
  const Messages messages{g, set, op, kWire, begun.number, packing->payload_at};
  const auto thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const auto threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  if (!PlanPacking(messages, wire.counts, handle.send_counts, int64_t{op.tokens} * g.wire_width,
                   NeedsPacking(op) ? packing : nullptr)) {
    return;
  }
  WriteHeaders(messages, wire.counts);
  for (int64_t rank = thread; g.nodes.hierarchical && rank < g.num_ranks; rank += threads) {
    WriteRowsToRank(messages, static_cast<int32_t>(rank), handle.send_counts[rank]);
  }
  for (int64_t at = thread; at < int64_t{op.tokens} * g.wire_width; at += threads) {
    const int32_t place = wire.places[at];
    if (place == -1) continue;
    if (IsBroken(g, op, at, wire)) {
      const auto row = static_cast<int32_t>(at / g.wire_width);
      Report(g, op, FaultKind::kInvalidArgument, begun.number, {-1, row, op.tokens, place});
      continue;
    }
    if (!op.slots) continue;
    const int32_t region = place / op.tokens;
    float* const to = SlotsTo(messages, region, wire.counts[region]);
    for (int32_t k = 0; k < g.top_k; ++k) {
      to[int64_t{place % op.tokens} * g.top_k + k] = slots[at / g.wire_width * g.top_k + k];
    }
  }
}

template <typename Rows>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    Pack(const __grid_constant__ KernelParams params, const __grid_constant__ RowsIn x,
         const HandlePlaces handle) {
  const GroupConstants& g = params.g;
  const OperationParams& op = params.op;
  __shared__ Outgoing outgoing[kMaxRanks];
  __shared__ char* targets[kWarps][kMaxTopK];
  __shared__ Rounds rounds;
  const Begun begun = BeginSendPhase(g, op, params.sets);
  const SetPointers set = params.sets.At(begun.set);
  const WirePlaces wire(g, set, handle.places, handle.send_counts);
  const Messages messages{g, set, op, kWire, begun.number, set.scratch->packed_at[kWire]};
  if (begun.ok) {
    for (int32_t region = threadIdx.x; region < messages.count(); region += blockDim.x) {
      outgoing[region] = OutgoingTo(messages, region, wire.counts[region]);
    }
    rounds.Clear();
    __syncthreads();
    HandOverEmpty(messages, outgoing);

    const auto warp = static_cast<int32_t>(threadIdx.x) / kWarp;
    const auto warp_lane = static_cast<int32_t>(threadIdx.x) % kWarp;
    char** const to = targets[warp];
    const int32_t stride = static_cast<int32_t>(gridDim.x) * (kWarps / op.pieces);
    const auto place_of = [&](int32_t t) {
      return t < op.tokens && warp_lane < g.wire_width
                 ? wire.places[int64_t{t} * g.wire_width + warp_lane]
                 : -1;
    };
    int32_t next =
        place_of(static_cast<int32_t>(blockIdx.x) * (kWarps / op.pieces) + warp / op.pieces);
    const auto pack = [&](int32_t t, int32_t piece) {
      const int32_t place = next;
      next = place_of(t + stride);  // far away: early
      if (place >= 0) {
        to[warp_lane] =
            outgoing[place / op.tokens].first_row + place % op.tokens * op.stride;
      }
      const int32_t count = __popc(__ballot_sync(~0u, place >= 0));
      __syncwarp();
      Rows::Pack(op, piece, x, t, to, count);
    };
    ForEachTile(op, rounds, op.tokens, pack, [&](int32_t first_row, int32_t rows) {
      for (int32_t at = warp_lane; at < rows * g.wire_width; at += kWarp) {
        const int32_t place = wire.places[int64_t{first_row} * g.wire_width + at];
        if (place < 0) continue;
        const int32_t region = place / op.tokens;
        CountRow(messages, region, outgoing[region], place % op.tokens);
      }
    });
  }
  if (!IsLastBlock(set) || threadIdx.x != 0) return;
  int64_t wire_rows = 0;
  for (int32_t region = 0; region < messages.count(); ++region) wire_rows += wire.counts[region];
  const Ending ending(g, set);
  const bool ok = begun.ok && !ending.faulted;
  if (ok) NoteInternode(messages, wire.counts);
  EndPhase(g, set, op, begun, ending, ok, wire_rows, op.tokens * op.row_bytes,
           wire_rows * op.stride);
}

size_t FusedRouteBytes(const KernelParams& k) {
  return sizeof(uint32_t) * static_cast<size_t>(RouteBins(k.g.nodes, k.g.num_experts)) *
         static_cast<size_t>(BitWords(k.op.tokens));
}

template <typename Rows>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    RouteAndPack(const __grid_constant__ KernelParams params,
                 const __grid_constant__ DispatchSendArrays a) {
  const GroupConstants& g = params.g;
  const OperationParams& op = params.op;
  extern __shared__ uint32_t shared[];
  __shared__ int32_t rows_to[kMaxRanks];
  __shared__ char* first_row_at[kMaxRanks];
  __shared__ int32_t places[kWarps * kMaxTopK];  // of the rows of a tile
  __shared__ char* targets[kWarps][kMaxTopK];
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const int32_t first_expert = RoutedRows::FirstExpert(params, a, 0);
  const Begun begun = BeginSendPhase(g, op, params.sets);
  const SetPointers set = params.sets.At(begun.set);
  NoteBegin(set);
  const Messages messages{g, set, op, kWire, begun.number};
  const RoutedRows rows(messages, a, RowBits{shared, op.tokens}, 0);
  rows.SetBits(begun, first_expert);
  for (int32_t rank = thread; rank < g.num_ranks; rank += kThreads) {
    rows_to[rank] = rows.bits.Count(g.num_experts + rank);
    first_row_at[rank] = OutgoingTo(messages, rank, rows_to[rank]).first_row;
    if (blockIdx.x != 0) continue;
    a.send_counts[rank] = rows_to[rank];
    if (begun.ok) WriteHeader(messages, rank, rows_to[rank]);
  }
  for (int32_t expert = thread; blockIdx.x == 0 && begun.ok && expert < g.num_experts;
       expert += kThreads) {
    rows.WriteCopies(expert, rows.bits.Count(expert));
  }
  __syncthreads();

  const int32_t warp = thread / kWarp;
  const int32_t warp_lane = thread % kWarp;
  const int32_t tile_rows = kWarps / op.pieces;
  for (int32_t first = static_cast<int32_t>(blockIdx.x) * tile_rows; first < op.tokens;
       first += static_cast<int32_t>(gridDim.x) * tile_rows) {
    const int32_t count = min(tile_rows, op.tokens - first);
    for (int32_t slot = thread; slot < count * g.top_k; slot += kThreads) {
      rows.WriteSlot(first * g.top_k + slot, [](int32_t) { return 0; }, rows_to,
                     Placing(places, slot / g.top_k, g.wire_width), begun.ok);
    }
    __syncthreads();
    for (int32_t at = thread; at < count * g.wire_width; at += kThreads) {
      a.places[int64_t{first} * g.wire_width + at] = places[at];
    }
    const int32_t row = warp / op.pieces;
    if (begun.ok && row < count) {
      const int32_t place = warp_lane < g.wire_width ? places[row * g.wire_width + warp_lane] : -1;
      if (place >= 0) {
        targets[warp][warp_lane] =
            first_row_at[place / op.tokens] + place % op.tokens * op.stride;
      }
      const int32_t num_targets = __popc(__ballot_sync(~0u, place >= 0));
      __syncwarp();
      Rows::Pack(op, warp % op.pieces, a.x, first + row, targets[warp], num_targets);
    }
    __syncthreads();  // the places have been read
  }
  if (!IsLastBlock(set)) return;
  const Ending ending(g, set);
  const bool ok = begun.ok && !ending.faulted;
  if (ok) HandOverAll(messages);
  if (thread != 0) return;
  int64_t wire_rows = 0;
  for (int32_t rank = 0; rank < g.num_ranks; ++rank) wire_rows += rows_to[rank];
  EndPhase(g, set, op, begun, ending, ok, wire_rows, op.tokens * op.row_bytes,
           wire_rows * op.stride);
}

constexpr auto kPack = [](auto rows) { return Pack<decltype(rows)>; };
constexpr auto kRouteAndPack = [](auto rows) { return RouteAndPack<decltype(rows)>; };

cudaError_t LaunchPack(const KernelParams& k, const RowsIn& x, const HandlePlaces& handle,
                       const LaunchParams& launch) {
  return LaunchKernel(CopyKernelFor(x.format, kPack),
                      launch.BlocksFor(k.op.tokens * k.op.pieces), kThreads, 0, launch.stream, k, x,
                      handle);
}

}  // namespace

size_t RouteSharedBytes(int64_t tokens, int32_t bins, int32_t num_sms) {
  return RouteShape(tokens, bins, num_sms).shared_bytes;
}

cudaError_t LoadDispatchSend(size_t route_shared_bytes) {
  cudaError_t error =
      LoadKernels({Kernel(Route, route_shared_bytes), Kernel(PlaceOnWire), Kernel(LayOut)});
  if (error == cudaSuccess) error = LoadCopyKernelsFor(kPack);
  return error == cudaSuccess ? LoadCopyKernelsFor(kRouteAndPack) : error;
}

cudaError_t LaunchDispatchSend(const KernelParams& k, const DispatchSendArrays& arrays,
                               const LaunchParams& launch) {
  if (launch.fused) {
    return LaunchKernel(CopyKernelFor(arrays.x.format, kRouteAndPack),
                        launch.BlocksFor(k.op.tokens * k.op.pieces), kThreads, FusedRouteBytes(k),
                        launch.stream, k, arrays);
  }
  const RouteShape shape(k.op.tokens, RouteBins(k.g.nodes, k.g.num_experts), launch.num_sms);
  const cudaError_t error = LaunchKernel(Route, shape.blocks, kRouteThreads, shape.shared_bytes,
                                         launch.stream, k, arrays, shape.rows_per_block);
  if (error != cudaSuccess) return error;
  return LaunchPack(k, arrays.x, {arrays.places, arrays.send_counts}, launch);
}

cudaError_t LaunchDispatchSendCached(const KernelParams& k, const DispatchSendCachedArrays& arrays,
                                     const LaunchParams& launch) {
  const HandlePlaces handle{arrays.places, arrays.send_counts};
  if (k.g.nodes.hierarchical) {
    const cudaError_t error = LaunchKernel(PlaceOnWire, LaunchParams::BlocksForPlaces(k.op.tokens),
                                           kThreads, 0, launch.stream, k, arrays.places);
    if (error != cudaSuccess) return error;
  }
  const cudaError_t error =
      LaunchKernel(LayOut, launch.BlocksForItems(int64_t{k.op.tokens} * k.g.wire_width), kThreads,
                   PackingBytes(k.op), launch.stream, k, arrays.slots, handle);
  if (error != cudaSuccess) return error;
  return LaunchPack(k, arrays.x, handle, launch);
}

}  // namespace smfree::cuda
