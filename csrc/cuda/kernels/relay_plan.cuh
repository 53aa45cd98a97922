// SPDX-License-Identifier: Apache-2.0
//
// What a relay knows of its messages, on both legs, before it packs any: how many rows they have
// and where their payloads stand in areas. Of a dispatch it follows from the headers on the wire,
// so that a relay hands on no more rows than the capacity (KeptRows), and takes no message of which
// it would hand on nothing. Of a combine it follows from the headers inside the node, and the
// handle.
#ifndef SMFREE_CSRC_CUDA_KERNELS_RELAY_PLAN_CUH_
#define SMFREE_CSRC_CUDA_KERNELS_RELAY_PLAN_CUH_

#include <cstdint>

#include "csrc/cuda/kernels/packing.cuh"
#include "csrc/cuda/kernels/relay.cuh"

namespace smfree::cuda {
namespace {

// In shared memory of each block, as is the next one.
struct DispatchPlan {
  int32_t wire_sent[kMaxLists];  // rows of each message on the wire
  int32_t wire_rows[kMaxLists];  // the same, or 0 where it is not taken
  int64_t wire_at[kMaxLists];    // received
  int32_t sent[kMaxRanks];     // rows that the source of each message inside the node has sent
  int32_t rows[kMaxRanks];     // that are handed on
  int32_t first_row[kMaxRanks];  // of what was sent
  int64_t node_at[kMaxRanks];    // packed

  // R1: waits for the headers. By all threads of a block; false in all of them if the rank has
  // failed.
  __device__ bool Make(const Messages& wire, const Messages& node, Arrivals& arrivals) {
    const GroupConstants& g = wire.g;
    const OperationParams& op = wire.op;
    if (!OpenMessages(wire, nullptr, wire_sent, arrivals)) return false;
    const int32_t per_node = g.nodes.ranks_per_node;
    bool ok = true;
    for (int32_t region = threadIdx.x; region < node.count(); region += blockDim.x) {
      const int32_t from = region / per_node;
      const auto* const by_rank =
          reinterpret_cast<const int32_t*>(wire.HeaderFrom(from) + RowsByRankOffset(g));
      sent[region] = __ldcg(by_rank + region % per_node);
      if (sent[region] >= 0 && sent[region] <= wire_sent[from]) continue;
      ok = false;
      Report(g, op, FaultKind::kInvalidArgument, wire.number,
             {wire.Peer(from), -1, wire_sent[from], sent[region]});
    }
    if (!__syncthreads_and(ok)) return false;
    if (threadIdx.x < kWarp) {
      const auto warp_lane = static_cast<int32_t>(threadIdx.x);
      CountRowsBefore(node.count(), sent, first_row);
      __syncwarp();
      for (int32_t n = warp_lane; n < wire.count(); n += kWarp) {
        wire_rows[n] = IsTaken(first_row[n * per_node], op.wire_rows) ? wire_sent[n] : 0;
      }
      for (int32_t region = warp_lane; region < node.count(); region += kWarp) {
        rows[region] =
            static_cast<int32_t>(KeptRows(first_row[region], sent[region], op.wire_rows));
      }
      __syncwarp();
      (void)LayOutMessages(wire, wire_rows, nullptr, wire_at,
                           [&](int32_t region) { return wire.IsOwn(region); });
      (void)LayOutMessages(node, rows, nullptr, node_at, [](int32_t) { return false; });
    }
    __syncthreads();
    if (blockIdx.x != 0) return true;
    for (int32_t n = threadIdx.x; n < wire.count(); n += blockDim.x) {
      wire.set.scratch->received_at[kWire][n] = wire_at[n];
    }
    return true;
  }
};

struct CombinePlan {
  int32_t returned[kMaxRanks];  // rows of each message inside the node
  int64_t node_at[kMaxRanks];    // received
  int32_t wire_rows[kMaxLists];  // of each message on the wire
  int64_t wire_at[kMaxLists];  // packed

  // R1, in the same way.
  __device__ bool Make(const Messages& wire, const Messages& node, const int32_t* relay,
                       Arrivals& arrivals) {
    const GroupConstants& g = wire.g;
    const OperationParams& op = wire.op;
    for (int32_t n = threadIdx.x; n < wire.count(); n += blockDim.x) {
      wire_rows[n] = RowsInRelay(g, op, relay, n);
    }
    if (!OpenMessages(node, nullptr, returned, arrivals)) return false;
    bool ok = true;
    if (threadIdx.x < kWarp) {
      (void)LayOutMessages(node, returned, nullptr, node_at,
                           [&](int32_t region) { return node.IsOwn(region); });
      const Totals totals = LayOutMessages(wire, wire_rows, nullptr, wire_at,
                                           [](int32_t) { return false; });
      const int64_t most = min(int64_t{wire.count()} * op.tokens,
                               int64_t{op.wire_rows} + op.tokens);  // RelayRows
      ok = totals.rows <= most;
      if (!ok && threadIdx.x == 0) {
        Report(g, op, FaultKind::kInvalidArgument, wire.number, {-1, -1, most, totals.rows});
      }
    }
    if (!__syncthreads_and(ok)) return false;
    if (blockIdx.x != 0) return true;
    for (int32_t region = threadIdx.x; region < node.count(); region += blockDim.x) {
      node.set.scratch->received_at[kNode][region] = node_at[region];
    }
    return true;
  }

 private:
  // How many rows of node `node` are in `relay`: the first ones, as CountRelay checks.
  __device__ static int32_t RowsInRelay(const GroupConstants& g, const OperationParams& op,
                                        const int32_t* relay, int32_t node) {
    int32_t begin = 0, end = op.tokens;
    while (begin < end) {
      const int32_t row = (begin + end) / 2;
      if (*RelayOf(g, op, relay, node, row) >= 0) {
        begin = row + 1;
      } else {
        end = row;
      }
    }
    return begin;
  }
};

}  // namespace
}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_KERNELS_RELAY_PLAN_CUH_
