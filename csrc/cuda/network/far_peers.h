// SPDX-License-Identifier: Apache-2.0
//
// The way of one rank's mover to its peers in other nodes: puts of NVSHMEM, in S5, S6 and for fault
// words. No kernel stores to these peers.
//
// Order. A put raises `arrived` when its own bytes have been delivered; two puts are not ordered,
// even to one peer, and a signal vouches for all chunks of its message so far. So on a stream per
// peer every chunk but the first of its message stands behind a quiet: what came before it has been
// delivered. Different messages need no order (PROTOCOL.md, rule 3).
//
// Where NVLink does not lead to the peer, each call is a kernel of one thread, which ends when the
// network has taken or delivered what it should. Hence
// - all of them are called once while the group is made: a kernel is loaded at its first launch;
// - the group's own kernels leave room on the device (Rank::num_sms): while one waits for a peer,
//   its rank's messages to others have to leave. Two of its blocks may take all registers of an
//   SM, so it has two blocks for all SMs but one; then some SM has one at most;
// - the streams belong to the context that NVSHMEM was initialised in, the primary one. What holds
//   that up (mover_context.h) holds up messages to far peers, and those to near peers not. So a
//   recv is launched after the puts of its rank (launch_order.h).
#ifndef SMFREE_CSRC_CUDA_NETWORK_FAR_PEERS_H_
#define SMFREE_CSRC_CUDA_NETWORK_FAR_PEERS_H_

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "csrc/cuda/driver/driver.h"
#include "csrc/cuda/network/nvshmem.h"
#include "csrc/core/status.h"

namespace smfree::cuda {

class FarPeers {
 public:
  struct Wiring {
    int32_t device;
    const Nvshmem* nvshmem;
    char* memory;                          // of this rank, zero; at the same offset everywhere
    int64_t fault_word;                    // in the memory of each rank
    std::vector<int32_t> process_of_rank;  // kNear: not one of these peers
  };
  static constexpr int32_t kNear = -1;

  // No rank may send before all have come back from here.
  static StatusOr<std::unique_ptr<FarPeers>> Connect(Wiring wiring);
  // Waits until everything has been delivered.
  ~FarPeers();

  // Bytes from here to there, and the signal that says so; both places are offsets in the memory.
  struct Chunk {
    bool first;  // of its message
    int64_t from, to, bytes;
    int64_t word;
    uint64_t signal;
  };
  void Put(int32_t peer, const Chunk& chunk) const;
  // Tells them all that this rank, which is `rank`, has met a fault.
  void TellFault(int32_t rank) const;

 private:
  FarPeers(Wiring wiring, const Driver& driver, CUcontext context)
      : wiring_(std::move(wiring)), driver_(driver), context_(context) {}
  Status MakeStreams();
  Status CallAll() const;

  const Wiring wiring_;
  const Driver& driver_;
  const CUcontext context_;
  std::vector<cudaStream_t> streams_;  // by rank; nullptr for near ones
};

}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_NETWORK_FAR_PEERS_H_
