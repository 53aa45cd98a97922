// SPDX-License-Identifier: Apache-2.0
//
// Announcements (announcement.h) of the wire between ranks of different nodes. This rank's are put
// into the memory of its far peers, at the place that they have here; theirs come into the memory
// of this rank, and are copied from there to the table in host memory that the movers of this node
// read. The table is one for all ranks of the node: whoever has them first writes them down.
#ifndef SMFREE_CSRC_CUDA_NETWORK_FAR_ANNOUNCEMENTS_H_
#define SMFREE_CSRC_CUDA_NETWORK_FAR_ANNOUNCEMENTS_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "csrc/core/status.h"
#include "csrc/cuda/memory/allocation.h"
#include "csrc/cuda/network/far_peers.h"
#include "csrc/protocol/announcement.h"
#include "csrc/protocol/lanes.h"
#include "csrc/protocol/layout.h"

namespace smfree::cuda {

class FarAnnouncements {
 public:
  struct Wiring {
    int32_t rank;
    std::vector<int32_t> far_ranks;  // those of the wire's members
    Layout layout;
    const char* memory;   // of this rank
    uint64_t* announced;  // the table in host memory
    const FarPeers* far;
  };
  static StatusOr<std::unique_ptr<FarAnnouncements>> Make(Wiring wiring);
  ~FarAnnouncements();

  // Tells the far peers, once, what this rank has announced for an operation, which its kernels
  // have written into the table and into its memory.
  void Tell(int32_t set, int64_t number);
  // Looks for what the far peers have announced for it, which this rank waits for. Returns at once:
  // what has come is in the table when it was called again a little later.
  Status Look(int32_t set, int64_t number, cudaStream_t stream);

 private:
  explicit FarAnnouncements(Wiring wiring)
      : wiring_(std::move(wiring)), table_(wiring_.layout.Announcements(kWire)) {}
  // Each set has its own: operations of several sets may wait, and none may take away what another
  // has asked for.
  struct Set {
    int64_t told = kNoOperation;  // the last operation that the far peers were told of
    Allocation words;             // pinned: a copy of those of one slot
    cudaEvent_t copied = nullptr;
    int64_t copying = kNoOperation;  // the operation that the copy is for, while it is under way
  };
  void WriteDown(int32_t set, int64_t number) const;

  const Wiring wiring_;
  const AnnouncementTable table_;
  std::vector<Set> sets_;
};

}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_NETWORK_FAR_ANNOUNCEMENTS_H_
