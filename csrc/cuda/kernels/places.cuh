// SPDX-License-Identifier: Apache-2.0
//
// Places: where rows stand in the messages. Row t is the i-th row of list d, if it is in it:
//
//   place = d * T + i          i counts the rows in list d in the order of t
//
// A row has up to `width` places, ascending, each in another list; -1 fills the end. What a list is
// follows from the leg: the message to a rank, to a node, or to an index of this node.
#ifndef SMFREE_CSRC_CUDA_KERNELS_PLACES_CUH_
#define SMFREE_CSRC_CUDA_KERNELS_PLACES_CUH_

#include <cstdint>

#include "csrc/cuda/kernels/messages.cuh"

namespace smfree::cuda {
namespace {

// The places in a handle, by rank.
struct HandlePlaces {
  const int32_t* places;  // [T, g.places_per_row]
  const int32_t* send_counts;
};

// The places in messages on the wire: those of a handle, or what PlaceOnWire says in hierarchical
// mode.
struct WirePlaces {
  const int32_t* places;  // [T, g.wire_width]
  const int32_t* counts;  // by region

  __device__ WirePlaces(const GroupConstants& g, const SetPointers& set,
                                 const int32_t* handle_places, const int32_t* send_counts)
      : places(g.nodes.hierarchical ? set.wire_places : handle_places),
        counts(g.nodes.hierarchical ? set.scratch->wire_rows : send_counts) {}
};

// Fills in the places of a row.
struct Placing {
  int32_t* next;
  int32_t* end;

  __device__ Placing(int32_t* places, int32_t row, int32_t width)
      : next(places + int64_t{row} * width), end(next + width) {}
  __device__ void Add(int32_t place) { *next++ = place; }
  __device__ void End() {
    while (next < end) *next++ = -1;
  }
};

// The lists of rows [0, T), as far as a block needs them to place kPlacedRows rows. It counts what
// stands before them itself, so that blocks need not meet. In shared memory.
struct Lists {
  int32_t before[kMaxLists];  // rows of the list before those of the block
  int32_t total[kMaxLists];
  int32_t num_rows;                               // that are in any list
  uint32_t bits[kMaxLists][kPlacedRows / kWarp];  // of the rows of the block

  // By all threads of a block, which have met afterwards. Row t is in list d if bit d of mask(t) is
  // set.
  template <typename Mask>
  __device__ void Count(int32_t tokens, int32_t num_lists, int32_t first_row, const Mask& mask) {
    for (int32_t list = threadIdx.x; list < num_lists; list += blockDim.x) {
      before[list] = 0;
      total[list] = 0;
    }
    if (threadIdx.x == 0) num_rows = 0;
    __syncthreads();
    const bool first_lane = threadIdx.x % kWarp == 0;
    const auto warp_row = static_cast<int32_t>(threadIdx.x) / kWarp * kWarp;
    for (int32_t base = warp_row; base < tokens; base += static_cast<int32_t>(blockDim.x)) {
      const auto row = base + static_cast<int32_t>(threadIdx.x) % kWarp;
      const uint64_t mine = row < tokens ? mask(row) : 0;
      const bool here = base >= first_row && base < first_row + kPlacedRows;
      const int32_t in_any = __popc(__ballot_sync(~0u, mine != 0));
      if (first_lane && in_any) atomicAdd(&num_rows, in_any);
      for (int32_t list = 0; list < num_lists; ++list) {
        const uint32_t those = __ballot_sync(~0u, mine >> list & 1);
        if (!first_lane) continue;
        if (here) bits[list][(base - first_row) / kWarp] = those;
        if (those == 0) continue;
        atomicAdd(&total[list], __popc(those));
        if (base < first_row) atomicAdd(&before[list], __popc(those));
      }
    }
    __syncthreads();
  }

  // Whether row `at` of the block's is in the list, and where.
  __device__ bool Has(int32_t list, int32_t at) const {
    return bits[list][at / kWarp] >> (at % kWarp) & 1;
  }
  __device__ int32_t Position(int32_t list, int32_t at) const {
    const uint32_t* const words = bits[list];
    int32_t position = before[list];
    for (int32_t w = 0; w < at / kWarp; ++w) position += __popc(words[w]);
    return position + __popc(words[at / kWarp] & ((1u << (at % kWarp)) - 1));
  }
};

// The lists that `width` places of a row name, of `num_lists` with `size` places each; says which
// place is the first that is not possible, or not in order.
__device__ inline uint64_t ListsOf(const int32_t* places, int32_t width, int32_t size,
                                   int32_t num_lists, int32_t* broken) {
  uint64_t lists = 0;
  for (int32_t p = 0; p < width; ++p) {
    const int32_t place = places[p];
    if (place == -1) continue;
    const int32_t list = place / size;
    if (place < 0 || list >= num_lists || (p > 0 && (places[p - 1] < 0 || places[p - 1] >= place))) {
      if (*broken == -1) *broken = place;
    } else {
      lists |= uint64_t{1} << list;
    }
  }
  return lists;
}

// In hierarchical mode, before a phase that sends or receives on the wire by a handle: from the
// places by rank those by node, and how many rows go to each. A thread per row.
__global__ void __launch_bounds__(kThreads)
    PlaceOnWire(const __grid_constant__ KernelParams params, const int32_t* places) {
  const GroupConstants& g = params.g;
  const OperationParams& op = params.op;
  __shared__ Lists lists;
  const Begun begun = IsSend(op.phase) ? BeginSendPhase(g, op, params.sets)
                                       : BeginRecvPhase(g, op, params.sets);
  const SetPointers set = params.sets.At(begun.set);
  NoteBegin(set);
  if (!begun.ok) return;
  const auto first_row = static_cast<int32_t>(blockIdx.x) * kPlacedRows;
  const int32_t num_nodes = g.nodes.count();
  lists.Count(op.tokens, num_nodes, first_row, [&](int32_t row) {
    int32_t broken = -1;
    const uint64_t nodes = ListsOf(places + int64_t{row} * g.places_per_row, g.places_per_row,
                                   op.tokens * g.nodes.ranks_per_node, num_nodes, &broken);
    if (broken != -1) {
      Report(g, op, FaultKind::kInvalidArgument, begun.number, {-1, row, op.tokens, broken});
    }
    return nodes;
  });
  if (blockIdx.x == 0 && threadIdx.x < num_nodes) {
    set.scratch->wire_rows[threadIdx.x] = lists.total[threadIdx.x];
  }
  for (int32_t at = threadIdx.x; at < min(kPlacedRows, op.tokens - first_row); at += blockDim.x) {
    Placing to(set.wire_places, first_row + at, g.wire_width);
    for (int32_t node = 0; node < num_nodes; ++node) {
      if (lists.Has(node, at)) to.Add(node * op.tokens + lists.Position(node, at));
    }
    to.End();
  }
}

}  // namespace
}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_KERNELS_PLACES_CUH_
