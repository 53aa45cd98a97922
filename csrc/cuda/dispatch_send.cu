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
// Pack     S3, S4  a warp per piece of a row: reads it once, writes it once per destination. A block
//                  takes a tile of rows, one piece per warp, and counts the tile when it is
//                  written.
//
// Byte floor: T * row_bytes read, sum(send_counts) * row_bytes written.
#include "csrc/cuda/launch.h"
#include "csrc/cuda/rows.cuh"

namespace smfree::cuda {
namespace {

struct RouteArrays {
  const int32_t* topk_idx;
  const float* topk_weights;
  int32_t* places;
  int32_t* send_counts;
};

// The bits of the rows of a block that go to expert or rank `bin`.
struct RowBits {
  uint32_t* words;
  int32_t words_per_bin;

  __device__ uint32_t* of(int32_t bin) const { return words + bin * words_per_bin; }
  // Sets the bit of `row`; whether it was set before.
  __device__ bool Set(int32_t bin, int32_t row) const {
    const uint32_t bit = 1u << (row % 32);
    return (atomicOr(of(bin) + row / 32, bit) & bit) != 0;
  }
  __device__ int32_t CountBelow(int32_t bin, int32_t row) const {
    const uint32_t* const bits = of(bin);
    int32_t count = __popc(bits[row / 32] & ((1u << (row % 32)) - 1));
    for (int32_t w = 0; w < row / 32; ++w) count += __popc(bits[w]);
    return count;
  }
  __device__ int32_t Count(int32_t bin) const {
    int32_t count = 0;
    for (int32_t w = 0; w < words_per_bin; ++w) count += __popc(of(bin)[w]);
    return count;
  }
};

// Waits until every block has published its counts of this operation. The barrier is internal to
// one launch whose blocks are all resident, so it needs no deadline.
__device__ void WaitForAllBlocks(const Context& c, uint64_t epoch) {
  for (uint32_t block = threadIdx.x; block < gridDim.x; block += blockDim.x) {
    while (load_acquire_gpu(c.route_flags + block) != epoch) __nanosleep(50);
  }
  __syncthreads();
}

// Every block takes part in the barrier, whatever is wrong with the rows.
__global__ void __launch_bounds__(kRouteThreads)
    Route(const Context c, const RouteArrays a, const int32_t rows_per_block) {
  extern __shared__ uint32_t shared[];
  const int32_t bins = c.num_experts + c.num_ranks;  // first the experts, then the ranks
  const RowBits bits{shared, rows_per_block / 32};
  auto* const before = reinterpret_cast<int32_t*>(shared + bins * bits.words_per_bin);
  int32_t* const rank_rows = before + bins;
  const int32_t local_experts = c.local_experts();
  const int32_t first_row = static_cast<int32_t>(blockIdx.x) * rows_per_block;
  const int32_t num_rows = min(rows_per_block, c.tokens - first_row);
  const int32_t num_slots = num_rows * c.top_k;
  const int32_t* const experts = a.topk_idx + int64_t{first_row} * c.top_k;
  const float* const weights = a.topk_weights + int64_t{first_row} * c.top_k;
  const auto thread = static_cast<int32_t>(threadIdx.x);

  NoteBegin(c);
  const Begun begun = BeginSendPhase(c);
  const uint64_t epoch = c.scratch->epoch + 1;
  for (int32_t i = thread; i < bins * bits.words_per_bin; i += kRouteThreads) shared[i] = 0;
  __syncthreads();
  for (int32_t slot = thread; slot < num_slots; slot += kRouteThreads) {
    const int32_t expert = experts[slot];
    const int32_t row = slot / c.top_k;
    if (expert == -1) continue;
    if (expert < -1 || expert >= c.num_experts || bits.Set(expert, row)) {
      if (begun.ok) {
        Report(c, FaultKind::kInvalidRouting, begun.number,
               {-1, first_row + row, c.num_experts, expert});
      }
      continue;
    }
    bits.Set(c.num_experts + expert / local_experts, row);
  }
  __syncthreads();

  int32_t* const counts = c.route_counts + int64_t{blockIdx.x} * bins;
  for (int32_t bin = thread; bin < bins; bin += kRouteThreads) counts[bin] = bits.Count(bin);
  __syncthreads();
  if (thread == 0) {
    __threadfence();
    store_release_gpu(c.route_flags + blockIdx.x, epoch);
  }
  WaitForAllBlocks(c, epoch);

  // `before`: in earlier blocks. rank_rows: in all.
  for (int32_t bin = thread; bin < bins; bin += kRouteThreads) {
    int32_t earlier = 0, all = 0;
#pragma unroll 16
    for (int32_t block = 0; block < static_cast<int32_t>(gridDim.x); ++block) {
      const int32_t count = __ldcg(c.route_counts + int64_t{block} * bins + bin);
      all += count;
      if (block < static_cast<int32_t>(blockIdx.x)) earlier += count;
    }
    before[bin] = earlier;
    if (bin >= c.num_experts) {
      rank_rows[bin - c.num_experts] = all;
      if (blockIdx.x == 0) a.send_counts[bin - c.num_experts] = all;
    } else if (blockIdx.x == 0 && begun.ok) {
      char* const message = MessageTo(c, begun.number, bin / local_experts);
      reinterpret_cast<int32_t*>(message + kHeaderIdentityBytes)[bin % local_experts] = all;
    }
  }
  __syncthreads();
  if (blockIdx.x == 0 && begun.ok) {
    for (int32_t peer = thread; peer < c.num_ranks; peer += kRouteThreads) {
      WriteHeader(c, begun.number, MessageTo(c, begun.number, peer), rank_rows[peer]);
    }
  }

  // A thread per slot: its code to the rank of its expert, -1 to the row's other ranks.
  for (int32_t slot = thread; slot < num_slots; slot += kRouteThreads) {
    const int32_t row = slot / c.top_k;
    const int32_t k = slot % c.top_k;
    const int32_t expert = experts[slot];
    const float weight = weights[slot];
    const bool valid = expert >= 0 && expert < c.num_experts;
    const int32_t home = valid ? expert / local_experts : -1;
    const int32_t code = valid ? c.code.Encode(expert % local_experts,
                                               before[expert] + bits.CountBelow(expert, row))
                               : -1;
    int32_t* const places = a.places + int64_t{first_row + row} * c.places_per_row;
    int32_t num_places = 0;
    for (int32_t peer = 0; peer < c.num_ranks; ++peer) {
      const int32_t bin = c.num_experts + peer;
      if (!(bits.of(bin)[row / 32] >> (row % 32) & 1)) continue;
      const int32_t i = before[bin] + bits.CountBelow(bin, row);
      if (k == 0) places[num_places++] = peer * c.tokens + i;
      if (!begun.ok) continue;
      char* const message = MessageTo(c, begun.number, peer) + c.layout.header_bytes;
      const MessageLayout layout = LayoutOf(c, rank_rows[peer]);
      const int64_t at = int64_t{i} * c.top_k + k;
      reinterpret_cast<int32_t*>(message + layout.experts_offset)[at] = peer == home ? code : -1;
      reinterpret_cast<float*>(message + layout.slots_offset)[at] = weight;
    }
    while (k == 0 && num_places < c.places_per_row) places[num_places++] = -1;
  }
}

struct CachedArrays {
  const float* slots;
  const int32_t* places;
  const int32_t* send_counts;
};

// A place that no dispatch of this group can have made.
__device__ bool IsBroken(const Context& c, int32_t place, const int32_t* send_counts) {
  if (place == -1) return false;
  return place < -1 || place / c.tokens >= c.num_ranks ||
         place % c.tokens >= send_counts[place / c.tokens];
}

__global__ void LayOut(const Context c, const CachedArrays a) {
  NoteBegin(c);
  const Begun begun = BeginSendPhase(c);
  if (!begun.ok) return;
  const auto thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const auto threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  if (blockIdx.x == 0) {
    for (int32_t peer = threadIdx.x; peer < c.num_ranks; peer += blockDim.x) {
      const int32_t rows = a.send_counts[peer];
      if (rows < 0 || rows > c.tokens) {
        Report(c, FaultKind::kInvalidArgument, begun.number, {peer, -1, c.tokens, rows});
      } else {
        WriteHeader(c, begun.number, MessageTo(c, begun.number, peer), rows);
      }
    }
  }
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

cudaError_t LaunchPack(const Context& c, const void* x, const int32_t* places, const int32_t* send_counts,
                const Launch& launch) {
  const auto* const bytes = static_cast<const char*>(x);
  const auto pack = WordBytes(c) == 16 ? Pack<uint4> : WordBytes(c) == 4 ? Pack<uint32_t>
                                                                         : Pack<uint16_t>;
  pack<<<launch.BlocksFor(c.tokens * c.pieces), kThreads, 0, launch.stream>>>(c, bytes, places,
                                                                             send_counts);
  return cudaGetLastError();
}

// Rows of a block and its shared memory.
struct RouteShape {
  int32_t rows_per_block, blocks;
  size_t shared_bytes;

  RouteShape(int64_t tokens, int32_t bins) {
    rows_per_block = kRouteRows;
    while (tokens > int64_t{rows_per_block} * kMaxRouteBlocks) rows_per_block *= 2;
    blocks = static_cast<int32_t>((tokens + rows_per_block - 1) / rows_per_block);
    shared_bytes = sizeof(int32_t) * static_cast<size_t>(bins) *
                   static_cast<size_t>(rows_per_block / 32 + 2);
  }
};

}  // namespace

size_t RouteSharedBytes(int64_t tokens, int32_t num_experts, int32_t num_ranks) {
  return RouteShape(tokens, num_experts + num_ranks).shared_bytes;
}

cudaError_t LoadDispatchSend(size_t route_shared_bytes) {
  return LoadKernels({Kernel(Route, route_shared_bytes), Kernel(LayOut), Kernel(Pack<uint4>),
                      Kernel(Pack<uint32_t>), Kernel(Pack<uint16_t>)});
}

cudaError_t LaunchDispatchSend(const Context& c, const DispatchSendArgs& args, const Launch& launch) {
  const RouteShape shape(c.tokens, c.num_experts + c.num_ranks);
  const RouteArrays arrays{args.topk_idx, args.topk_weights, args.places, args.send_counts};
  Route<<<shape.blocks, kRouteThreads, shape.shared_bytes, launch.stream>>>(c, arrays,
                                                                            shape.rows_per_block);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  return LaunchPack(c, args.x, args.places, args.send_counts, launch);
}

cudaError_t LaunchDispatchSendCached(const Context& c, const DispatchSendCachedArgs& args,
                              const Launch& launch) {
  const CachedArrays arrays{args.slots, args.places, args.send_counts};
  LayOut<<<launch.BlocksForItems(int64_t{c.tokens} * c.places_per_row), kThreads, 0,
           launch.stream>>>(c, arrays);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  return LaunchPack(c, args.x, args.places, args.send_counts, launch);
}

}  // namespace smfree::cuda
