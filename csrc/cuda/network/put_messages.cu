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
    smfree_put_messages(const Context c, const ProcessOfRank process) {
  if (Faulted(c)) return;  // then not all is packed
  const Messages wire{c, kWire, c.scratch->state.sent};
  const auto region = static_cast<int32_t>(blockIdx.x);
  const int32_t peer = wire.Peer(region);
  if (c.memories[peer] != nullptr) return;
  const char* const from =
      c.memory + c.layout.SendRegionOffset(kWire, c.lane_index, wire.number, region);
  const int32_t there = c.nodes.RegionAtPeer(kWire, c.rank, region);
  char* const to = c.memory + c.layout.RecvRegionOffset(kWire, c.lane_index, wire.number, there);
  char* const word = c.memory + c.layout.SignalOffset(kWire, c.lane_index, wire.number, there);
  const int32_t rows = reinterpret_cast<const RegionHeader*>(from)->rows;
  const int64_t bytes = c.layout.header_bytes + LayoutOf(c, rows).bytes;
  nvshmemx_putmem_signal_nbi_block(to, from, static_cast<size_t>(bytes),
                                   reinterpret_cast<uint64_t*>(word),
                                   SignalValue(wire.number, kAllChunks), NVSHMEM_SIGNAL_SET,
                                   process.of_rank[peer]);
}

}  // namespace smfree::cuda
