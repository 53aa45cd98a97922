// SPDX-License-Identifier: Apache-2.0
//
// S5 and S6 for peers in other nodes, where the GPU itself starts the puts: behind the kernel that
// has packed the messages, on its stream. The only code with NVSHMEM's device library: it is a
// module of its own, which put_kernel.cc loads.
//
// A block per message puts all of it at once: it is packed, and chunks would need fences between
// them, which IBGDA makes of waiting for the network. The call returns when the put is posted, so
// that no SM waits; the message stays as it is until its receiver has read it (PROTOCOL.md, rule 3).
#include <nvshmem.h>
#include <nvshmemx.h>

#include "csrc/cuda/kernels/messages.cuh"
#include "csrc/cuda/network/put_kernel.h"

namespace smfree::cuda {

extern "C" __global__ void __launch_bounds__(kPutThreads)
    smfree_put_messages(const KernelParams params, const ProcessOfRank process) {
  const GroupConstants& g = params.g;
  const LanePointers& lane = params.lane;
  const OperationParams& op = params.op;
  if (Faulted(g)) return;  // then not all is packed
  const Messages wire{g, lane, op, kWire, lane.scratch->state.sent};
  const auto region = static_cast<int32_t>(blockIdx.x);
  const int32_t peer = wire.Peer(region);
  if (g.memories[peer] != nullptr) return;
  const char* const from =
      g.memory + g.layout.SendRegionOffset(kWire, lane.index, wire.number, region);
  const int32_t there = g.nodes.RegionAtPeer(kWire, g.rank, region);
  char* const to = g.memory + g.layout.RecvRegionOffset(kWire, lane.index, wire.number, there);
  char* const word = g.memory + g.layout.SignalOffset(kWire, lane.index, wire.number, there);
  const int32_t rows = reinterpret_cast<const RegionHeader*>(from)->rows;
  const int64_t bytes = g.layout.header_bytes + LayoutOf(g, op, rows).bytes;
  nvshmemx_putmem_signal_nbi_block(to, from, static_cast<size_t>(bytes),
                                   reinterpret_cast<uint64_t*>(word),
                                   SignalValue(wire.number, kAllChunks), NVSHMEM_SIGNAL_SET,
                                   process.of_rank[peer]);
}

}  // namespace smfree::cuda
