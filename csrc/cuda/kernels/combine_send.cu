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
// In hierarchical mode the message goes to the relay of s, with the same rows, and this rank is the
// relay of others: combine_relay.cu ends the phase.
//
// Launch: kThreads threads. LayOut: any number of blocks. Pack: no more than kBlocksPerSm per SM
// (BlocksFor), so that all are resident: a block waits until another has handed over the chunk
// before its own.
//
// Byte floor: one row read per copy, sum(recv_counts) * row_bytes written.
#include "csrc/cuda/host/kernels.h"
#include "csrc/cuda/kernels/sums.cuh"

namespace smfree::cuda {
namespace {

__global__ void LayOut(const KernelParams params, const CombineSendArrays a) {
  const GroupConstants& g = params.g;
  const LanePointers& lane = params.lane;
  const OperationParams& op = params.op;
  NoteBegin(lane);
  const Begun begun = BeginSendPhase(g, lane, op);
  if (!begun.ok) return;
  const Messages messages{g, lane, op, g.nodes.FirstLeg(Operation::kCombine), begun.number};
  WriteHeaders(messages, a.recv_counts);
  const auto thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const auto threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t slots_per_peer = int64_t{op.tokens} * g.top_k;
  for (int64_t at = thread; at < g.num_ranks * slots_per_peer; at += threads) {
    const auto peer = static_cast<int32_t>(at / slots_per_peer);
    const int64_t slot = at % slots_per_peer;
    const int32_t rows = a.recv_counts[peer];
    if (slot / g.top_k >= rows || rows > op.tokens) continue;
    const int32_t n = a.rows[at];
    if (n < -1 || n >= a.rows_capacity) {
      Report(g, op, FaultKind::kInvalidArgument, begun.number, {peer, -1, a.rows_capacity - 1, n});
    } else if (op.slots) {
      char* const message = messages.To(peer) + g.layout.header_bytes;
      auto* const slots = reinterpret_cast<float*>(message + LayoutOf(g, op, rows).slots_offset);
      slots[slot] = n < 0 ? 0.0f : a.values[n];
    }
  }
}

template <typename T, typename Word>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    Pack(const KernelParams params, const CombineSendArrays a) {
  const GroupConstants& g = params.g;
  const LanePointers& lane = params.lane;
  const OperationParams& op = params.op;
  __shared__ Sums sums;
  const Begun begun = BeginSendPhase(g, lane, op);
  const Messages messages{g, lane, op, g.nodes.FirstLeg(Operation::kCombine), begun.number};
  if (begun.ok) {
    const int32_t warp_lane = static_cast<int32_t>(threadIdx.x) % kWarp;
    unsigned long long copies_read = 0;
    sums.Pack<T, Word>(
        messages, a.recv_counts, [&](int32_t source, int32_t row, int32_t piece, Term* terms) {
          const int64_t first_slot = (int64_t{source} * op.tokens + row) * g.top_k;
          const int32_t n = warp_lane < g.top_k ? a.rows[first_slot + warp_lane] : -1;
          const uint32_t mask = __ballot_sync(~0u, n >= 0);
          if (n >= 0) {
            terms[__popc(mask & ((1u << warp_lane) - 1))] = {
                static_cast<const char*>(a.y) + n * g.x_row_bytes, a.w ? a.w[n] : 1.0f};
          }
          if (piece == 0) copies_read += __popc(mask);
          return __popc(mask);
        });
    if (warp_lane == 0 && copies_read) atomicAdd(&lane.scratch->copies, copies_read);
  }
  if (!IsLastBlock(lane) || threadIdx.x != 0 || g.nodes.hierarchical) return;
  int64_t wire_rows = 0;
  for (int32_t peer = 0; peer < g.num_ranks; ++peer) wire_rows += a.recv_counts[peer];
  const bool ok = begun.ok && !Faulted(g);
  if (ok) NoteInternode(messages, a.recv_counts);
  EndPhase(g, lane, op, begun, ok, wire_rows,
           static_cast<int64_t>(lane.scratch->copies) * g.x_row_bytes, wire_rows * g.x_row_bytes);
}

constexpr auto kPack = [](auto element, auto word) {
  return Pack<decltype(element), decltype(word)>;
};

}  // namespace

cudaError_t LoadCombineSend() {
  const cudaError_t error = LoadKernels({Kernel(LayOut)});
  return error == cudaSuccess ? LoadKernelsFor(kPack) : error;
}

cudaError_t LaunchCombineSend(const KernelParams& k, const CombineSendArrays& arrays,
                              const LaunchParams& launch) {
  const int64_t slots = int64_t{k.g.num_ranks} * k.op.tokens * k.g.top_k;
  const cudaError_t error =
      LaunchKernel(LayOut, launch.BlocksForItems(slots), kThreads, 0, launch.stream, k, arrays);
  if (error != cudaSuccess) return error;
  const int64_t rows = int64_t{k.g.num_ranks} * k.op.tokens * k.op.pieces;
  const auto kernel = KernelFor(launch.dtype, WordBytes(k.g), kPack);
  return LaunchKernel(kernel, launch.BlocksFor(rows), kThreads, 0, launch.stream, k, arrays);
}

}  // namespace smfree::cuda
