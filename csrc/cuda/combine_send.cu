// SPDX-License-Identifier: Apache-2.0
//
// combine_send: to source s, for its i-th row here, with n = rows[s,i,k]:
//
//   message to s, row i = sum over k ascending of w[n] * y[n]     float32, rounded once
//   slots: values[n], or 0 without n
//
// LayOut  S1, S2  headers and slots.
// Pack    S3, S4  a warp per piece of a row: reads its terms once, writes their sum. A block takes
//                 a tile of rows, one piece per warp, and counts the tile when it is
//                 written.
//
// Byte floor: one row read per copy, sum(recv_counts) * row_bytes written.
#include "csrc/cuda/launch.h"
#include "csrc/cuda/rows.cuh"

namespace smfree::cuda {
namespace {

__global__ void LayOut(const Context c, const CombineSendArrays a) {
  NoteBegin(c);
  const Begun begun = BeginSendPhase(c);
  if (!begun.ok) return;
  WriteHeaders(c, begun.number, a.recv_counts);
  const auto thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const auto threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t slots_per_peer = int64_t{c.tokens} * c.top_k;
  for (int64_t at = thread; at < c.num_ranks * slots_per_peer; at += threads) {
    const auto peer = static_cast<int32_t>(at / slots_per_peer);
    const int64_t slot = at % slots_per_peer;
    const int32_t rows = a.recv_counts[peer];
    if (slot / c.top_k >= rows || rows > c.tokens) continue;
    const int32_t n = a.rows[at];
    if (n < -1 || n >= a.rows_capacity) {
      Report(c, FaultKind::kInvalidArgument, begun.number, {peer, -1, a.rows_capacity, n});
    } else if (c.slots) {
      char* const message = MessageTo(c, begun.number, peer) + c.layout.header_bytes;
      auto* const slots = reinterpret_cast<float*>(message + LayoutOf(c, rows).slots_offset);
      slots[slot] = n < 0 ? 0.0f : a.values[n];
    }
  }
}

template <typename T, typename Word>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    Pack(const Context c, const CombineSendArrays a) {
  __shared__ Segments segments;
  __shared__ Outgoing outgoing[kMaxRanks];
  __shared__ int32_t num_rows[kMaxRanks];
  __shared__ Term terms[kWarps][kMaxTopK];
  __shared__ Rounds rounds;
  const Begun begun = BeginSendPhase(c);
  if (begun.ok) {
    for (int32_t peer = threadIdx.x; peer < c.num_ranks; peer += blockDim.x) {
      num_rows[peer] = a.recv_counts[peer];
      outgoing[peer] = OutgoingTo(c, begun.number, peer, num_rows[peer]);
    }
    __syncthreads();
    rounds.Clear();
    if (threadIdx.x < kWarp) segments.Build(c, num_rows, /*own_first=*/false);
    HandOverEmpty(c, begun.number, outgoing);
    __syncthreads();

    const int32_t warp = static_cast<int32_t>(threadIdx.x) / kWarp;
    const int32_t lane = static_cast<int32_t>(threadIdx.x) % kWarp;
    const int32_t tile_rows = kWarps / c.pieces;
    unsigned long long copies_read = 0;
    int32_t at = 0, tile_at = 0;  // segments of this warp's row and of the tile
    uint32_t round = 0;
    for (int32_t tile = static_cast<int32_t>(blockIdx.x) * tile_rows; tile < segments.rows;
         tile += static_cast<int32_t>(gridDim.x) * tile_rows, ++round) {
      rounds.Begin(round);
      const int32_t unit = tile + warp / c.pieces;
      const int32_t piece = warp % c.pieces;
      if (unit < segments.rows) {
        at = segments.Find(unit, at);
        const Segment& segment = segments.segment[at];
        const int32_t row = segment.row + unit - segment.first;
        const int64_t first_slot = (int64_t{segment.source} * c.tokens + row) * c.top_k;
        const int32_t n = lane < c.top_k ? a.rows[first_slot + lane] : -1;
        const uint32_t mask = __ballot_sync(~0u, n >= 0);
        if (n >= 0) {
          terms[warp][__popc(mask & ((1u << lane) - 1))] = {
              static_cast<const char*>(a.y) + n * c.x_row_bytes, a.w ? a.w[n] : 1.0f};
        }
        __syncwarp();
        SumRows<T, Word>(Words(c.x_row_bytes, sizeof(Word), piece, c.pieces),
                         outgoing[segment.source].rows + row * c.layout.row_bytes, terms[warp],
                         __popc(mask));
        if (piece == 0) copies_read += __popc(mask);
      }
      if (!rounds.End(round)) continue;
      tile_at = segments.Find(tile, tile_at);
      if (lane < tile_rows && tile + lane < segments.rows) {
        const Segment& segment = segments.segment[segments.Find(tile + lane, tile_at)];
        CountRow(c, begun.number, segment.source, outgoing[segment.source].chunks,
                 segment.row + tile + lane - segment.first);
      }
      __syncwarp();
    }
    if (lane == 0 && copies_read) atomicAdd(&c.scratch->copies, copies_read);
  }
  if (!IsLastBlock(c) || threadIdx.x != 0) return;
  int64_t wire_rows = 0;
  for (int32_t peer = 0; peer < c.num_ranks; ++peer) wire_rows += a.recv_counts[peer];
  EndPhase(c, begun, begun.ok && !Faulted(c), wire_rows,
           static_cast<int64_t>(c.scratch->copies) * c.x_row_bytes, wire_rows * c.x_row_bytes);
}

constexpr auto kPack = [](auto element, auto word) {
  return Pack<decltype(element), decltype(word)>;
};

}  // namespace

cudaError_t LoadCombineSend() {
  const cudaError_t error = LoadKernels({Kernel(LayOut)});
  return error == cudaSuccess ? LoadKernelsFor(kPack) : error;
}

cudaError_t LaunchCombineSend(const Context& c, const CombineSendArrays& arrays,
                              const Launch& launch) {
  LayOut<<<launch.BlocksForItems(int64_t{c.num_ranks} * c.tokens * c.top_k), kThreads, 0,
           launch.stream>>>(c, arrays);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  const int64_t rows = int64_t{c.num_ranks} * c.tokens * c.pieces;
  const auto kernel = KernelFor(launch.dtype, WordBytes(c), kPack);
  kernel<<<launch.BlocksFor(rows), kThreads, 0, launch.stream>>>(c, arrays);
  return cudaGetLastError();
}

}  // namespace smfree::cuda
