// SPDX-License-Identifier: Apache-2.0
//
// The order in which the threads of a process launch what its GPUs run: a recv, or a relay, only
// after all the sends that it waits for; and if these come over the wire, after its own rank's puts
// to other nodes. A relay is the send of its second leg.
//
// A thread that launches a kernel for the first time loads it, which may take until its device is
// idle, and may hold a lock of the process meanwhile (JAX's Mosaic runtime does). Were that device
// in a recv that waits for a send which another thread launches behind the same lock, nobody could
// go on before the deadline.
//
// Puts to other nodes are launched in the context of these kernels (far_peers.h), and a thread that
// loads one holds that up, too, until the recv before it has ended. What this recv waits for could
// be held up in the same way at its sender. Where each rank launches its puts before what waits for
// others', all of them get under way, whatever is loaded then: take the earliest wait that never
// ends; only waits before it hold up the puts that it waits for, and these end.
//
// Replays of a CUDA graph do not come by here, and have nothing to load. Where ranks disagree about
// what is replayed, waiting would be in vain: the first wait that is switches waiting off.
#ifndef SMFREE_CSRC_CUDA_HOST_LAUNCH_ORDER_H_
#define SMFREE_CSRC_CUDA_HOST_LAUNCH_ORDER_H_

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <vector>

#include "csrc/protocol/nodes.h"

namespace smfree::cuda {

class LaunchOrder {
 public:
  explicit LaunchOrder(int32_t num_ranks)
      : puts_(static_cast<size_t>(num_ranks)), sends_{puts_, puts_} {}

  // `rank` has launched a send on that leg.
  void NoteSend(int32_t rank, Leg leg) { Note(sends_[leg], rank); }
  // The mover of `rank` has launched the last put of a message.
  void NotePut(int32_t rank) { Note(puts_, rank); }

  // Before `rank` launches what waits for the messages of that leg that belong to its last send
  // there: until all ranks have launched as many sends. False if they have not after `bound`; from
  // then on it returns at once.
  bool AwaitSends(int32_t rank, Leg leg, std::chrono::nanoseconds bound) {
    const Counts& sends = sends_[leg];
    return Await(bound, [&] {
      return *std::min_element(sends.begin(), sends.end()) >= sends[static_cast<size_t>(rank)];
    });
  }
  // The same for the puts of its last send on the wire, `messages` for each send. They are launched
  // when the send has run.
  bool AwaitPuts(int32_t rank, int32_t messages, std::chrono::nanoseconds bound) {
    const auto index = static_cast<size_t>(rank);
    return Await(bound, [&] { return puts_[index] >= sends_[kWire][index] * messages; });
  }

  // Nobody waits any more: the group has failed, and sends will not come.
  void SwitchOff() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      off_ = true;
    }
    changed_.notify_all();
  }

 private:
  using Counts = std::vector<int64_t>;  // by rank

  void Note(Counts& counts, int32_t rank) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      ++counts[static_cast<size_t>(rank)];
    }
    changed_.notify_all();
  }
  template <typename Launched>
  bool Await(std::chrono::nanoseconds bound, Launched launched) {
    std::unique_lock<std::mutex> lock(mutex_);
    const bool done = changed_.wait_for(lock, bound, [&] { return off_ || launched(); });
    lock.unlock();
    if (!done) SwitchOff();
    return done;
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  Counts puts_;  // messages of which all is put
  Counts sends_[kLegs];
  bool off_ = false;
};

}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_HOST_LAUNCH_ORDER_H_
