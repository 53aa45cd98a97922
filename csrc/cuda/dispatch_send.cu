// SPDX-License-Identifier: Apache-2.0
//
// dispatch_send: for each row t of x and each rank d that holds an expert of it, ascending:
//
//   message to d, row i = x[t], CopyCodes of topk_idx[t,:], slots topk_weights[t,:]
//   places[t,p] = d * T + i          i counts the rows to d in the order of t
//
// Route    S1, S2  a thread per slot. A bit per (expert, row) and (rank, row) of the block in
//                  shared memory makes every index a population count; the blocks add up their
//                  totals across a barrier, so all of them are resident at once: they are no more
//                  than kMaxRouteBlocks. Writes places, send_counts, headers,
//                  codes and slots.
// LayOut   S1, S2  in place of Route where the routing is known: headers and slots.
// Pack     S3, S4  a warp per piece of a row: reads it once, writes it once per destination. A
//                  block takes a tile of rows, one piece per warp, and counts the tile when it is
//                  written.
//
// Byte floor: T * row_bytes read, sum(send_counts) * row_bytes written.
#include "csrc/cuda/dispatch_send_route.cuh"
#include "csrc/cuda/launch.h"
#include "csrc/cuda/rows.cuh"

namespace smfree::cuda {
namespace {

// A place that no dispatch of this group can have made.
__device__ bool IsBroken(const Context& c, int32_t place, const int32_t* send_counts) {
  if (place == -1) return false;
  return place < -1 || place / c.tokens >= c.num_ranks ||
         place % c.tokens >= send_counts[place / c.tokens];
}

__global__ void LayOut(const Context c, const DispatchSendCachedArrays a) {
  NoteBegin(c);
  const Begun begun = BeginSendPhase(c);
  if (!begun.ok) return;
  const auto thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const auto threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  WriteHeaders(c, begun.number, a.send_counts);
  for (int64_t at = thread; at < int64_t{c.tokens} * c.places_per_row; at += threads) {
    const int32_t place = a.places[at];
    if (place < 0) continue;
    if (IsBroken(c, place, a.send_counts)) {
      Report(c, FaultKind::kInvalidArgument, begun.number, {-1, -1, c.tokens, place});
      continue;
    }
    if (!c.slots) continue;
    const int32_t peer = place / c.tokens;
    char* const message = MessageTo(c, begun.number, peer) + c.layout.header_bytes;
    auto* const slots =
        reinterpret_cast<float*>(message + LayoutOf(c, a.send_counts[peer]).slots_offset);
    for (int32_t k = 0; k < c.top_k; ++k) {
      slots[int64_t{place % c.tokens} * c.top_k + k] =
          a.slots[at / c.places_per_row * c.top_k + k];
    }
  }
}

template <typename Word>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    Pack(const Context c, const char* x, const int32_t* places, const int32_t* send_counts) {
  __shared__ Outgoing outgoing[kMaxRanks];
  __shared__ char* targets[kWarps][kMaxTopK];
  __shared__ Rounds rounds;
  const Begun begun = BeginSendPhase(c);
  if (begun.ok) {
    for (int32_t peer = threadIdx.x; peer < c.num_ranks; peer += blockDim.x) {
      outgoing[peer] = OutgoingTo(c, begun.number, peer, send_counts[peer]);
    }
    rounds.Clear();
    __syncthreads();
    HandOverEmpty(c, begun.number, outgoing);

    const auto warp = static_cast<int32_t>(threadIdx.x) / kWarp;
    const auto lane = static_cast<int32_t>(threadIdx.x) % kWarp;
    char** const to = targets[warp];
    const int32_t tile_rows = kWarps / c.pieces;
    const auto place_of = [&](int32_t tile) {
      const int32_t t = tile + warp / c.pieces;
      return t < c.tokens && lane < c.places_per_row
                 ? places[int64_t{t} * c.places_per_row + lane]
                 : -1;
    };
    int32_t next = place_of(static_cast<int32_t>(blockIdx.x) * tile_rows);
    uint32_t round = 0;
    for (int32_t tile = static_cast<int32_t>(blockIdx.x) * tile_rows; tile < c.tokens;
         tile += static_cast<int32_t>(gridDim.x) * tile_rows, ++round) {
      rounds.Begin(round);
      const int32_t t = tile + warp / c.pieces;
      const int32_t place = next;
      next = place_of(tile + static_cast<int32_t>(gridDim.x) * tile_rows);  // far away: early
      if (t < c.tokens) {
        if (place >= 0) {
          to[lane] = outgoing[place / c.tokens].rows + place % c.tokens * c.layout.row_bytes;
        }
        const int32_t count = __popc(__ballot_sync(~0u, place >= 0));
        __syncwarp();
        CopyRow<Word>(Words(c.x_row_bytes, sizeof(Word), warp % c.pieces, c.pieces),
                      x + t * c.x_row_bytes, to, count);
      }
      if (!rounds.End(round)) continue;
      const int32_t slots = min(tile_rows, c.tokens - tile) * c.places_per_row;
      for (int32_t slot = lane; slot < slots; slot += kWarp) {
        const int32_t place = places[int64_t{tile} * c.places_per_row + slot];
        if (place < 0) continue;
        const int32_t peer = place / c.tokens;
        CountRow(c, begun.number, peer, outgoing[peer].chunks, place % c.tokens);
      }
      __syncwarp();
    }
  }
  if (!IsLastBlock(c) || threadIdx.x != 0) return;
  int64_t wire_rows = 0;
  for (int32_t peer = 0; peer < c.num_ranks; ++peer) wire_rows += send_counts[peer];
  EndPhase(c, begun, begun.ok && !Faulted(c), wire_rows, c.tokens * c.x_row_bytes,
           wire_rows * c.x_row_bytes);
}

cudaError_t LaunchPack(const Context& c, const void* x, const int32_t* places,
                       const int32_t* send_counts, const Launch& launch) {
  const auto* const bytes = static_cast<const char*>(x);
  const auto pack = WordBytes(c) == 16 ? Pack<uint4> : WordBytes(c) == 4 ? Pack<uint32_t>
                                                                         : Pack<uint16_t>;
  pack<<<launch.BlocksFor(c.tokens * c.pieces), kThreads, 0, launch.stream>>>(c, bytes, places,
                                                                             send_counts);
  return cudaGetLastError();
}

}  // namespace

size_t RouteSharedBytes(int64_t tokens, int32_t num_experts, int32_t num_ranks) {
  return RouteShape(tokens, num_experts + num_ranks).shared_bytes;
}

cudaError_t LoadDispatchSend(size_t route_shared_bytes) {
  return LoadKernels({Kernel(Route, route_shared_bytes), Kernel(LayOut), Kernel(Pack<uint4>),
                      Kernel(Pack<uint32_t>), Kernel(Pack<uint16_t>)});
}

cudaError_t LaunchDispatchSend(const Context& c, const DispatchSendArrays& arrays,
                               const Launch& launch) {
  const RouteShape shape(c.tokens, c.num_experts + c.num_ranks);
  Route<<<shape.blocks, kRouteThreads, shape.shared_bytes, launch.stream>>>(c, arrays,
                                                                            shape.rows_per_block);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  return LaunchPack(c, arrays.x, arrays.places, arrays.send_counts, launch);
}

cudaError_t LaunchDispatchSendCached(const Context& c, const DispatchSendCachedArrays& arrays,
                                     const Launch& launch) {
  LayOut<<<launch.BlocksForItems(int64_t{c.tokens} * c.places_per_row), kThreads, 0,
           launch.stream>>>(c, arrays);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  return LaunchPack(c, arrays.x, arrays.places, arrays.send_counts, launch);
}

}  // namespace smfree::cuda
