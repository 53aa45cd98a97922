// SPDX-License-Identifier: Apache-2.0
//
// How a group ends: its programs, its movers, its memory. What CUDA must be waited for here happens
// on threads of its own (background.h), since a device may run what never ends: a collective that
// another rank did not join, or a put to a peer that is gone.
#include <chrono>
#include <string>
#include <thread>
#include <utility>

#include "csrc/cuda/host/background.h"
#include "csrc/cuda/host/group.h"

namespace smfree::cuda {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

// How long what was launched may go on; the host may pause between two launches of a program.
constexpr milliseconds kGrace{500};
// How long what was told to end may take.
constexpr milliseconds kTold{200};
// How long giving back the memory may take; and after a fault among processes, where a put to a
// peer that has died may never end.
constexpr milliseconds kEnd{5000}, kEndAfterFault{300};
constexpr milliseconds kLook{1};

void Synchronize(const GroupState& state) {
  for (const auto& rank : state.ranks) {
    const DeviceScope scope(rank->device);
    (void)cudaDeviceSynchronize();
  }
}

bool IsIdleWithin(const GroupState& state, milliseconds patience) {
  const Clock::time_point end = Clock::now() + patience;
  while (!state.idle && Clock::now() < end) std::this_thread::sleep_for(kLook);
  return state.idle;
}

}  // namespace

Status Group::Close() {
  const std::lock_guard<std::mutex> once(close_mutex_);
  GroupState& state = *state_;
  if (state.closed) return {};
  // A program under way ends by itself, also where one rank's part is not launched yet and
  // another's waits for it, in a collective too. After a fault all has been told to end.
  if (!state.Failed()) {
    (void)Background([state = state_] { Synchronize(*state); }).EndsWithin(kGrace);
  }
  const std::shared_ptr<Group> removed = Unregister();  // perhaps the last but the caller's
  state.KeepFault();
  state.closed = true;
  // Nothing more is launched. A rank that still waits, waits for one whose part never was.
  const Background release([state = state_] { state->Release(); });
  bool idle = IsIdleWithin(state, state.Failed() ? kTold : kGrace);
  if (!idle && !state.Failed()) {
    state.Fail(Status(FaultKind::kClosed, "the group was closed while a rank was waiting"));
    idle = IsIdleWithin(state, kGrace);
  }
  const bool may_never_end = state.nvshmem_memory && state.Failed();
  if (idle && release.EndsWithin(may_never_end ? kEndAfterFault : kEnd)) return {};
  std::string devices;
  for (const auto& rank : state.ranks) {
    devices += (devices.empty() ? "" : ", ") + std::to_string(rank->device);
  }
  return Status(FaultKind::kDeadline,
                "the group is closed, but what runs on GPU " + devices +
                    (idle ? ", or a put to another process," : "") +
                    " has not ended; its memory (" + std::to_string(memory().device_bytes) +
                    " bytes on the GPUs of this process) is given back when that ends, or with "
                    "the process. Fix: see what waits there, such as a collective that another "
                    "rank never joined.");
}

void GroupState::KeepFault() {
  if (!Failed()) return;
  Status fault = FirstFault();
  const std::lock_guard<std::mutex> lock(fault_mutex);
  host_fault = std::move(fault);
}

void GroupState::KeepStats() {
  StatusOr<GroupStats> stats = Count();
  const std::lock_guard<std::mutex> lock(fault_mutex);
  last_stats = std::move(stats);
}

void GroupState::Release() {
  const std::unique_lock<std::shared_mutex> launched(open_mutex);  // nobody is launching
  KeepStats();  // in case the devices do not end what they run
  Synchronize(*this);
  idle = true;
  KeepStats();
  KeepFault();
  // All movers before any memory: they write to one another's.
  for (const auto& rank : ranks) rank->mover.reset();
  Allocation word;
  {
    const std::lock_guard<std::mutex> lock(fault_mutex);
    word = std::move(failed);
    // A rank that nobody kept waiting has not noticed that the group was closed.
    const bool noticed = !last_stats.ok() || last_stats.value().faulted;
    if (host_fault.kind() == FaultKind::kClosed && !noticed) host_fault = {};
  }
  released = true;
  for (const auto& rank : ranks) {
    rank->memory.reset();
    rank->state = {};
    rank->scratch = {};
    rank->peer_table = {};
    rank->queue = {};
    rank->host = {};
  }
  announcements = {};
  if (nvshmem_memory) nvshmem_memory->in_use = false;
}

}  // namespace smfree::cuda
