// SPDX-License-Identifier: Apache-2.0
//
// How many operations of a group a program has in flight together, known when it is compiled: so
// many sets of buffers it takes.
//
// XLA creates the calls of a program on one thread, in the order of its schedule, and before it
// runs for the first time; in that order a send begins an operation, and a recv ends one. The calls
// of a loop or a branch stand where it does, and end what they begin. CUDA graphs run the same
// order, when no code on the host could see it.
//
// What a program leaves in flight counts until the next compilation begins on its thread.
#ifndef SMFREE_CSRC_CUDA_HOST_IN_FLIGHT_H_
#define SMFREE_CSRC_CUDA_HOST_IN_FLIGHT_H_

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>

namespace smfree::cuda {

class InFlight {
 public:
  // Of this process. Leaked: programs may be compiled while it exits.
  static InFlight& Get() {
    static InFlight& in_flight = *new InFlight;
    return in_flight;
  }

  // A compilation that this thread waits for. Before jax 0.11 another thread creates the calls:
  // there what a program leaves in flight counts for the next one, too, which takes memory and does
  // no harm.
  void CompilationBegins() { Here().clear(); }

  // The call of a send, or of a recv, which the compiler may have cloned.
  void AddSend(int64_t group) {
    const int32_t now = ++Here()[group];
    const std::lock_guard<std::mutex> lock(mutex_);
    int32_t& most = most_[group];
    most = std::max(most, now);
  }
  void AddRecv(int64_t group) {
    int32_t& now = Here()[group];
    now = std::max(now - 1, 0);
  }

  // The most of any program so far.
  int32_t Most(int64_t group) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto it = most_.find(group);
    return it == most_.end() ? 0 : it->second;
  }

 private:
  InFlight() = default;
  // By group, of the program that is being compiled on this thread.
  static std::map<int64_t, int32_t>& Here() {
    thread_local std::map<int64_t, int32_t> here;
    return here;
  }

  mutable std::mutex mutex_;
  std::map<int64_t, int32_t> most_;
};

}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_HOST_IN_FLIGHT_H_
