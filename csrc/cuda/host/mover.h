// SPDX-License-Identifier: Apache-2.0
//
// The copy-engine mover of one rank: a proxy thread that takes the descriptors which the pack
// kernels write to pinned memory, and for each enqueues on the peer's stream the copy (S5) and,
// behind it, the store of the `arrived` signal (S6). No SM takes part. Peers in other nodes are
// reached in another way: far_peers.h.
//
// One stream per peer keeps the chunks of a message in order, and lets the copies to different
// peers run side by side. Chunks of large operations wait here until the members of their leg have
// announced (release.h); those of each set and leg for themselves, so that none holds up another.
//
// The thread looks for descriptors all the time while there is work, and ever less often while
// there is none: kernels that are replayed from a CUDA graph have no other way to wake it. What it
// calls in CUDA is in a context of its own (mover_context.h). It also tells the peers in other
// nodes of this rank's fault.
#ifndef SMFREE_CSRC_CUDA_HOST_MOVER_H_
#define SMFREE_CSRC_CUDA_HOST_MOVER_H_

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "csrc/cuda/driver/driver.h"
#include "csrc/cuda/host/release.h"
#include "csrc/cuda/host/state.h"
#include "csrc/cuda/network/far_announcements.h"
#include "csrc/cuda/network/far_peers.h"
#include "csrc/core/status.h"

namespace smfree::cuda {

constexpr size_t kWireRecords = 1024;

class Mover {
 public:
  struct Wiring {
    int32_t device;
    int32_t rank;
    GroupConfig config;
    Layout layout;
    uint64_t* announced;  // by all ranks, as AnnouncementTable says
    std::vector<char*> memories;    // of all ranks; nullptr for far ones
    std::unique_ptr<FarPeers> far;  // null if there are none
    const Descriptor* queue;
    uint64_t queue_mask;
    const FaultRecord* fault;  // of this rank
    // From the proxy thread:
    std::function<void()> on_put;    // the last one of a message to a far peer
    std::function<void()> on_fault;                  // of this rank, which has far peers
    std::function<void(Status)> on_error;            // at most once
  };

  // Starts the thread when there are peers.
  static StatusOr<std::unique_ptr<Mover>> Start(Wiring wiring);
  // Copies what is in the queue, waits for the copies and ends the thread.
  ~Mover();

  // See Group::StartWireTrace and EndWireTrace: of the copies, not of what goes to far peers.
  Status StartTrace();
  std::vector<WireRecord> EndTrace();

  // A hint that descriptors will come soon.
  void Wake() { awake_.store(true, std::memory_order_relaxed); }

 private:
  Mover(Wiring wiring, const Driver& driver, CUcontext context)
      : wiring_(std::move(wiring)), driver_(driver), context_(context) {}
  // A copy with the events around it.
  struct Timed {
    Descriptor chunk;
    int64_t bytes;
    cudaEvent_t begin, end;
  };

  // The region of a chunk's message here and at the peer, and the signal there; as offsets.
  struct Ends {
    int64_t from, to, signal;
  };

  Status ConnectFar();
  void Run();
  Ends EndsOf(const Descriptor& chunk) const;
  // A chunk that need not wait: its message stands in its region.
  Status Move(const Descriptor& chunk);
  // A chunk that waits for announcements.
  void Hold(const Descriptor& chunk);
  // What waits for announcements that are there now. Whether anything did.
  StatusOr<bool> MoveReleased(Release& release);
  void PutReleased(const Descriptor& chunk, const Ends& ends,
                   const std::vector<Transfer>& payload);
  Status Copy(const Descriptor& chunk, int32_t peer, const std::vector<Transfer>& transfers,
              int64_t signal);
  int32_t PeerOf(const Descriptor& chunk) const {
    return NodesOf(wiring_.config).Peer(chunk.leg, wiring_.rank, chunk.region);
  }
  // Whether there is nothing to tell the far peers any more.
  bool ToldFault() const;
  // Under trace_mutex_; null if the trace has ended or is full.
  const Timed* NextTimed(const Descriptor& chunk, int64_t bytes);
  void ForgetTimed();

  Wiring wiring_;
  const Driver& driver_;
  CUcontext context_;
  std::vector<cudaStream_t> streams_;  // by peer
  std::vector<Release> releases_;      // by set and leg
  std::unique_ptr<FarAnnouncements> far_announcements_;  // null: no far peers
  std::atomic<bool> stop_{false};
  std::atomic<bool> awake_{false};
  std::atomic<bool> tracing_{false};
  std::mutex trace_mutex_;  // of what follows
  int64_t trace_origin_ns_ = 0;  // device time of trace_origin_
  cudaEvent_t trace_origin_ = nullptr;
  std::vector<Timed> timed_;
  std::thread thread_;
};

}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_HOST_MOVER_H_
