// SPDX-License-Identifier: Apache-2.0
//
// dispatch_recv: the rows of all sources, grouped by local expert.
//
//   rows[b,k] = n        the k-th slot of the b-th row received, row i from source s, is row n of
//                        x, or -1
//   x[n] = row i,  weights[n] = its slot k
//
// Place    S7, S8  waits for the first chunk of every source; from the counts in the headers, the
//                  first row of every (source, expert); from the CopyCodes, every n. Writes rows,
//                  group_sizes, recv_counts and num_dropped. Tags the rows that Scatter will write.
// Mark     S7, S8  in place of Place where rows are known.
// Scatter  S7, S9, S10  zeroes what has no tag, but past padded groups; then, own rows first and
//                  chunk by chunk as they arrive, a warp per piece of a row: reads it once,
//                  dequantises it where it is quantised, writes it once per copy.
//
// Launch: kThreads threads, and no more blocks than kBlocksPerSm per SM: they wait for peers, and
// must leave room for puts (far_peers.h). Place: PlaceSharedBytes of shared memory.
//
// Byte floor: sum(recv_counts) rows of messages read, N rows of the program written, of padded groups
// those with a copy; weighted: y read as well.
//
// In hierarchical mode the relay comes first (dispatch_relay.cu); the messages are then the same.
//
// The weighted form writes x[n] = w[n] * row i and values[n] = <y[n], row i>: the gradient of a
// combine.
#include <algorithm>

#include "csrc/cuda/kernels/dispatch_recv_place.cuh"
#include "csrc/cuda/host/kernels.h"
#include "csrc/cuda/kernels/row_order.cuh"
#include "csrc/cuda/kernels/row_kinds.cuh"

namespace smfree::cuda {
namespace {

struct ScatterArrays {
  int32_t capacity;  // N
  const int32_t* rows;
  RowsIn y;        // weighted: of the format of x
  const float* w;  // weighted
  RowsOut x;
  float* values;  // may be null
};

// All bytes of rows [0, N) that `wanted(n)` picks, and of their values. A warp asks for 32 at once.
template <typename Rows, typename Wanted>
__device__ void FillRows(const OperationParams& op, const ScatterArrays& a, uint32_t bytes,
                         const Wanted& wanted) {
  const int32_t warp_lane = static_cast<int32_t>(threadIdx.x) % kWarp;
  const int32_t warp = static_cast<int32_t>(blockIdx.x * kWarps + threadIdx.x / kWarp);
  const int32_t warps = static_cast<int32_t>(gridDim.x) * kWarps;
  // Neighbouring rows go to different warps: what is to be filled lies together at the end.
  for (int32_t base = 0; base < a.capacity; base += warps * kWarp) {
    const int32_t mine = base + warp_lane * warps + warp;
    uint32_t rows = __ballot_sync(~0u, mine < a.capacity && wanted(mine));
    for (; rows != 0; rows &= rows - 1) {
      const int32_t n = base + (__ffs(static_cast<int>(rows)) - 1) * warps + warp;
      Rows::Fill(op, 0, 1, a.x, n, bytes);
      if (a.values && warp_lane == 0) a.values[n] = __uint_as_float(bytes);
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

template <typename Rows, bool kWeighted>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    Scatter(const __grid_constant__ KernelParams params, const __grid_constant__ ScatterArrays a) {
  const GroupConstants& g = params.g;
  const OperationParams& op = params.op;
  __shared__ RowOrder order;
  __shared__ Arrivals arrivals;
  __shared__ int32_t copies[kWarps][kMaxTopK], slots[kWarps][kMaxTopK];
  __shared__ char* targets[kWarps][kMaxTopK];
  __shared__ Incoming incoming[kMaxRanks];
  const bool nothing_sent = NothingWasSent(op);
  const Begun begun = BeginRecvPhase(g, op, params.sets);
  const SetPointers set = params.sets.At(begun.set);
  const bool ok = begun.ok;
  const Leg leg = g.nodes.LastLeg(Operation::kDispatch);
  const Messages messages{g,
                          set,
                          op,
                          leg,
                          begun.number,
                          set.scratch->packed_at[leg],
                          set.scratch->received_at[leg],
                          set.scratch->source_sent};
  const bool fails = !nothing_sent && (!ok || set.scratch->overflowed);
  const bool everything = nothing_sent || fails;
  // What is past a padded group is not touched. A group fills its rows up to the alignment, and the
  // first of these has a tag: with an alignment of 1 there is nothing to fill.
  if (everything || !g.padded_groups || g.expert_alignment > 1) {
    const auto has_tag = [&](int32_t n) {
      return __ldcg(set.row_tags + n) == static_cast<uint32_t>(begun.number);
    };
    FillRows<Rows>(op, a, fails ? kNaNs : kZeros, [&](int32_t n) {
      if (everything) return true;
      if (has_tag(n)) return false;
      return !g.padded_groups || has_tag(n - n % g.expert_alignment);
    });
  }

  if (ok) {
    arrivals.Clear();
    if (threadIdx.x < kWarp) order.Build(messages, set.scratch->source_rows, /*own_first=*/true);
    for (int32_t source = threadIdx.x; source < g.num_ranks; source += blockDim.x) {
      incoming[source] = IncomingFrom(messages, source, set.scratch->source_rows[source],
                                      set.scratch->source_first[source]);
    }
    __syncthreads();
    const int32_t warp = static_cast<int32_t>(threadIdx.x) / kWarp;
    const int32_t warp_lane = static_cast<int32_t>(threadIdx.x) % kWarp;
    const bool write = !set.scratch->overflowed;
    unsigned long long copies_written = 0;
    ArrivingRows arriving{messages, order, set.scratch->source_rows, arrivals};
    for (int32_t unit = static_cast<int32_t>(blockIdx.x) * kWarps + warp;
         unit < order.num_rows * op.pieces; unit += static_cast<int32_t>(gridDim.x) * kWarps) {
      const int32_t piece = unit % op.pieces;
      const int32_t row = arriving.GoTo(unit / op.pieces);
      const int32_t source = arriving.region;
      const Incoming& message = incoming[source];
      const int64_t first_slot = (int64_t{message.first_row} + row) * g.top_k;
      const int32_t n = warp_lane < g.top_k && write ? a.rows[first_slot + warp_lane] : -1;
      const int32_t count = CopiesOf(n, copies[warp], slots[warp]);
      const char* const from = message.rows + row * op.stride;
      if (!arriving.here) {  // a row is right, or NaN
        for (int32_t i = 0; i < count; ++i) {
          Rows::Fill(op, piece, op.pieces, a.x, copies[warp][i], kNaNs);
          if (a.values && warp_lane == 0) a.values[copies[warp][i]] = __uint_as_float(kNaNs);
        }
      } else if constexpr (kWeighted) {
        for (int32_t i = 0; i < count; ++i) {
          const int32_t to = copies[warp][i];
          const float dot = SumOverWarp(Rows::UnpackWeighted(op, from, a.y, a.w[to], a.x, to));
          if (warp_lane == 0) a.values[to] = dot;
        }
      } else {
        Rows::Unpack(op, piece, from, a.x, copies[warp], targets[warp], count);
        if (a.values && piece == 0 && warp_lane < count) {
          a.values[copies[warp][warp_lane]] =
              __ldcg(message.slots + int64_t{row} * g.top_k + slots[warp][warp_lane]);
        }
      }
      if (piece == 0) copies_written += count;
      __syncwarp();
    }
    if (warp_lane == 0 && copies_written) atomicAdd(&set.scratch->copies, copies_written);
  }
  if (!IsLastBlock(set) || threadIdx.x != 0) return;
  int64_t rows = 0, relay_read = 0, relay_written = 0;
  for (int32_t s = 0; ok && s < g.num_ranks; ++s) {
    rows += set.scratch->source_rows[s];
    if (g.nodes.hierarchical) relay_written += set.scratch->relay_node_rows[s];
  }
  for (int32_t n = 0; ok && g.nodes.hierarchical && n < g.nodes.count(); ++n) {
    relay_read += set.scratch->relay_wire_rows[n];
  }
  if (ok && g.nodes.hierarchical) NoteRelayed(messages, set.scratch->relay_node_rows);
  const auto copies_here = static_cast<int64_t>(set.scratch->copies);
  const int64_t y_read = kWeighted ? copies_here : 0;
  const int64_t written = g.padded_groups && !everything ? copies_here : a.capacity;
  EndPhase(g, set, op, begun, ok && !Faulted(g), rows,
           (rows + relay_read) * op.stride + y_read * op.row_bytes,
           written * op.row_bytes + relay_written * op.stride);
}

constexpr auto kScatter = [](auto rows) { return Scatter<decltype(rows), /*kWeighted=*/false>; };
constexpr auto kScatterWeighted = [](auto rows) {
  return Scatter<decltype(rows), /*kWeighted=*/true>;
};

}  // namespace

size_t PlaceSharedBytes(int32_t num_experts, int32_t num_ranks) {
  return static_cast<size_t>(num_experts / num_ranks) * sizeof(ExpertRows) +
         static_cast<size_t>(num_experts) * sizeof(int32_t);
}

cudaError_t LoadDispatchRecv(size_t place_shared_bytes) {
  cudaError_t error = LoadKernels({Kernel(Place, place_shared_bytes), Kernel(Mark)});
  if (error == cudaSuccess) error = LoadCopyKernelsFor(kScatter);
  return error == cudaSuccess ? LoadKernelsFor(kScatterWeighted) : error;
}

cudaError_t LaunchDispatchRecv(const KernelParams& k, const DispatchRecvArrays& arrays,
                               const LaunchParams& launch) {
  const auto capacity = static_cast<int32_t>(arrays.rows_capacity);
  const int64_t slots = int64_t{k.op.wire_rows} * k.g.top_k;
  const PlaceArrays place{capacity,           arrays.capacity,
                          arrays.group_sizes, arrays.num_rows,
                          arrays.num_dropped, arrays.rows,
                          arrays.recv_counts, k.g.nodes.hierarchical ? nullptr : arrays.relay};
  const cudaError_t error =
      LaunchKernel(Place, launch.BlocksForItems(slots), kThreads,
                   PlaceSharedBytes(k.g.num_experts, k.g.num_ranks), launch.stream, k, place);
  if (error != cudaSuccess) return error;
  const ScatterArrays scatter{capacity, arrays.rows, {}, nullptr, arrays.x, arrays.weights};
  const int64_t rows =
      std::max<int64_t>(int64_t{k.op.wire_rows} * k.op.pieces, capacity);
  return LaunchKernel(CopyKernelFor(arrays.x.format, kScatter), launch.BlocksFor(rows), kThreads, 0,
                      launch.stream, k, scatter);
}

cudaError_t LaunchDispatchRecvCached(const KernelParams& params,
                                     const DispatchRecvCachedArrays& arrays,
                                     const LaunchParams& launch) {
  KernelParams k = params;
  if (arrays.w) k.op.pieces = 1;  // a warp sums over the whole row
  const auto capacity = static_cast<int32_t>(arrays.rows_capacity);
  const int64_t slots = int64_t{k.op.wire_rows} * k.g.top_k;
  const cudaError_t error =
      LaunchKernel(Mark, launch.BlocksForItems(slots), kThreads, 0, launch.stream, k, capacity,
                   arrays.rows, arrays.recv_counts);
  if (error != cudaSuccess) return error;
  const ScatterArrays scatter{capacity, arrays.rows, arrays.y, arrays.w, arrays.x, arrays.values};
  const int64_t rows =
      std::max<int64_t>(int64_t{k.op.wire_rows} * k.op.pieces, capacity);
  const auto kernel = arrays.w ? KernelFor(arrays.x.format, kScatterWeighted)
                               : CopyKernelFor(arrays.x.format, kScatter);
  return LaunchKernel(kernel, launch.BlocksFor(rows), kThreads, 0, launch.stream, k, scatter);
}

}  // namespace smfree::cuda
