// SPDX-License-Identifier: Apache-2.0
//
// combine_recv: for each row t, over its places d * T + i, ascending in d:
//
//   out[t]   = sum of row i of the message from d        float32, rounded once
//   slots[t] = sum of its slots                          float32
//
// Gather  S7 – S10  a warp per piece of a row t, in the order of t, which is the order in which the
//                   rows of every message arrive: waits for the chunks that it needs.
//
// In hierarchical mode d is a node, and PlaceOnWire says which places that are.
//
// Launch: kThreads threads. PlaceOnWire: a block per kPlacedRows rows. Gather: any number of blocks
// up to kBlocksPerSm per SM (BlocksFor): they wait for peers, so puts need room (far_peers.h).
//
// Byte floor: sum(send_counts) * row_bytes read, T * row_bytes written.
#include "csrc/cuda/host/kernels.h"
#include "csrc/cuda/kernels/places.cuh"
#include "csrc/cuda/kernels/rows.cuh"

namespace smfree::cuda {
namespace {

struct GatherArrays {
  WirePlaces wire;
  char* out;
  float* slots;  // may be null
};

// slots[t] = value for every slot.
__device__ void FillSlots(const GroupConstants& g, const GatherArrays& a, int32_t t, float value) {
  for (int32_t k = threadIdx.x % kWarp; a.slots && k < g.top_k; k += kWarp) {
    a.slots[int64_t{t} * g.top_k + k] = value;
  }
}

template <typename T, typename Word>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    Gather(const KernelParams params, const GatherArrays a) {
  const GroupConstants& g = params.g;
  const LanePointers& lane = params.lane;
  const OperationParams& op = params.op;
  __shared__ int32_t num_rows[kMaxRanks];
  __shared__ Arrivals arrivals;
  __shared__ Term terms[kWarps][kMaxTopK];
  __shared__ const float* values[kWarps][kMaxTopK];
  const float nan = __int_as_float(0x7fc00000);
  const bool nothing_sent = NothingWasSent(op);
  if (!g.nodes.hierarchical) NoteBegin(lane);
  const Begun begun = nothing_sent ? Begun{false, kNoOperation} : BeginRecvPhase(g, lane, op);
  const Messages messages{g, lane, op, kWire, begun.number};
  const bool ok = begun.ok && OpenMessages(messages, a.wire.counts, num_rows, arrivals);

  const int32_t warp = static_cast<int32_t>(threadIdx.x) / kWarp;
  const int32_t warp_lane = static_cast<int32_t>(threadIdx.x) % kWarp;
  for (int32_t unit = static_cast<int32_t>(blockIdx.x) * kWarps + warp;
       unit < op.tokens * op.pieces; unit += static_cast<int32_t>(gridDim.x) * kWarps) {
    const int32_t t = unit / op.pieces;
    const int32_t piece = unit % op.pieces;
    const Words words(g.x_row_bytes, sizeof(Word), piece, op.pieces);
    char* const out = a.out + t * g.x_row_bytes;
    const int32_t place =
        ok && warp_lane < g.wire_width ? a.wire.places[int64_t{t} * g.wire_width + warp_lane] : -1;
    const int32_t region = place / op.tokens;
    const int32_t row = place % op.tokens;
    const int32_t before = __shfl_up_sync(~0u, place, 1);
    const bool ascends = warp_lane == 0 || (before >= 0 && before < place);
    const bool broken = place != -1 && (place < 0 || !ascends || region >= messages.count() ||
                                        row >= num_rows[region]);
    const uint32_t broken_places = __ballot_sync(~0u, broken);
    bool here = ok && broken_places == 0;
    if (broken && (broken_places & ((1u << warp_lane) - 1)) == 0) {  // the first one
      Report(g, op, FaultKind::kInvalidArgument, begun.number, {-1, t, op.tokens, place});
    }
    if (here && place != -1) {
      const Chunks chunks(num_rows[region], op.chunks);
      const int32_t wanted = ChunksThrough(chunks.Of(row), chunks.count);
      here = WaitForChunks(messages, region, wanted, arrivals);
      const char* const message = messages.From(region) + g.layout.header_bytes;
      const MessageLayout layout = LayoutOf(g, op, num_rows[region]);
      terms[warp][warp_lane] = {message + layout.rows_offset + row * g.layout.row_bytes, 1.0f};
      values[warp][warp_lane] =
          reinterpret_cast<const float*>(message + layout.slots_offset) + int64_t{row} * g.top_k;
    }
    const int32_t count = __popc(__ballot_sync(~0u, place >= 0));
    here = __all_sync(~0u, here);
    __syncwarp();  // what one thread has waited for, all may read
    if (nothing_sent) {
      FillRow(words, out, Zeros<Word>());
      FillSlots(g, a, t, 0.0f);
    } else if (!here) {  // a row is right, or NaN
      FillRow(words, out, NaNs<T, Word>());
      FillSlots(g, a, t, nan);
    } else {
      SumRows<T, Word>(words, out, terms[warp], count);
      for (int32_t k = warp_lane; a.slots && piece == 0 && k < g.top_k; k += kWarp) {
        float sum = 0.0f;
        for (int32_t p = 0; p < count; ++p) sum = __fadd_rn(sum, __ldcg(values[warp][p] + k));
        a.slots[int64_t{t} * g.top_k + k] = sum;
      }
    }
    __syncwarp();
  }
  if (!IsLastBlock(lane) || threadIdx.x != 0) return;
  int64_t wire_rows = 0;
  for (int32_t r = 0; ok && r < messages.count(); ++r) wire_rows += num_rows[r];
  EndPhase(g, lane, op, begun, ok && !Faulted(g), wire_rows, wire_rows * g.x_row_bytes,
           op.tokens * g.x_row_bytes);
}

constexpr auto kGather = [](auto element, auto word) {
  return Gather<decltype(element), decltype(word)>;
};

}  // namespace

cudaError_t LoadCombineRecv() {
  const cudaError_t error = LoadKernels({Kernel(PlaceOnWire)});
  return error == cudaSuccess ? LoadKernelsFor(kGather) : error;
}

cudaError_t LaunchCombineRecv(const KernelParams& k, const CombineRecvArrays& arrays,
                              const LaunchParams& launch) {
  const GatherArrays gather{WirePlaces(k.g, k.lane, arrays.places, arrays.send_counts),
                            static_cast<char*>(arrays.out), arrays.slots};
  if (k.g.nodes.hierarchical) {
    const cudaError_t error = LaunchKernel(PlaceOnWire, LaunchParams::BlocksForPlaces(k.op.tokens),
                                           kThreads, 0, launch.stream, k, arrays.places);
    if (error != cudaSuccess) return error;
  }
  const auto kernel = KernelFor(launch.dtype, WordBytes(k.g), kGather);
  return LaunchKernel(kernel, launch.BlocksFor(int64_t{k.op.tokens} * k.op.pieces), kThreads, 0,
                      launch.stream, k, gather);
}

}  // namespace smfree::cuda
