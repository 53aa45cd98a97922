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
// Byte floor: sum(recv_counts) * row_bytes read, N * row_bytes written; weighted: y read as well.
//
// The weighted form writes x[n] = w[n] * row i and values[n] = <y[n], row i>: the gradient of a
// combine.
#include "csrc/cuda/launch.h"
#include "csrc/cuda/rows.cuh"

namespace smfree::cuda {
namespace {

// The cotangent of a dispatch or combine that nothing depends on: nothing was sent, all is zero.
__device__ bool NothingWasSent(const Context& c) { return Token::Read(c.token).zero(); }

__device__ void WriteSources(const Context& c, const int32_t* rows) {
  if (blockIdx.x != 0) return;
  for (int32_t source = threadIdx.x; source < c.num_ranks; source += blockDim.x) {
    c.scratch->source_rows[source] = rows[source];
  }
}

// The rows of each local expert, as they are laid out in the expert-grouped array.
struct ExpertRows {
  int32_t start;
  int32_t end;      // of its place, filled up to the alignment, or cut at the capacity
  int32_t dropped;  // copies that did not fit
};

// Groups, and in first[s * El + e] the row of the first copy from source s for expert e. By all
// threads of a block.
__device__ void LayOutGroups(const Context& c, int64_t number, int32_t capacity, ExpertRows* groups,
                             int32_t* first) {
  const int32_t local_experts = c.local_experts();
  for (int32_t e = threadIdx.x; e < local_experts; e += blockDim.x) {
    int32_t count = 0;
#pragma unroll 4
    for (int32_t source = 0; source < c.num_ranks; ++source) {
      const char* const header = MessageFrom(c, number, source) + kHeaderIdentityBytes;
      first[source * local_experts + e] = count;
      count += __ldcg(reinterpret_cast<const int32_t*>(header) + e);
    }
    groups[e].dropped = count;  // for now
  }
  __syncthreads();
  if (threadIdx.x < kWarp) {  // an exclusive sum of the aligned counts, cut at the capacity
    const int32_t lane = static_cast<int32_t>(threadIdx.x);
    int64_t start = 0;
    for (int32_t base = 0; base < local_experts; base += kWarp) {
      const int32_t e = base + lane;
      const int32_t count = e < local_experts ? groups[e].dropped : 0;
      const int32_t aligned =
          (count + c.expert_alignment - 1) / c.expert_alignment * c.expert_alignment;
      int64_t up_to = aligned;
      for (int32_t distance = 1; distance < kWarp; distance *= 2) {
        const int64_t other = __shfl_up_sync(~0u, up_to, distance);
        if (lane >= distance) up_to += other;
      }
      if (e < local_experts) {
        const auto begin = static_cast<int32_t>(min(start + up_to - aligned, int64_t{capacity}));
        const auto end = static_cast<int32_t>(min(start + up_to, int64_t{capacity}));
        groups[e] = {begin, end, max(0, count - (end - begin))};
      }
      start += __shfl_sync(~0u, up_to, kWarp - 1);
    }
  }
  __syncthreads();
  for (int32_t i = threadIdx.x; i < c.num_experts; i += blockDim.x) {
    first[i] += groups[i % local_experts].start;
  }
  __syncthreads();
}

struct PlaceArrays {
  int32_t capacity;  // N
  int32_t* group_sizes;
  int32_t* num_dropped;
  int32_t* rows;
  int32_t* recv_counts;
};

__global__ void __launch_bounds__(kThreads) Place(const Context c, const PlaceArrays a) {
  extern __shared__ int32_t shared[];
  __shared__ int32_t source_rows[kMaxRanks];
  __shared__ Arrivals arrivals;
  const int32_t local_experts = c.local_experts();
  auto* const groups = reinterpret_cast<ExpertRows*>(shared);
  auto* const first = reinterpret_cast<int32_t*>(groups + local_experts);
  const auto thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const auto threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t slots = int64_t{c.num_ranks} * c.tokens * c.top_k;

  NoteBegin(c);
  const Begun begun = BeginRecvPhase(c);
  if (!begun.ok || !OpenMessages(c, begun.number, nullptr, source_rows, arrivals)) {
    for (int64_t i = thread; i < slots; i += threads) a.rows[i] = -1;
    for (int64_t i = thread; i < local_experts; i += threads) a.group_sizes[i] = 0;
    for (int64_t i = thread; i < c.num_ranks; i += threads) a.recv_counts[i] = 0;
    if (thread == 0) *a.num_dropped = 0;
    return;
  }
  LayOutGroups(c, begun.number, a.capacity, groups, first);
  WriteSources(c, source_rows);
  if (blockIdx.x == 0) {
    for (int32_t e = threadIdx.x; e < local_experts; e += blockDim.x) {
      a.group_sizes[e] = groups[e].end - groups[e].start;
    }
    for (int32_t s = threadIdx.x; s < c.num_ranks; s += blockDim.x) {
      a.recv_counts[s] = source_rows[s];
    }
  }
  int32_t dropped = 0;
  for (int32_t e = threadIdx.x % kWarp; e < local_experts; e += kWarp) dropped += groups[e].dropped;
  dropped = __reduce_add_sync(~0u, dropped);
  if (thread == 0) {
    *a.num_dropped = dropped;
    atomicAdd(&c.state->rows_dropped, static_cast<unsigned long long>(dropped));
    c.scratch->overflowed = dropped > 0 && !c.drop_overflow;
    if (c.scratch->overflowed) {
      volatile OverflowRecord& overflow = c.host->overflow;
      overflow.lane = c.lane;
      overflow.derivation = c.derivation;
      overflow.call_site = c.call_site;
      overflow.number = begun.number;
      overflow.dropped = dropped;
      overflow.capacity = a.capacity;
      __threadfence_system();  // pairs with the host's acquire in Check
      overflow.ready = 1;
    }
  }
  for (int64_t at = thread; at < slots; at += threads) {
    const auto source = static_cast<int32_t>(at / (int64_t{c.tokens} * c.top_k));
    const int64_t slot = at % (int64_t{c.tokens} * c.top_k);  // of that source
    int32_t n = -1;
    if (slot / c.top_k < source_rows[source]) {
      const char* const message = MessageFrom(c, begun.number, source) + c.layout.header_bytes;
      const int32_t code = __ldcg(reinterpret_cast<const int32_t*>(message) + slot);
      if (code >= 0 && c.code.Expert(code) < local_experts) {
        const int32_t expert = c.code.Expert(code);
        n = first[source * local_experts + expert] + c.code.Index(code);
        if (n >= groups[expert].end) n = -1;
      }
    }
    a.rows[at] = n;
    if (n >= 0) c.row_tags[n] = static_cast<uint32_t>(begun.number);
  }
}

__global__ void __launch_bounds__(kThreads)
    Mark(const Context c, const int32_t capacity, const int32_t* rows, const int32_t* recv_counts) {
  __shared__ int32_t source_rows[kMaxRanks];
  __shared__ Arrivals arrivals;
  NoteBegin(c);
  if (NothingWasSent(c)) return;
  const Begun begun = BeginRecvPhase(c);
  if (!begun.ok ||
      !OpenMessages(c, begun.number, recv_counts, source_rows, arrivals)) {
    return;
  }
  WriteSources(c, source_rows);
  if (blockIdx.x == 0 && threadIdx.x == 0) c.scratch->overflowed = 0;
  const auto thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const auto threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t slots_per_source = int64_t{c.tokens} * c.top_k;
  for (int64_t at = thread; at < c.num_ranks * slots_per_source; at += threads) {
    const auto source = static_cast<int32_t>(at / slots_per_source);
    if (at % slots_per_source / c.top_k >= source_rows[source]) continue;
    const int32_t n = rows[at];
    if (n < -1 || n >= capacity) {
      Report(c, FaultKind::kInvalidArgument, begun.number, {source, -1, capacity, n});
    } else if (n >= 0) {
      c.row_tags[n] = static_cast<uint32_t>(begun.number);
    }
  }
}

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
__device__ void FillRows(const Context& c, const ScatterArrays& a, Word word, float value,
                         const Wanted& wanted) {
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % kWarp;
  const int32_t warp = static_cast<int32_t>(blockIdx.x * kWarps + threadIdx.x / kWarp);
  const int32_t warps = static_cast<int32_t>(gridDim.x) * kWarps;
  const Words words(c.x_row_bytes, sizeof(Word), 0, 1);
  // Neighbouring rows go to different warps: what is to be filled lies together at the end.
  for (int32_t base = 0; base < a.capacity; base += warps * kWarp) {
    const int32_t mine = base + lane * warps + warp;
    uint32_t rows = __ballot_sync(~0u, mine < a.capacity && wanted(mine));
    for (; rows != 0; rows &= rows - 1) {
      const int32_t n = base + (__ffs(static_cast<int>(rows)) - 1) * warps + warp;
      FillRow(words, a.x + n * c.x_row_bytes, word);
      if (a.values && lane == 0) a.values[n] = value;
    }
  }
}

// The rows of one message row in the expert-grouped array, in the order of slots: lane k knows
// slot k's. All lanes get the count.
__device__ int32_t CopiesOf(int32_t n, int32_t* copies, int32_t* slots) {
  const auto lane = static_cast<int32_t>(threadIdx.x % kWarp);
  const uint32_t mask = __ballot_sync(~0u, n >= 0);
  const int32_t at = __popc(mask & ((1u << lane) - 1));
  if (n >= 0) {
    copies[at] = n;
    slots[at] = lane;
  }
  __syncwarp();
  return __popc(mask);
}

template <typename T, typename Word, bool kWeighted>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    Scatter(const Context c, const ScatterArrays a) {
  __shared__ Segments segments;
  __shared__ Arrivals arrivals;
  __shared__ int32_t copies[kWarps][kMaxTopK], slots[kWarps][kMaxTopK];
  __shared__ char* targets[kWarps][kMaxTopK];
  const float nan = __int_as_float(0x7fc00000);
  const auto everything = [](int32_t) { return true; };
  const bool nothing_sent = NothingWasSent(c);
  const Begun begun = nothing_sent ? Begun{false, kNoOperation} : BeginRecvPhase(c);
  const bool ok = begun.ok;
  if (nothing_sent) {
    FillRows(c, a, Zeros<Word>(), 0.0f, everything);
  } else if (!ok || c.scratch->overflowed) {
    FillRows(c, a, NaNs<T, Word>(), nan, everything);
  } else {
    const auto number = static_cast<uint32_t>(begun.number);
    FillRows(c, a, Zeros<Word>(), 0.0f, [&](int32_t n) { return __ldcg(c.row_tags + n) != number; });
  }

  if (ok) {
    arrivals.Clear();
    if (threadIdx.x < kWarp) segments.Build(c, c.scratch->source_rows, /*own_first=*/true);
    __syncthreads();
    const int32_t warp = static_cast<int32_t>(threadIdx.x) / kWarp;
    const int32_t lane = static_cast<int32_t>(threadIdx.x) % kWarp;
    const bool write = !c.scratch->overflowed;
    unsigned long long copies_written = 0;
    int32_t waited_source = -1, waited_chunk = -1;
    bool here = true;
    int32_t at = 0;
    for (int32_t unit = static_cast<int32_t>(blockIdx.x) * kWarps + warp;
         unit < segments.rows * c.pieces; unit += static_cast<int32_t>(gridDim.x) * kWarps) {
      const int32_t piece = unit % c.pieces;
      at = segments.Find(unit / c.pieces, at);
      const Segment& segment = segments.segment[at];
      const int32_t row = segment.row + unit / c.pieces - segment.first;
      if (segment.source != waited_source || segment.chunk != waited_chunk) {
        waited_source = segment.source;
        waited_chunk = segment.chunk;
        const Chunks chunks(c.scratch->source_rows[waited_source], c.chunks);
        const int32_t wanted = waited_chunk + 1 == chunks.count ? kAllChunks : waited_chunk + 1;
        if (lane == 0) {
          here = WaitForChunks(c, begun.number, waited_source, wanted, arrivals);
        }
        here = __shfl_sync(~0u, here, 0);
      }
      const int64_t first_slot = (int64_t{segment.source} * c.tokens + row) * c.top_k;
      const int32_t n = lane < c.top_k && write ? a.rows[first_slot + lane] : -1;
      const int32_t count = CopiesOf(n, copies[warp], slots[warp]);
      const Words words(c.x_row_bytes, sizeof(Word), piece, c.pieces);
      if (lane < count) targets[warp][lane] = a.x + copies[warp][lane] * c.x_row_bytes;
      __syncwarp();
      const char* const message = MessageFrom(c, begun.number, segment.source) +
                                  c.layout.header_bytes;
      const MessageLayout layout = LayoutOf(c, c.scratch->source_rows[segment.source]);
      const char* const from = message + layout.rows_offset + row * c.layout.row_bytes;
      if (!here) {  // a row is right, or NaN
        for (int32_t i = 0; i < count; ++i) {
          FillRow(words, targets[warp][i], NaNs<T, Word>());
          if (a.values && lane == 0) a.values[copies[warp][i]] = nan;
        }
      } else if constexpr (kWeighted) {
        for (int32_t i = 0; i < count; ++i) {
          const int32_t to = copies[warp][i];
          const float dot = ScaleRowAndDot<T, Word>(words, targets[warp][i], from,
                                                    a.y + to * c.x_row_bytes, a.w[to]);
          if (lane == 0) a.values[to] = dot;
        }
      } else {
        CopyRow<Word>(words, from, targets[warp], count);
        if (a.values && piece == 0 && lane < count) {
          const auto* const values = reinterpret_cast<const float*>(message + layout.slots_offset);
          a.values[copies[warp][lane]] =
              __ldcg(values + int64_t{row} * c.top_k + slots[warp][lane]);
        }
      }
      if (piece == 0) copies_written += count;
      __syncwarp();
    }
    if (lane == 0 && copies_written) atomicAdd(&c.scratch->copies, copies_written);
  }
  if (!IsLastBlock(c) || threadIdx.x != 0) return;
  int64_t wire_rows = 0;
  for (int32_t s = 0; ok && s < c.num_ranks; ++s) wire_rows += c.scratch->source_rows[s];
  const auto read = static_cast<int64_t>(kWeighted ? c.scratch->copies : 0);
  EndPhase(c, begun, ok && !Faulted(c), wire_rows, (wire_rows + read) * c.x_row_bytes,
           a.capacity * c.x_row_bytes);
}

template <bool kWeighted>
auto ScatterFor(DType dtype, int32_t word_bytes) {
  const bool wide = word_bytes == 16;
  switch (dtype) {
    case DType::kF32: return wide ? Scatter<float, uint4, kWeighted>
                                  : Scatter<float, uint32_t, kWeighted>;
    case DType::kBF16: return wide ? Scatter<__nv_bfloat16, uint4, kWeighted>
                                   : Scatter<__nv_bfloat16, uint16_t, kWeighted>;
    default: return wide ? Scatter<__half, uint4, kWeighted> : Scatter<__half, uint16_t, kWeighted>;
  }
}

}  // namespace

size_t PlaceSharedBytes(int32_t num_experts, int32_t num_ranks) {
  return static_cast<size_t>(num_experts / num_ranks) * sizeof(ExpertRows) +
         static_cast<size_t>(num_experts) * sizeof(int32_t);
}

cudaError_t LoadDispatchRecv(size_t place_shared_bytes) {
  cudaError_t error = LoadKernels({Kernel(Place, place_shared_bytes), Kernel(Mark)});
  for (const DType dtype : kDTypes) {
    for (const int32_t word : {16, 4}) {
      if (error != cudaSuccess) return error;
      error = LoadKernels({Kernel(ScatterFor<true>(dtype, word)),
                           Kernel(ScatterFor<false>(dtype, word))});
    }
  }
  return error;
}

cudaError_t LaunchDispatchRecv(const Context& c, DType dtype, const DispatchRecvArgs& args,
                        const Launch& launch) {
  const auto capacity = static_cast<int32_t>(args.rows_capacity);
  const int64_t slots = int64_t{c.num_ranks} * c.tokens * c.top_k;
  const PlaceArrays place{capacity, args.group_sizes, args.num_dropped, args.rows,
                          args.recv_counts};
  Place<<<launch.BlocksForItems(slots), kThreads, PlaceSharedBytes(c.num_experts, c.num_ranks),
          launch.stream>>>(c, place);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  const ScatterArrays scatter{capacity, args.rows, nullptr, nullptr, static_cast<char*>(args.x),
                              args.weights};
  const int64_t rows = std::max<int64_t>(int64_t{c.num_ranks} * c.tokens * c.pieces, capacity);
  ScatterFor<false>(dtype, WordBytes(c))<<<launch.BlocksFor(rows), kThreads, 0, launch.stream>>>(
      c, scatter);
  return cudaGetLastError();
}

cudaError_t LaunchDispatchRecvCached(const Context& c, DType dtype, const DispatchRecvCachedArgs& args,
                              const Launch& launch) {
  const auto capacity = static_cast<int32_t>(args.rows_capacity);
  const int64_t slots = int64_t{c.num_ranks} * c.tokens * c.top_k;
  Mark<<<launch.BlocksForItems(slots), kThreads, 0, launch.stream>>>(c, capacity, args.rows,
                                                                     args.recv_counts);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  const ScatterArrays scatter{capacity, args.rows, static_cast<const char*>(args.y), args.w,
                              static_cast<char*>(args.x), args.values};
  const int64_t rows = std::max<int64_t>(int64_t{c.num_ranks} * c.tokens * c.pieces, capacity);
  const auto kernel = args.w ? ScatterFor<true>(dtype, WordBytes(c))
                             : ScatterFor<false>(dtype, WordBytes(c));
  kernel<<<launch.BlocksFor(rows), kThreads, 0, launch.stream>>>(c, scatter);
  return cudaGetLastError();
}

}  // namespace smfree::cuda
