// SPDX-License-Identifier: Apache-2.0
//
// What a group can tell: its faults, counters, sizes and traces. Device memory is read without
// waiting for kernels; where a GPU lets nobody read, that is said after a while.
#include <algorithm>
#include <chrono>
#include <cstddef>
#include <optional>
#include <shared_mutex>
#include <type_traits>
#include <utility>

#include "csrc/cuda/host/background.h"
#include "csrc/cuda/host/group.h"

namespace smfree::cuda {
namespace {

constexpr std::chrono::seconds kRead{10};  // how long reading may take

// Device memory as it is now.
template <typename T>
StatusOr<std::vector<T>> ReadDevice(int32_t device, const void* from, size_t count) {
  static_assert(std::is_trivially_copyable_v<T>);
  std::vector<T> copy(count);
  const Status status =
      OnOwnStream(device, "reading what a GPU has counted", [&](cudaStream_t stream) {
        return cudaMemcpyAsync(copy.data(), from, count * sizeof(T), cudaMemcpyDeviceToHost,
                               stream);
      });
  if (!status.ok()) return status;
  return copy;
}

// What `read()` finds in an open group. kClosed: it is closed, or about to be.
template <typename Read>
auto ReadWhileOpen(std::shared_ptr<GroupState> state, Read read) -> decltype(read(*state)) {
  auto result = ResultWithin(kRead, [state, read]() -> decltype(read(*state)) {
    const std::shared_lock<std::shared_mutex> open(state->open_mutex, std::try_to_lock);
    if (!open.owns_lock() || state->closed) {
      return Status(FaultKind::kClosed, "the group is closed");
    }
    return read(*state);
  });
  if (result) return std::move(*result);
  return Status(FaultKind::kDeadline,
                "a GPU has not let its counters be read for " + std::to_string(kRead.count()) +
                    " s. Fix: see what runs there and does not end.");
}

}  // namespace

StatusOr<GroupStats> GroupState::Count() const {
  GroupStats stats;
  stats.sets_added = num_sets - first_sets;
  for (const auto& rank : ranks) {
    const FaultRecord& fault = rank->host.as<HostPage>()->fault;
    if (__atomic_load_n(&fault.ready, __ATOMIC_ACQUIRE) != 0) {
      stats.sends_without_set += fault.kind == FaultKind::kNoFreeSet;
    }
    auto read = ReadDevice<RankState>(rank->device, rank->state.as<void>(), 1);
    if (!read.ok()) return read.status();
    const RankState& state = read.value()[0];
    stats.faulted |= state.faulted != 0;
    stats.rows_dropped += static_cast<int64_t>(state.rows_dropped);
    stats.rows_relayed += static_cast<int64_t>(state.rows_relayed);
    stats.bytes_relayed += static_cast<int64_t>(state.bytes_relayed);
    for (const auto operation : {Operation::kDispatch, Operation::kCombine}) {
      const auto i = static_cast<int32_t>(operation);
      stats.internode_bytes[i] += static_cast<int64_t>(state.internode_bytes[i]);
    }
    for (int32_t phase = 0; phase < kPhases; ++phase) {
      stats.phases[phase].calls += static_cast<int64_t>(state.calls[phase]);
      stats.phases[phase].rows += static_cast<int64_t>(state.rows[phase]);
      stats.phases[phase].bytes += static_cast<int64_t>(state.bytes[phase]);
      stats.phases[phase].wait_ns += static_cast<int64_t>(state.wait_ns[phase]);
    }
  }
  return stats;
}

StatusOr<std::vector<PhaseRecord>> GroupState::ReadTrace() const {
  std::vector<PhaseRecord> records;
  const SetScratchLayout scratch_layout(config);
  for (const auto& rank : ranks) {
    for (int32_t set = 0; set < num_sets; ++set) {
      const char* const scratch = rank->scratch.as<char>() + set * scratch_layout.bytes;
      auto entries = ReadDevice<TraceEntry>(rank->device, scratch + offsetof(SetScratch, trace),
                                            size_t{kTracedOperations} * kPhases);
      if (!entries.ok()) return entries.status();
      for (size_t i = 0; i < entries.value().size(); ++i) {
        const TraceEntry& entry = entries.value()[i];
        if (entry.number == kNoOperation) continue;
        records.push_back({replica, rank->rank, entry.lane, SideOf(entry.derivation),
                           static_cast<Phase>(i % kPhases), OperationOfNumber(entry.number),
                           entry.begin_ns, entry.end_ns, entry.bytes_read, entry.bytes_written});
      }
    }
  }
  std::sort(records.begin(), records.end(), [](const PhaseRecord& a, const PhaseRecord& b) {
    return a.begin_ns < b.begin_ns;
  });
  return records;
}

Status Group::Fault() const {
  const std::shared_lock<std::shared_mutex> open(state_->open_mutex, std::try_to_lock);
  if (!open.owns_lock() || state_->closed) {
    const std::lock_guard<std::mutex> lock(state_->fault_mutex);
    return state_->host_fault;
  }
  return state_->Failed() ? state_->FirstFault() : Status();
}

Status Group::Check() {
  Status fault = Fault();
  if (!fault.ok()) return fault;
  const std::shared_lock<std::shared_mutex> open(state_->open_mutex, std::try_to_lock);
  if (!open.owns_lock() || state_->closed) return {};
  return state_->TakeOverflow();
}

StatusOr<GroupStats> Group::stats() const {
  auto stats = ReadWhileOpen(state_, [](const GroupState& state) { return state.Count(); });
  if (stats.status().kind() != FaultKind::kClosed) return stats;
  const std::lock_guard<std::mutex> lock(state_->fault_mutex);
  return state_->last_stats;
}

Memory Group::memory() const {
  if (state_->released) return {};
  const std::lock_guard<std::mutex> reading(state_->sizes_mutex);
  return state_->sizes;
}

StatusOr<std::vector<PhaseRecord>> Group::Trace() const {
  return ReadWhileOpen(state_, [](const GroupState& state) { return state.ReadTrace(); });
}

Status Group::StartWireTrace() {
  const auto started = ReadWhileOpen(state_, [](const GroupState& state) -> StatusOr<bool> {
    for (const auto& rank : state.ranks) {
      if (!rank->mover) continue;
      const Status status = rank->mover->StartTrace();
      if (!status.ok()) return status;
    }
    return true;
  });
  return started.status();
}

StatusOr<std::vector<WireRecord>> Group::EndWireTrace() {
  return ReadWhileOpen(state_, [](const GroupState& state) -> StatusOr<std::vector<WireRecord>> {
    std::vector<WireRecord> records;
    for (const auto& rank : state.ranks) {
      if (!rank->mover) continue;
      std::vector<WireRecord> some = rank->mover->EndTrace();
      for (WireRecord& record : some) record.replica = state.replica;
      records.insert(records.end(), some.begin(), some.end());
    }
    return records;
  });
}

}  // namespace smfree::cuda
