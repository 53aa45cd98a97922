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
// PlaceAndScatter  S7 – S10  in place of Place and Scatter for small operations (small.h): every
//                  block lays out the groups, which say what is zero; no tags.
//
// Launch: kThreads threads, and no more blocks than kBlocksPerSm per SM: they wait for peers, and
// must leave room for puts (far_peers.h). Place, PlaceAndScatter: PlaceSharedBytes of shared
// memory.
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

// All bytes of rows [0, N) that `wanted(n)` picks, and of their values, by `blocks` blocks of which
// this is number `block`. A warp asks for 32 at once.
template <typename Rows, typename Wanted>
__device__ void FillRows(const OperationParams& op, const ScatterArrays& a, uint32_t bytes,
                         const Wanted& wanted, uint32_t block = blockIdx.x,
                         uint32_t blocks = gridDim.x) {
  const int32_t warp_lane = static_cast<int32_t>(threadIdx.x) % kWarp;
  const int32_t warp = static_cast<int32_t>(block * kWarps + threadIdx.x / kWarp);
  const int32_t warps = static_cast<int32_t>(blocks) * kWarps;
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

// A row of a message, number `row` there, to rows copies[0 … count) of x; slots[i] is the slot of
// copy i. There is room for so many targets.
template <typename Rows>
__device__ void UnpackRow(const GroupConstants& g, const OperationParams& op,
                          const Incoming& message, int32_t row, int32_t piece,
                          const ScatterArrays& a, const int32_t* copies, const int32_t* slots,
                          char** targets, int32_t count) {
  const auto warp_lane = static_cast<int32_t>(threadIdx.x % kWarp);
  Rows::Unpack(op, piece, message.rows + row * op.stride, a.x, copies, targets, count);
  if (a.values && piece == 0 && warp_lane < count) {
    a.values[copies[warp_lane]] =
        __ldcg(message.slots + int64_t{row} * g.top_k + slots[warp_lane]);
  }
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
      if (!arriving.here) {  // a row is right, or NaN
        for (int32_t i = 0; i < count; ++i) {
          Rows::Fill(op, piece, op.pieces, a.x, copies[warp][i], kNaNs);
          if (a.values && warp_lane == 0) a.values[copies[warp][i]] = __uint_as_float(kNaNs);
        }
      } else if constexpr (kWeighted) {
        const char* const from = message.rows + row * op.stride;
        for (int32_t i = 0; i < count; ++i) {
          const int32_t to = copies[warp][i];
          const float dot = SumOverWarp(Rows::UnpackWeighted(op, from, a.y, a.w[to], a.x, to));
          if (warp_lane == 0) a.values[to] = dot;
        }
      } else {
        UnpackRow<Rows>(g, op, message, row, piece, a, copies[warp], slots[warp], targets[warp],
                        count);
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
  const Ending ending(g, set);
  const auto copies_here = static_cast<int64_t>(set.scratch->copies);
  const int64_t y_read = kWeighted ? copies_here : 0;
  const int64_t written = g.padded_groups && !everything ? copies_here : a.capacity;
  EndPhase(g, set, op, begun, ending, ok && !ending.faulted, rows,
           (rows + relay_read) * op.stride + y_read * op.row_bytes,
           written * op.row_bytes + relay_written * op.stride);
}

template <typename Rows>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    PlaceAndScatter(const __grid_constant__ KernelParams params,
                    const __grid_constant__ PlaceArrays place,
                    const __grid_constant__ ScatterArrays a) {
  const GroupConstants& g = params.g;
  const OperationParams& op = params.op;
  extern __shared__ int32_t shared[];
  __shared__ Received received;
  __shared__ Arrivals arrivals;
  __shared__ int32_t copies[kWarps][kMaxTopK], slots[kWarps][kMaxTopK];
  __shared__ char* targets[kWarps][kMaxTopK];
  const bool nothing_sent = NothingWasSent(op);
  const Begun begun = BeginRecvPhase(g, op, params.sets);
  const SetPointers set = params.sets.At(begun.set);
  const Messages messages{g, set, op, kWire, begun.number, nullptr, nullptr, received.sent};
  const Groups groups(shared, g.local_experts());
  // A small message is one chunk: what has begun to come is here.
  const Placed placed = PlaceGroups(messages, place, begun, received, arrivals, groups);
  const bool fails = !nothing_sent && (!placed.ok || placed.overflowed);
  const bool everything = nothing_sent || fails;
  FillRows<Rows>(op, a, fails ? kNaNs : kZeros,
                 [&](int32_t n) { return everything || groups.IsPadding(g, n); });

  const int32_t warp = static_cast<int32_t>(threadIdx.x) / kWarp;
  const int32_t warp_lane = static_cast<int32_t>(threadIdx.x) % kWarp;
  for (int32_t unit = static_cast<int32_t>(blockIdx.x) * kWarps + warp;
       placed.ok && unit < op.wire_rows * op.pieces;
       unit += static_cast<int32_t>(gridDim.x) * kWarps) {
    const int32_t piece = unit % op.pieces;
    const int32_t row = unit / op.pieces;
    const bool kept = row < placed.num_rows;
    const int32_t source = kept ? MessageOf(received.first_row, g.num_ranks, row) : 0;
    const int32_t at = row - received.first_row[source];  // in its message
    int32_t n = -1;
    if (warp_lane < g.top_k) {
      const int64_t slot = int64_t{at} * g.top_k + warp_lane;
      if (kept) n = groups.RowOf(g, source, __ldcg(CodesFrom(messages, source) + slot));
      if (piece == 0) place.rows[int64_t{row} * g.top_k + warp_lane] = n;
    }
    if (!kept || placed.overflowed) continue;
    const int32_t count = CopiesOf(n, copies[warp], slots[warp]);
    const Incoming message =
        IncomingFrom(messages, source, received.rows[source], received.first_row[source]);
    UnpackRow<Rows>(g, op, message, at, piece, a, copies[warp], slots[warp], targets[warp], count);
    __syncwarp();
  }
  if (!IsLastBlock(set)) return;
  // Blocks may disagree about a message that comes at the deadline: then no row counts as right.
  const Ending ending(g, set);
  const bool faulted = __syncthreads_or(ending.faulted) != 0;
  if (faulted && !nothing_sent) {
    FillRows<Rows>(op, a, kNaNs, [](int32_t) { return true; }, 0, 1);
  }
  if (warp != 0) return;
  const int64_t written = g.padded_groups && !everything
                              ? groups.Sum(g, [](const ExpertRows& e) { return e.rows; })
                              : a.capacity;
  if (warp_lane != 0) return;
  EndPhase(g, set, op, begun, ending, placed.ok && !faulted, placed.num_rows,
           placed.num_rows * op.stride, written * op.row_bytes);
}

constexpr auto kScatter = [](auto rows) { return Scatter<decltype(rows), /*kWeighted=*/false>; };
constexpr auto kPlaceAndScatter = [](auto rows) { return PlaceAndScatter<decltype(rows)>; };
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
  if (error == cudaSuccess) error = LoadCopyKernelsFor(kPlaceAndScatter, place_shared_bytes);
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
  const ScatterArrays scatter{capacity, arrays.rows, {}, nullptr, arrays.x, arrays.weights};
  const int64_t rows =
      std::max<int64_t>(int64_t{k.op.wire_rows} * k.op.pieces, capacity);
  const size_t place_bytes = PlaceSharedBytes(k.g.num_experts, k.g.num_ranks);
  if (launch.fused) {
    return LaunchKernel(CopyKernelFor(arrays.x.format, kPlaceAndScatter), launch.BlocksFor(rows),
                        kThreads, place_bytes, launch.stream, k, place, scatter);
  }
  const cudaError_t error = LaunchKernel(Place, launch.BlocksForItems(slots), kThreads, place_bytes,
                                         launch.stream, k, place);
  if (error != cudaSuccess) return error;
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
