// SPDX-License-Identifier: Apache-2.0
//
// How many operations of a group a program has in flight together, known when it is compiled: so
// many sets of buffers it takes.
//
// XLA creates the calls of a program on one thread, in the order of its schedule, and before it
// runs for the first time; in that order a send begins an operation, and a recv ends it. The calls
// of a loop or a branch stand where it does, and end what they begin. CUDA graphs run the same
// order, when no code on the host could see it.
//
// A recv ends an operation of its own kind, if there is one: others receive nothing, as the
// cotangent of what nothing depends on, or were cloned by the compiler. What a program leaves in
// flight when its compilation has ended is for other programs to receive, and nobody knows how
// often it runs before.
#ifndef SMFREE_CSRC_CUDA_HOST_IN_FLIGHT_H_
#define SMFREE_CSRC_CUDA_HOST_IN_FLIGHT_H_

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <tuple>
#include <utility>
#include <vector>

#include "csrc/protocol/identity.h"

namespace smfree::cuda {

// What the call of a send and that of its recv have in common.
struct CompiledOperation {
  int64_t group = 0;
  int32_t lane = 0;
  int32_t derivation = 0;
  uint32_t call_site = 0;
  Operation operation = Operation::kDispatch;

  auto tied() const { return std::tie(lane, derivation, call_site, operation); }
  friend bool operator<(const CompiledOperation& a, const CompiledOperation& b) {
    return a.tied() < b.tied();
  }
};

class InFlight {
 public:
  // The one of this process. Leaked: programs may be compiled while it exits.
  static InFlight& Get() {
    static InFlight& in_flight = *new InFlight;
    return in_flight;
  }

  struct Need {
    int32_t most = 0;     // of any program so far that got what it takes
    bool leaves = false;  // whether one of them leaves operations in flight
    bool uncounted = false;  // whether calls were created outside of any compilation
  };

  // Around a compilation that this thread waits for. Before jax 0.11 another thread creates the
  // calls, and a program may be loaded: there nobody knows which calls belong together.
  void CompilationBegins() { Here() = {true, {}}; }
  // Returns the groups whose operations it leaves in flight.
  std::vector<int64_t> CompilationEnds() {
    std::vector<int64_t> groups;
    for (const auto& [group, here] : std::exchange(Here(), {}).groups) {
      if (here.all > 0) groups.push_back(group);
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const int64_t group : groups) needs_[group].leaves = true;
    return groups;
  }

  // What it has created counts for nothing.
  void CompilationFails() { Here().groups.clear(); }

  // The call of a send. Returns how many operations of its group are in flight then; 0 if nobody
  // knows.
  int32_t AddSend(const CompiledOperation& operation) {
    if (!Here().counts) {
      const std::lock_guard<std::mutex> lock(mutex_);
      needs_[operation.group].uncounted = true;
      return 0;
    }
    OfGroup& here = Here().groups[operation.group];
    ++here.of_kind[operation];
    return ++here.all;
  }
  // There are as many sets, or there will be.
  void Keep(int64_t group, int32_t in_flight) {
    const std::lock_guard<std::mutex> lock(mutex_);
    int32_t& most = needs_[group].most;
    most = std::max(most, in_flight);
  }
  // The call of a recv.
  void AddRecv(const CompiledOperation& operation) {
    if (!Here().counts) return;
    OfGroup& here = Here().groups[operation.group];
    int32_t& alike = here.of_kind[operation];
    if (alike == 0) return;
    --alike;
    --here.all;
  }

  Need Of(int64_t group) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto it = needs_.find(group);
    return it == needs_.end() ? Need{} : it->second;
  }

 private:
  struct OfGroup {
    int32_t all = 0;
    std::map<CompiledOperation, int32_t> of_kind;
  };
  // The program that is being compiled on this thread, if any.
  struct Program {
    bool counts = false;
    std::map<int64_t, OfGroup> groups;
  };
  InFlight() = default;
  static Program& Here() {
    thread_local Program here;
    return here;
  }

  mutable std::mutex mutex_;
  std::map<int64_t, Need> needs_;  // by group
};

}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_HOST_IN_FLIGHT_H_
