// SPDX-License-Identifier: Apache-2.0
//
// combine_recv: for each row t, over its places d * T + i, ascending in d:
//
//   out[t]   = sum of row i of the message from d, and add[t]    float32, rounded once
//              NaN where d has not kept the row or, under Overflow::kDrop, without it
//   slots[t] = sum of its slots                                  float32
//
// Gather  S7 – S10  a warp per piece of a row t, in the order of t, which is the order in which the
//                   rows of every message arrive: waits for the chunks that it needs.
//
// In hierarchical mode d is a node, and PlaceOnWire says which places that are.
//
// Launch: kThreads threads. PlaceOnWire: a block per kPlacedRows rows. Gather: any number of blocks
// up to kBlocksPerSm per SM (BlocksFor): they wait for peers, so puts need room (far_peers.h).
//
// Byte floor: sum(send_counts) rows of messages read, and add; T rows of the program written.
#include "csrc/cuda/host/kernels.h"
#include "csrc/cuda/kernels/arrivals.cuh"
#include "csrc/cuda/kernels/packing.cuh"
#include "csrc/cuda/kernels/places.cuh"
#include "csrc/cuda/kernels/row_kinds.cuh"

namespace smfree::cuda {
namespace {

// slots[t] = value for every slot.
__device__ void FillSlots(const GroupConstants& g, const CombineRecvArrays& a, int32_t t,
                          float value) {
  for (int32_t k = threadIdx.x % kWarp; a.slots && k < g.top_k; k += kWarp) {
    a.slots[int64_t{t} * g.top_k + k] = value;
  }
}

// Whether no message has more rows than the handle says, the same in all threads of a block.
__device__ bool AtMost(const Messages& m, const int32_t* counts, const int32_t* num_rows) {
  bool ok = true;
  for (int32_t region = threadIdx.x; region < m.count(); region += blockDim.x) {
    if (num_rows[region] <= counts[region]) continue;
    ok = false;
    Report(m.g, m.op, FaultKind::kScheduleMismatch, m.number,
           {m.Peer(region), -1, counts[region], num_rows[region], HeaderOf(m, region)});
  }
  return __syncthreads_and(ok);
}

template <typename Rows>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    Gather(const __grid_constant__ KernelParams params,
           const __grid_constant__ CombineRecvArrays a) {
  const GroupConstants& g = params.g;
  const OperationParams& op = params.op;
  __shared__ int32_t num_rows[kMaxRanks];
  __shared__ int64_t payload_at[kMaxRanks];  // of what is received
  __shared__ Incoming incoming[kMaxRanks];
  __shared__ Arrivals arrivals;
  __shared__ Term terms[kWarps][kMaxTopK + 1];  // and one to add
  __shared__ const float* values[kWarps][kMaxTopK];
  const bool nothing_sent = NothingWasSent(op);
  const Begun begun = BeginRecvPhase(g, op, params.sets);
  const SetPointers set = params.sets.At(begun.set);
  if (!g.nodes.hierarchical) NoteBegin(set);
  const WirePlaces wire(g, set, a.places, a.send_counts);
  const Messages messages{
      g, set, op, kWire, begun.number, set.scratch->packed_at[kWire], payload_at};
  const int32_t warp = static_cast<int32_t>(threadIdx.x) / kWarp;
  const int32_t warp_lane = static_cast<int32_t>(threadIdx.x) % kWarp;
  const int32_t units = op.tokens * op.pieces;
  const int32_t stride = static_cast<int32_t>(gridDim.x) * kWarps;
  int32_t unit = static_cast<int32_t>(blockIdx.x) * kWarps + warp;
  const auto place_of_thread = [&] {
    return unit < units && warp_lane < g.wire_width
               ? wire.places[int64_t{unit / op.pieces} * g.wire_width + warp_lane]
               : -1;
  };
  int32_t place_here = place_of_thread();  // far away: before the messages are waited for
  // A rank, or a relay, that may not have kept all rows returns fewer.
  const bool all_return = int64_t{g.num_ranks} * op.tokens <= op.wire_rows;
  bool ok = begun.ok &&
            OpenMessages(messages, all_return ? wire.counts : nullptr, num_rows, arrivals);
  if (ok && !all_return) ok = AtMost(messages, wire.counts, num_rows);
  if (ok && op.in_areas) {
    if (threadIdx.x < kWarp) {
      (void)LayOutMessages(messages, num_rows, nullptr, payload_at,
                           [&](int32_t region) { return messages.IsOwn(region); });
    }
    __syncthreads();
  }
  for (int32_t region = threadIdx.x; ok && region < messages.count(); region += blockDim.x) {
    incoming[region] = IncomingFrom(messages, region, num_rows[region], 0);
  }
  __syncthreads();

  for (; unit < units; unit += stride, place_here = place_of_thread()) {
    const int32_t t = unit / op.pieces;
    const int32_t piece = unit % op.pieces;
    const int32_t place = ok ? place_here : -1;
    const int32_t region = place / op.tokens;
    const int32_t row = place % op.tokens;
    const int32_t before = __shfl_up_sync(~0u, place, 1);
    const bool ascends = warp_lane == 0 || (before >= 0 && before < place);
    const bool broken = place != -1 && (place < 0 || !ascends || region >= messages.count() ||
                                        row >= (all_return ? num_rows : wire.counts)[region]);
    const uint32_t broken_places = __ballot_sync(~0u, broken);
    bool here = ok && broken_places == 0;
    if (broken && (broken_places & ((1u << warp_lane) - 1)) == 0) {  // the first one
      Report(g, op, FaultKind::kInvalidArgument, begun.number, {-1, t, op.tokens, place});
    }
    const bool returned = here && place != -1 && row < num_rows[region];
    const uint32_t terms_here = __ballot_sync(~0u, returned);
    if (returned) {
      const Chunks chunks(num_rows[region], op.chunks);
      const int32_t wanted = ChunksThrough(chunks.Of(row), chunks.count);
      here = WaitForChunks(messages, region, wanted, arrivals);
      const int32_t term = __popc(terms_here & ((1u << warp_lane) - 1));
      terms[warp][term] = {incoming[region].rows + row * op.stride, 1.0f, 0};
      values[warp][term] = incoming[region].slots + int64_t{row} * g.top_k;
    }
    const int32_t count = __popc(terms_here);
    here = __all_sync(~0u, here);
    const bool is_lost = !g.drop_overflow && __any_sync(~0u, place != -1 && !returned);
    __syncwarp();  // what one thread has waited for, all may read
    const bool is_nan = !nothing_sent && (!here || is_lost);  // a row is right, or NaN
    if (is_nan || (count == 0 && a.add.format.count == 0)) {
      Rows::Fill(op, piece, op.pieces, a.out, t, is_nan ? kNaNs : kZeros);
    } else {
      Rows::SumToProgram(op, piece, a.add, a.out, t, terms[warp], count);
    }
    if (!here) {
      FillSlots(g, a, t, __uint_as_float(nothing_sent ? kZeros : kNaNs));
    } else {
      for (int32_t k = warp_lane; a.slots && piece == 0 && k < g.top_k; k += kWarp) {
        float sum = 0.0f;
        for (int32_t p = 0; p < count; ++p) sum = __fadd_rn(sum, __ldcg(values[warp][p] + k));
        a.slots[int64_t{t} * g.top_k + k] = sum;
      }
    }
    __syncwarp();
  }
  if (!IsLastBlock(set) || threadIdx.x != 0) return;
  int64_t wire_rows = 0;
  for (int32_t r = 0; ok && r < messages.count(); ++r) wire_rows += num_rows[r];
  const int64_t added_rows = a.add.format.count > 0 ? op.tokens : 0;
  const Ending ending(g, set);
  EndPhase(g, set, op, begun, ending, ok && !ending.faulted, wire_rows,
           wire_rows * op.stride + added_rows * op.row_bytes, op.tokens * op.row_bytes);
}

constexpr auto kGather = [](auto rows) { return Gather<decltype(rows)>; };

}  // namespace

cudaError_t LoadCombineRecv() {
  const cudaError_t error = LoadKernels({Kernel(PlaceOnWire)});
  return error == cudaSuccess ? LoadKernelsFor(kGather) : error;
}

cudaError_t LaunchCombineRecv(const KernelParams& k, const CombineRecvArrays& arrays,
                              const LaunchParams& launch) {
  if (k.g.nodes.hierarchical) {
    const cudaError_t error = LaunchKernel(PlaceOnWire, LaunchParams::BlocksForPlaces(k.op.tokens),
                                           kThreads, 0, launch.stream, k, arrays.places);
    if (error != cudaSuccess) return error;
  }
  return LaunchKernel(KernelFor(arrays.out.format, kGather),
                      launch.BlocksFor(int64_t{k.op.tokens} * k.op.pieces), kThreads, 0,
                      launch.stream, k, arrays);
}

}  // namespace smfree::cuda
