// SPDX-License-Identifier: Apache-2.0
//
// The order in which the threads of a process launch what its GPUs run: a recv only after all the
// sends that it waits for.
//
// A thread that launches a kernel for the first time loads it, which may take until its device is
// idle, and may hold a lock of the process meanwhile (JAX's Mosaic runtime does). Were that device
// in a recv that waits for a send which another thread launches behind the same lock, nobody could
// go on before the deadline.
//
// Replays of a CUDA graph do not come by here, and have nothing to load. Where ranks disagree about
// what is replayed, waiting would be in vain: the first wait that is switches waiting off.
#ifndef SMFREE_CSRC_CUDA_LAUNCHES_H_
#define SMFREE_CSRC_CUDA_LAUNCHES_H_

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <vector>

namespace smfree::cuda {

class Launches {
 public:
  Launches(int32_t num_ranks, int32_t num_lane_indices)
      : sends_(static_cast<size_t>(num_lane_indices),
               std::vector<int64_t>(static_cast<size_t>(num_ranks))) {}

  // `rank` has launched a send.
  void NoteSend(int32_t rank, int32_t lane_index) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      ++sends_[static_cast<size_t>(lane_index)][static_cast<size_t>(rank)];
    }
    changed_.notify_all();
  }

  // Before `rank` launches the recv of its last send: until all ranks have launched as many sends
  // on that lane. False if they have not after `bound`; from then on it returns at once.
  bool AwaitSends(int32_t rank, int32_t lane_index, std::chrono::nanoseconds bound) {
    std::unique_lock<std::mutex> lock(mutex_);
    const std::vector<int64_t>& sends = sends_[static_cast<size_t>(lane_index)];
    const int64_t mine = sends[static_cast<size_t>(rank)];
    const bool launched = changed_.wait_for(lock, bound, [&] {
      return off_ || *std::min_element(sends.begin(), sends.end()) >= mine;
    });
    lock.unlock();
    if (!launched) SwitchOff();
    return launched;
  }

  // Nobody waits any more: the group is at fault, and sends will not come.
  void SwitchOff() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      off_ = true;
    }
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::vector<int64_t>> sends_;  // [lane index][rank]
  bool off_ = false;
};

}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_LAUNCHES_H_
