// SPDX-License-Identifier: Apache-2.0
//
// combine_send: to source s, for its i-th row here, the b-th of all, with n = rows[b,k]:
//
//   message to s, row i = sum over k ascending of w[n] * y[n], in float32, rounded once, to the wire;
//                         NaN or, under Overflow::kDrop, zero without any n
//   slots: values[n], or 0 without n
//
// LayOut  S1, S2  headers and slots.
// Pack    S3, S4  a warp per piece of a row: reads its terms once, writes their sum. A block takes
//                 a tile of rows, one piece per warp, and counts the tile when it is written.
//
// LayOutAndPack  S1 – S6  in place of both for small operations (small.h): rows in their order, a
//                         warp per piece. The last block raises all signals.
//
// In hierarchical mode the message goes to the relay of s, with the same rows, and this rank is the
// relay of others: combine_relay.cu ends the phase.
//
// Launch: kThreads threads. LayOut: any number of blocks, PackingBytes of shared memory. Pack: no
// more than kBlocksPerSm per SM (BlocksFor), so that all are resident: a block waits until another
// has handed over the chunk before its own. LayOutAndPack: any number of blocks.
//
// Byte floor: one row of the program read per copy, sum(recv_counts) rows of messages written.
#include "csrc/cuda/host/kernels.h"
#include "csrc/cuda/kernels/sums.cuh"

namespace smfree::cuda {
namespace {

// Whether a dispatch can have made n = rows[b,k].
__device__ bool IsRow(const CombineSendArrays& a, int32_t n) {
  return n >= -1 && n < a.rows_capacity;
}
__device__ void ReportBroken(const Messages& m, const CombineSendArrays& a, int32_t row,
                             int32_t n) {
  Report(m.g, m.op, FaultKind::kInvalidArgument, m.number,
         {MessageAmong(a.recv_counts, m.g.num_ranks, row), -1, a.rows_capacity - 1, n});
}

// The terms of a row of a message, in the order of slots: thread k of the warp knows n of slot k.
// All get their number.
template <typename Rows>
__device__ int32_t FindTerms(const OperationParams& op, const CombineSendArrays& a, int32_t n,
                             Term* terms) {
  const auto warp_lane = static_cast<int32_t>(threadIdx.x) % kWarp;
  const uint32_t mask = __ballot_sync(~0u, n >= 0);
  if (n >= 0) {
    terms[__popc(mask & ((1u << warp_lane) - 1))] =
        Rows::TermOf(op, a.y, n, a.w ? a.w[n] : 1.0f);
  }
  return __popc(mask);
}

__global__ void LayOut(const __grid_constant__ KernelParams params,
                       const __grid_constant__ CombineSendArrays a) {
  const GroupConstants& g = params.g;
  const OperationParams& op = params.op;
  const Begun begun = BeginSendPhase(g, op, params.sets);
  const SetPointers set = params.sets.At(begun.set);
  NoteBegin(set);
  if (!begun.ok) return;
  extern __shared__ Packing packing[];  // one, or none
  const Messages messages{g, set, op, g.nodes.FirstLeg(Operation::kCombine), begun.number,
                          packing->payload_at};
  const auto thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const auto threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t slots = int64_t{op.wire_rows} * g.top_k;
  int32_t n = thread < slots ? a.rows[thread] : -1;  // far away: early
  if (!PlanPacking(messages, a.recv_counts, /*by_rank=*/nullptr, op.wire_rows,
                   NeedsPacking(op) ? packing : nullptr)) {
    return;
  }
  for (int64_t at = thread; at < slots; at += threads) {
    if (at != thread) n = a.rows[at];  // -1 past the last row
    if (!IsRow(a, n)) ReportBroken(messages, a, static_cast<int32_t>(at / g.top_k), n);
  }
  WriteHeaders(messages, a.recv_counts);
  if (!op.slots) return;
  const int32_t last = g.num_ranks - 1;
  const int32_t* const first_row = packing->first_row;
  const int32_t num_rows = first_row[last] + a.recv_counts[last];
  for (int64_t at = thread; at < int64_t{num_rows} * g.top_k; at += threads) {
    const auto row = static_cast<int32_t>(at / g.top_k);
    const int32_t peer = MessageOf(first_row, g.num_ranks, row);
    const int64_t slot = at - int64_t{first_row[peer]} * g.top_k;
    n = a.rows[at];
    SlotsTo(messages, peer, a.recv_counts[peer])[slot] =
        n < 0 || n >= a.rows_capacity ? 0.0f : a.values[n];
  }
}

template <typename Rows>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    Pack(const __grid_constant__ KernelParams params, const __grid_constant__ CombineSendArrays a) {
  const GroupConstants& g = params.g;
  const OperationParams& op = params.op;
  __shared__ Sums sums;
  const Begun begun = BeginSendPhase(g, op, params.sets);
  const SetPointers set = params.sets.At(begun.set);
  const Leg leg = g.nodes.FirstLeg(Operation::kCombine);
  const Messages messages{g, set, op, leg, begun.number, set.scratch->packed_at[leg]};
  if (begun.ok) {
    const int32_t warp_lane = static_cast<int32_t>(threadIdx.x) % kWarp;
    unsigned long long copies_read = 0;
    sums.Pack(
        messages, a.recv_counts,
        [&](int32_t source, int32_t row, int32_t piece, Term* terms) {
          const int64_t first_slot = (int64_t{sums.first_row[source]} + row) * g.top_k;
          const int32_t n = warp_lane < g.top_k ? a.rows[first_slot + warp_lane] : -1;
          const int32_t count = FindTerms<Rows>(op, a, n, terms);
          if (piece == 0) copies_read += count;
          return count;
        },
        [&](int32_t piece, const Term* terms, int32_t count, char* out) {
          Rows::SumToMessage(op, piece, a.y, terms, count, out);
        });
    if (warp_lane == 0 && copies_read) atomicAdd(&set.scratch->copies, copies_read);
  }
  if (!IsLastBlock(set) || threadIdx.x != 0 || g.nodes.hierarchical) return;
  int64_t wire_rows = 0;
  for (int32_t peer = 0; peer < g.num_ranks; ++peer) wire_rows += a.recv_counts[peer];
  const Ending ending(g, set);
  const bool ok = begun.ok && !ending.faulted;
  if (ok) NoteInternode(messages, a.recv_counts);
  EndPhase(g, set, op, begun, ending, ok, wire_rows,
           static_cast<int64_t>(set.scratch->copies) * op.row_bytes, wire_rows * op.stride);
}

template <typename Rows>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    LayOutAndPack(const __grid_constant__ KernelParams params,
                  const __grid_constant__ CombineSendArrays a) {
  const GroupConstants& g = params.g;
  const OperationParams& op = params.op;
  __shared__ Packing packing;
  __shared__ Outgoing outgoing[kMaxRanks];
  __shared__ Term terms[kWarps][kMaxTopK];
  const int32_t warp = static_cast<int32_t>(threadIdx.x) / kWarp;
  const int32_t warp_lane = static_cast<int32_t>(threadIdx.x) % kWarp;
  const int32_t units = op.wire_rows * op.pieces;
  const int32_t stride = static_cast<int32_t>(gridDim.x) * kWarps;
  int32_t unit = static_cast<int32_t>(blockIdx.x) * kWarps + warp;
  const auto copy_of_thread = [&] {  // -1 past the last row of the messages
    return unit < units && warp_lane < g.top_k
               ? a.rows[int64_t{unit / op.pieces} * g.top_k + warp_lane]
               : -1;
  };
  int32_t n = copy_of_thread();  // far away: early
  const Begun begun = BeginSendPhase(g, op, params.sets);
  const SetPointers set = params.sets.At(begun.set);
  NoteBegin(set);
  const Messages messages{g, set, op, kWire, begun.number};
  bool ok = begun.ok && PlanPacking(messages, a.recv_counts, /*by_rank=*/nullptr, op.wire_rows,
                                    &packing);
  int32_t num_rows = 0;
  if (ok) {
    WriteHeaders(messages, a.recv_counts);
    for (int32_t peer = threadIdx.x; peer < g.num_ranks; peer += blockDim.x) {
      outgoing[peer] = OutgoingTo(messages, peer, a.recv_counts[peer]);
    }
    __syncthreads();
    const int32_t last = g.num_ranks - 1;
    num_rows = packing.first_row[last] + outgoing[last].chunks.rows;
    uint32_t copies_read = 0;
    for (; unit < units; unit += stride, n = copy_of_thread()) {
      const int32_t row = unit / op.pieces;
      const int32_t piece = unit % op.pieces;
      if (!IsRow(a, n)) {
        ReportBroken(messages, a, row, n);
        n = -1;
      }
      if (row >= num_rows) continue;
      const int32_t peer = MessageOf(packing.first_row, g.num_ranks, row);
      const int32_t position = row - packing.first_row[peer];
      char* const out = outgoing[peer].first_row + position * op.stride;
      if (op.slots && piece == 0 && warp_lane < g.top_k) {
        SlotsTo(messages, peer, outgoing[peer].chunks.rows)[position * g.top_k + warp_lane] =
            n < 0 ? 0.0f : a.values[n];
      }
      const int32_t count = FindTerms<Rows>(op, a, n, terms[warp]);
      if (piece == 0) copies_read += count;
      __syncwarp();
      if (count == 0) {
        FillMessageRow(op, piece, out, g.drop_overflow ? kZeros : kNaNs);
      } else {
        Rows::SumToMessage(op, piece, a.y, terms[warp], count, out);
      }
      __syncwarp();
    }
    if (warp_lane == 0 && copies_read) {
      atomicAdd(&set.scratch->copies, static_cast<unsigned long long>(copies_read));
    }
  }
  if (!IsLastBlock(set)) return;
  const Ending ending(g, set);
  ok = ok && !ending.faulted;
  if (ok) HandOverAll(messages);
  if (threadIdx.x != 0) return;
  EndPhase(g, set, op, begun, ending, ok, num_rows,
           static_cast<int64_t>(set.scratch->copies) * op.row_bytes, num_rows * op.stride);
}

constexpr auto kPack = [](auto rows) { return Pack<decltype(rows)>; };
constexpr auto kLayOutAndPack = [](auto rows) { return LayOutAndPack<decltype(rows)>; };

}  // namespace

cudaError_t LoadCombineSend() {
  cudaError_t error = LoadKernels({Kernel(LayOut)});
  if (error == cudaSuccess) error = LoadKernelsFor(kPack);
  return error == cudaSuccess ? LoadKernelsFor(kLayOutAndPack) : error;
}

cudaError_t LaunchCombineSend(const KernelParams& k, const CombineSendArrays& arrays,
                              const LaunchParams& launch) {
  const int64_t rows = int64_t{k.op.wire_rows} * k.op.pieces;
  if (launch.fused) {
    return LaunchKernel(KernelFor(arrays.y.format, kLayOutAndPack), launch.BlocksFor(rows),
                        kThreads, 0, launch.stream, k, arrays);
  }
  const int64_t slots = int64_t{k.op.wire_rows} * k.g.top_k;
  const cudaError_t error = LaunchKernel(LayOut, launch.BlocksForItems(slots), kThreads,
                                         PackingBytes(k.op), launch.stream, k, arrays);
  if (error != cudaSuccess) return error;
  return LaunchKernel(KernelFor(arrays.y.format, kPack), launch.BlocksFor(rows), kThreads, 0,
                      launch.stream, k, arrays);
}

}  // namespace smfree::cuda
