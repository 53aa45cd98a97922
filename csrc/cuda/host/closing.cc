// SPDX-License-Identifier: Apache-2.0
//
// How a group ends: its programs, its movers, its memory. What CUDA must be waited for here happens
// on threads of its own (background.h), since a device may run what never ends: a collective that
// another rank did not join, or a put to a peer that is gone.
#include <algorithm>
#include <chrono>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "csrc/cuda/host/background.h"
#include "csrc/cuda/host/group.h"

namespace smfree::cuda {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

// How long the host may take between two launches of a program.
constexpr milliseconds kGrace{500};
// How long what was told to end, and giving back the memory, may take.
constexpr milliseconds kEnd{5000};
constexpr milliseconds kLook{1};

// Ends when all that was launched on the device by now has ended.
Background DeviceIdle(int32_t device) {
  return Background([device] {
    const DeviceScope scope(device);
    (void)cudaDeviceSynchronize();
  });
}

// Waits for the programs that were launched, up to timeout_s. No longer than kGrace when nobody can
// bring what they wait for: when the group is at fault; or when a rank has nothing left to run. It
// has then received the last operation of all ranks, so that all of them have sent that one
// (PROTOCOL.md, lemma): who still waits, waits for an operation that this rank does not take part in.
void LetProgramsEnd(const GroupState& state) {
  std::vector<Background> ranks;
  for (const auto& rank : state.ranks) ranks.push_back(DeviceIdle(rank->device));
  Clock::time_point deadline = Clock::now() + state.Timeout();
  bool in_vain = false;
  for (;; std::this_thread::sleep_for(kLook)) {
    const auto ended = std::count_if(ranks.begin(), ranks.end(),
                                     [](const Background& rank) { return rank.Ended(); });
    if (ended == static_cast<std::ptrdiff_t>(ranks.size())) return;
    const Clock::time_point now = Clock::now();
    if (!in_vain && (ended > 0 || state.Failed())) {
      in_vain = true;
      deadline = std::min(deadline, now + kGrace);
    }
    if (now >= deadline) return;
  }
}

}  // namespace

Status Group::Close() {
  const std::lock_guard<std::mutex> once(close_mutex_);
  GroupState& state = *state_;
  if (state.closed) return {};
  const Clock::time_point begin = Clock::now();
  const auto patience = state.Failed() ? std::chrono::nanoseconds(0) : state.Timeout();
  LetProgramsEnd(state);
  const std::shared_ptr<Group> removed = Unregister();  // perhaps the last but the caller's
  state.closed = true;
  // Nothing more is launched. A rank that still waits, waits for one whose part never was.
  const Background release([state = state_] { state->Release(); });
  const Clock::time_point grace = Clock::now() + kGrace;
  while (!state.idle && Clock::now() < grace) std::this_thread::sleep_for(kLook);
  if (!state.idle) {
    state.Fail(Status(FaultKind::kClosed, "the group was closed while a rank was waiting"));
  }
  const auto left = std::max<Clock::duration>(begin + patience - Clock::now(), {});
  if (release.EndsWithin(left + kEnd)) return {};
  std::string devices;
  for (const auto& rank : state.ranks) {
    devices += (devices.empty() ? "" : ", ") + std::to_string(rank->device);
  }
  return Status(FaultKind::kDeadline,
                "the group is closed, but what runs on GPU " + devices +
                    " has not ended; its memory (" + std::to_string(state.sizes.device_bytes) +
                    " bytes on the GPUs of this process) is given back when that ends, or with "
                    "the process. Cure: see what waits there, such as a collective that another "
                    "rank never joined.");
}

void GroupState::Release() {
  const std::unique_lock<std::shared_mutex> launched(open_mutex);  // nobody is launching
  for (const auto& rank : ranks) {
    const DeviceScope scope(rank->device);
    (void)cudaDeviceSynchronize();
  }
  idle = true;
  StatusOr<Stats> counted = Count();
  // A rank that nobody kept waiting has not noticed that the group was closed.
  Status fault = Failed() ? FirstFault() : Status();
  if (fault.kind() == FaultKind::kClosed && counted.ok() && !counted.value().faulted) fault = {};
  // All movers before any memory: they write to one another's.
  for (const auto& rank : ranks) rank->mover.reset();
  Allocation word;
  {
    const std::lock_guard<std::mutex> lock(fault_mutex);
    word = std::move(failed);
    last_stats = std::move(counted);
    host_fault = std::move(fault);
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
  if (block) block->in_use = false;
}

}  // namespace smfree::cuda
