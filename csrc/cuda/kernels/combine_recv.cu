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
// Byte floor: sum(send_counts) * row_bytes read, T * row_bytes written.
#include "csrc/cuda/host/launch.h"
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
__device__ void FillSlots(const Context& c, const GatherArrays& a, int32_t t, float value) {
  for (int32_t k = threadIdx.x % kWarp; a.slots && k < c.top_k; k += kWarp) {
    a.slots[int64_t{t} * c.top_k + k] = value;
  }
}

template <typename T, typename Word>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    Gather(const Context c, const GatherArrays a) {
  __shared__ int32_t num_rows[kMaxRanks];
  __shared__ Arrivals arrivals;
  __shared__ Term terms[kWarps][kMaxTopK];
  __shared__ const float* values[kWarps][kMaxTopK];
  const float nan = __int_as_float(0x7fc00000);
  const bool nothing_sent = NothingWasSent(c);
  if (!c.nodes.hierarchical) NoteBegin(c);
  const Begun begun = nothing_sent ? Begun{false, kNoOperation} : BeginRecvPhase(c);
  const Messages messages{c, kWire, begun.number};
  const bool ok = begun.ok && OpenMessages(messages, a.wire.counts, num_rows, arrivals);

  const int32_t warp = static_cast<int32_t>(threadIdx.x) / kWarp;
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % kWarp;
  for (int32_t unit = static_cast<int32_t>(blockIdx.x) * kWarps + warp;
       unit < c.tokens * c.pieces; unit += static_cast<int32_t>(gridDim.x) * kWarps) {
    const int32_t t = unit / c.pieces;
    const int32_t piece = unit % c.pieces;
    const Words words(c.x_row_bytes, sizeof(Word), piece, c.pieces);
    char* const out = a.out + t * c.x_row_bytes;
    const int32_t place =
        ok && lane < c.wire_width ? a.wire.places[int64_t{t} * c.wire_width + lane] : -1;
    const int32_t region = place / c.tokens;
    const int32_t row = place % c.tokens;
    const int32_t before = __shfl_up_sync(~0u, place, 1);
    const bool ascends = lane == 0 || (before >= 0 && before < place);
    const bool broken = place != -1 && (place < 0 || !ascends || region >= messages.count() ||
                                        row >= num_rows[region]);
    const uint32_t broken_lanes = __ballot_sync(~0u, broken);
    bool here = ok && broken_lanes == 0;
    if (broken && (broken_lanes & ((1u << lane) - 1)) == 0) {  // the first one
      Report(c, FaultKind::kInvalidArgument, begun.number, {-1, t, c.tokens, place});
    }
    if (here && place != -1) {
      const Chunks chunks(num_rows[region], c.chunks);
      const int32_t wanted = ChunksThrough(chunks.Of(row), chunks.count);
      here = WaitForChunks(messages, region, wanted, arrivals);
      const char* const message = messages.From(region) + c.layout.header_bytes;
      const MessageLayout layout = LayoutOf(c, num_rows[region]);
      terms[warp][lane] = {message + layout.rows_offset + row * c.layout.row_bytes, 1.0f};
      values[warp][lane] = reinterpret_cast<const float*>(message + layout.slots_offset) +
                           int64_t{row} * c.top_k;
    }
    const int32_t count = __popc(__ballot_sync(~0u, place >= 0));
    here = __all_sync(~0u, here);
    __syncwarp();  // what one lane has waited for, all may read
    if (nothing_sent) {
      FillRow(words, out, Zeros<Word>());
      FillSlots(c, a, t, 0.0f);
    } else if (!here) {  // a row is right, or NaN
      FillRow(words, out, NaNs<T, Word>());
      FillSlots(c, a, t, nan);
    } else {
      SumRows<T, Word>(words, out, terms[warp], count);
      for (int32_t k = lane; a.slots && piece == 0 && k < c.top_k; k += kWarp) {
        float sum = 0.0f;
        for (int32_t p = 0; p < count; ++p) sum = __fadd_rn(sum, __ldcg(values[warp][p] + k));
        a.slots[int64_t{t} * c.top_k + k] = sum;
      }
    }
    __syncwarp();
  }
  if (!IsLastBlock(c) || threadIdx.x != 0) return;
  int64_t wire_rows = 0;
  for (int32_t r = 0; ok && r < messages.count(); ++r) wire_rows += num_rows[r];
  EndPhase(c, begun, ok && !Faulted(c), wire_rows, wire_rows * c.x_row_bytes,
           c.tokens * c.x_row_bytes);
}

constexpr auto kGather = [](auto element, auto word) {
  return Gather<decltype(element), decltype(word)>;
};

}  // namespace

cudaError_t LoadCombineRecv() {
  const cudaError_t error = LoadKernels({Kernel(PlaceOnWire)});
  return error == cudaSuccess ? LoadKernelsFor(kGather) : error;
}

cudaError_t LaunchCombineRecv(const Context& c, const CombineRecvArrays& arrays,
                              const Launch& launch) {
  const GatherArrays gather{WirePlaces(c, arrays.places, arrays.send_counts),
                            static_cast<char*>(arrays.out), arrays.slots};
  if (c.nodes.hierarchical) {
    const cudaError_t error = LaunchKernel(PlaceOnWire, Launch::BlocksForPlaces(c.tokens), kThreads,
                                           0, launch.stream, c, arrays.places);
    if (error != cudaSuccess) return error;
  }
  const auto kernel = KernelFor(launch.dtype, WordBytes(c), kGather);
  return LaunchKernel(kernel, launch.BlocksFor(int64_t{c.tokens} * c.pieces), kThreads, 0,
                      launch.stream, c, gather);
}

}  // namespace smfree::cuda
