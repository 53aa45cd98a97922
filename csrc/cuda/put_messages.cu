// SPDX-License-Identifier: Apache-2.0
//
// S5 and S6 for peers in other nodes, where the GPU itself starts the puts: behind the kernel that
// has packed the messages, on its stream. The only code with NVSHMEM's device library: it is a
// module of its own, which put_kernel.cc loads.
//
// A block per message puts it chunk by chunk. Calls return when the puts are posted, so that no SM
// waits for the network; the messages stay as they are until their receivers have read them
// (PROTOCOL.md, rule 3). A fence between them keeps the order of the chunks, for which the signal
// vouches together.
#include <nvshmem.h>
#include <nvshmemx.h>

#include "csrc/cuda/messages.cuh"
#include "csrc/cuda/put_kernel.h"

namespace smfree::cuda {

extern "C" __global__ void smfree_put_messages(const Context c, const ProcessOfRank process) {
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
  const Chunks chunks(reinterpret_cast<const RegionHeader*>(from)->rows, c.chunks);
  for (int32_t chunk = 0; chunk < chunks.count; ++chunk) {
    const ChunkBytes part(c, chunks, chunk);
    nvshmemx_putmem_signal_nbi_block(to + part.begin, from + part.begin,
                                     static_cast<size_t>(part.end - part.begin),
                                     reinterpret_cast<uint64_t*>(word),
                                     SignalAfterChunk(wire.number, chunk, chunks.count),
                                     NVSHMEM_SIGNAL_SET, process.of_rank[peer]);
    if (threadIdx.x == 0) nvshmem_fence();
    __syncthreads();
  }
}

}  // namespace smfree::cuda
