// SPDX-License-Identifier: Apache-2.0
//
// dispatch_recv: the rows of all sources, grouped by local expert.
//
//   rows[s,i,k] = n      the k-th slot of row i from source s is row n of x, or -1
//   x[n] = row i,  weights[n] = its slot k
//
// Place    S7, S8  waits for the first chunk of every source; from the counts in the headers, the
//                  first row of every (source, expert); from the CopyCodes, every n. Writes rows,
//                  group_sizes, recv_counts and num_dropped. Tags the rows that Scatter will write.
// Mark     S7, S8  in place of Place where rows are known.
// Scatter  S7, S9, S10  zeroes what has no tag; then, own rows first and chunk by chunk as they
//                  arrive, a warp per piece of a row: reads it once, writes it once per copy.
//
// Launch: kThreads threads, and no more blocks than kBlocksPerSm per SM: they wait for peers, and
// must leave room for puts (far_peers.h). Place: PlaceSharedBytes of shared memory.
//
// Byte floor: sum(recv_counts) * row_bytes read, N * row_bytes written; weighted: y read as well.
//
// In hierarchical mode the relay comes first (dispatch_relay.cu); the messages are then the same.
//
// The weighted form writes x[n] = w[n] * row i and values[n] = <y[n], row i>: the gradient of a
// combine.
#include <algorithm>

#include "csrc/cuda/kernels/dispatch_recv_place.cuh"
#include "csrc/cuda/host/kernels.h"
#include "csrc/cuda/kernels/row_order.cuh"
#include "csrc/cuda/kernels/rows.cuh"

namespace smfree::cuda {
namespace {

struct ScatterArrays {
  int32_t capacity;  // N
  const int32_t* rows;
  const char* y;   // weighted: both, else neither
  const float* w;
  char* x;
  float* values;  // may be null
};

// Rows [0, N) that `wanted(n)` picks = `word`, their values = `value`. A warp asks for 32 at once.
template <typename Word, typename Wanted>
__device__ void FillRows(const GroupConstants& g, const ScatterArrays& a, Word word, float value,
                         const Wanted& wanted) {
  const int32_t warp_lane = static_cast<int32_t>(threadIdx.x) % kWarp;
  const int32_t warp = static_cast<int32_t>(blockIdx.x * kWarps + threadIdx.x / kWarp);
  const int32_t warps = static_cast<int32_t>(gridDim.x) * kWarps;
  const Words words(g.x_row_bytes, sizeof(Word), 0, 1);
  // Neighbouring rows go to different warps: what is to be filled lies together at the end.
  for (int32_t base = 0; base < a.capacity; base += warps * kWarp) {
    const int32_t mine = base + warp_lane * warps + warp;
    uint32_t rows = __ballot_sync(~0u, mine < a.capacity && wanted(mine));
    for (; rows != 0; rows &= rows - 1) {
      const int32_t n = base + (__ffs(static_cast<int>(rows)) - 1) * warps + warp;
      FillRow(words, a.x + n * g.x_row_bytes, word);
      if (a.values && warp_lane == 0) a.values[n] = value;
    }
  }
}

// The rows of one message row in the expert-grouped array, in the order of slots: thread k of the
// warp knows slot k's. All get the count.
__device__ int32_t CopiesOf(int32_t n, int32_t* copies, int32_t* slots) {
  const auto warp_lane = static_cast<int32_t>(threadIdx.x % kWarp);
  const uint32_t mask = __ballot_sync(~0u, n >= 0);
  const int32_t at = __popc(mask & ((1u << warp_lane) - 1));
  if (n >= 0) {
    copies[at] = n;
    slots[at] = warp_lane;
  }
  __syncwarp();
  return __popc(mask);
}

template <typename T, typename Word, bool kWeighted>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    Scatter(const KernelParams params, const ScatterArrays a) {
  const GroupConstants& g = params.g;
  const LanePointers& lane = params.lane;
  const OperationParams& op = params.op;
  __shared__ RowOrder order;
  __shared__ Arrivals arrivals;
  __shared__ int32_t copies[kWarps][kMaxTopK], slots[kWarps][kMaxTopK];
  __shared__ char* targets[kWarps][kMaxTopK];
  const float nan = __int_as_float(0x7fc00000);
  const auto everything = [](int32_t) { return true; };
  const bool nothing_sent = NothingWasSent(op);
  const Begun begun = nothing_sent ? Begun{false, kNoOperation} : BeginRecvPhase(g, lane, op);
  const bool ok = begun.ok;
  const Messages messages{g, lane, op, g.nodes.LastLeg(Operation::kDispatch), begun.number};
  if (nothing_sent) {
    FillRows(g, a, Zeros<Word>(), 0.0f, everything);
  } else if (!ok || lane.scratch->overflowed) {
    FillRows(g, a, NaNs<T, Word>(), nan, everything);
  } else {
    const auto number = static_cast<uint32_t>(begun.number);
    FillRows(g, a, Zeros<Word>(), 0.0f,
             [&](int32_t n) { return __ldcg(lane.row_tags + n) != number; });
  }

  if (ok) {
    arrivals.Clear();
    if (threadIdx.x < kWarp) order.Build(messages, lane.scratch->source_rows, /*own_first=*/true);
    __syncthreads();
    const int32_t warp = static_cast<int32_t>(threadIdx.x) / kWarp;
    const int32_t warp_lane = static_cast<int32_t>(threadIdx.x) % kWarp;
    const bool write = !lane.scratch->overflowed;
    unsigned long long copies_written = 0;
    ArrivingRows arriving{messages, order, lane.scratch->source_rows, arrivals};
    for (int32_t unit = static_cast<int32_t>(blockIdx.x) * kWarps + warp;
         unit < order.num_rows * op.pieces; unit += static_cast<int32_t>(gridDim.x) * kWarps) {
      const int32_t piece = unit % op.pieces;
      const int32_t row = arriving.GoTo(unit / op.pieces);
      const int32_t source = arriving.region;
      const int64_t first_slot = (int64_t{source} * op.tokens + row) * g.top_k;
      const int32_t n = warp_lane < g.top_k && write ? a.rows[first_slot + warp_lane] : -1;
      const int32_t count = CopiesOf(n, copies[warp], slots[warp]);
      const Words words(g.x_row_bytes, sizeof(Word), piece, op.pieces);
      if (warp_lane < count) {
        targets[warp][warp_lane] = a.x + copies[warp][warp_lane] * g.x_row_bytes;
      }
      __syncwarp();
      const char* const message = messages.From(source) + g.layout.header_bytes;
      const MessageLayout layout = LayoutOf(g, op, lane.scratch->source_rows[source]);
      const char* const from = message + layout.rows_offset + row * g.layout.row_bytes;
      if (!arriving.here) {  // a row is right, or NaN
        for (int32_t i = 0; i < count; ++i) {
          FillRow(words, targets[warp][i], NaNs<T, Word>());
          if (a.values && warp_lane == 0) a.values[copies[warp][i]] = nan;
        }
      } else if constexpr (kWeighted) {
        for (int32_t i = 0; i < count; ++i) {
          const int32_t to = copies[warp][i];
          const float dot = ScaleRowAndDot<T, Word>(words, targets[warp][i], from,
                                                    a.y + to * g.x_row_bytes, a.w[to]);
          if (warp_lane == 0) a.values[to] = dot;
        }
      } else {
        CopyRow<Word>(words, from, targets[warp], count);
        if (a.values && piece == 0 && warp_lane < count) {
          const auto* const values = reinterpret_cast<const float*>(message + layout.slots_offset);
          a.values[copies[warp][warp_lane]] =
              __ldcg(values + int64_t{row} * g.top_k + slots[warp][warp_lane]);
        }
      }
      if (piece == 0) copies_written += count;
      __syncwarp();
    }
    if (warp_lane == 0 && copies_written) atomicAdd(&lane.scratch->copies, copies_written);
  }
  if (!IsLastBlock(lane) || threadIdx.x != 0) return;
  int64_t rows = 0, relay_read = 0, relay_written = 0;
  for (int32_t s = 0; ok && s < g.num_ranks; ++s) {
    rows += lane.scratch->source_rows[s];
    if (g.nodes.hierarchical) relay_written += lane.scratch->relay_node_rows[s];
  }
  for (int32_t n = 0; ok && g.nodes.hierarchical && n < g.nodes.count(); ++n) {
    relay_read += lane.scratch->relay_wire_rows[n];
  }
  if (ok && g.nodes.hierarchical) NoteRelayed(messages, lane.scratch->relay_node_rows);
  const auto y_read = static_cast<int64_t>(kWeighted ? lane.scratch->copies : 0);
  EndPhase(g, lane, op, begun, ok && !Faulted(g), rows,
           (rows + relay_read + y_read) * g.x_row_bytes,
           (a.capacity + relay_written) * g.x_row_bytes);
}

constexpr auto kScatter = [](auto element, auto word) {
  return Scatter<decltype(element), decltype(word), /*kWeighted=*/false>;
};
constexpr auto kScatterWeighted = [](auto element, auto word) {
  return Scatter<decltype(element), decltype(word), /*kWeighted=*/true>;
};

}  // namespace

size_t PlaceSharedBytes(int32_t num_experts, int32_t num_ranks) {
  return static_cast<size_t>(num_experts / num_ranks) * sizeof(ExpertRows) +
         static_cast<size_t>(num_experts) * sizeof(int32_t);
}

cudaError_t LoadDispatchRecv(size_t place_shared_bytes) {
  cudaError_t error = LoadKernels({Kernel(Place, place_shared_bytes), Kernel(Mark)});
  if (error == cudaSuccess) error = LoadKernelsFor(kScatter);
  return error == cudaSuccess ? LoadKernelsFor(kScatterWeighted) : error;
}

cudaError_t LaunchDispatchRecv(const KernelParams& k, const DispatchRecvArrays& arrays,
                               const LaunchParams& launch) {
  const auto capacity = static_cast<int32_t>(arrays.rows_capacity);
  const int64_t slots = int64_t{k.g.num_ranks} * k.op.tokens * k.g.top_k;
  const PlaceArrays place{capacity,           arrays.group_sizes,
                          arrays.num_dropped, arrays.rows,
                          arrays.recv_counts, k.g.nodes.hierarchical ? nullptr : arrays.relay};
  const cudaError_t error =
      LaunchKernel(Place, launch.BlocksForItems(slots), kThreads,
                   PlaceSharedBytes(k.g.num_experts, k.g.num_ranks), launch.stream, k, place);
  if (error != cudaSuccess) return error;
  const ScatterArrays scatter{capacity, arrays.rows, nullptr, nullptr, static_cast<char*>(arrays.x),
                              arrays.weights};
  const int64_t rows =
      std::max<int64_t>(int64_t{k.g.num_ranks} * k.op.tokens * k.op.pieces, capacity);
  const auto kernel = KernelFor(launch.dtype, WordBytes(k.g), kScatter);
  return LaunchKernel(kernel, launch.BlocksFor(rows), kThreads, 0, launch.stream, k, scatter);
}

cudaError_t LaunchDispatchRecvCached(const KernelParams& params,
                                     const DispatchRecvCachedArrays& arrays,
                                     const LaunchParams& launch) {
  KernelParams k = params;
  if (arrays.w) k.op.pieces = 1;  // a warp sums over the whole row
  const auto capacity = static_cast<int32_t>(arrays.rows_capacity);
  const int64_t slots = int64_t{k.g.num_ranks} * k.op.tokens * k.g.top_k;
  const cudaError_t error =
      LaunchKernel(Mark, launch.BlocksForItems(slots), kThreads, 0, launch.stream, k, capacity,
                   arrays.rows, arrays.recv_counts);
  if (error != cudaSuccess) return error;
  const ScatterArrays scatter{capacity, arrays.rows, static_cast<const char*>(arrays.y), arrays.w,
                              static_cast<char*>(arrays.x), arrays.values};
  const int64_t rows =
      std::max<int64_t>(int64_t{k.g.num_ranks} * k.op.tokens * k.op.pieces, capacity);
  const auto kernel = arrays.w ? KernelFor(launch.dtype, WordBytes(k.g), kScatterWeighted)
                               : KernelFor(launch.dtype, WordBytes(k.g), kScatter);
  return LaunchKernel(kernel, launch.BlocksFor(rows), kThreads, 0, launch.stream, k, scatter);
}

}  // namespace smfree::cuda
