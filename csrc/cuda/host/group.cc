// SPDX-License-Identifier: Apache-2.0
//
// The Group of backend.h: creation, closing, what it can tell, and the registry of open groups.
#include "csrc/cuda/host/group.h"

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <future>
#include <map>
#include <string>
#include <utility>

namespace smfree::cuda {
namespace {

// How long Close lets programs under way go on.
constexpr std::chrono::milliseconds kGrace{500};

struct Registry {
  std::mutex mutex;
  std::map<int64_t, std::vector<std::shared_ptr<Group>>> groups;  // replicas share an id
};

Registry& TheRegistry() {
  static Registry& registry = *new Registry;  // leaked: handlers may run while the process exits
  return registry;
}

Status CheckOptions(const GroupOptions& options, size_t devices) {
  std::string wrong;
  if (static_cast<int32_t>(devices) != options.num_ranks) {
    wrong = std::to_string(devices) + " devices for " + std::to_string(options.num_ranks) +
            " ranks";
  } else if (options.num_ranks > kMaxRanks) {
    wrong = std::to_string(options.num_ranks) + " ranks, expected at most " +
            std::to_string(kMaxRanks);
  } else if (const Nodes nodes = NodesOf(options);
             options.hierarchical && std::max(nodes.count(), nodes.ranks_per_node) > kMaxLists) {
    wrong = std::to_string(nodes.count()) + " nodes of " + std::to_string(nodes.ranks_per_node) +
            " ranks, expected at most " + std::to_string(kMaxLists) +
            " of both in hierarchical mode";
  } else if (options.top_k > kMaxTopK) {
    wrong = "top_k " + std::to_string(options.top_k) + ", expected at most " +
            std::to_string(kMaxTopK) + " on GPUs";
  } else if (!IsTimeout(options.timeout_s)) {
    wrong = "timeout_s is " + std::to_string(options.timeout_s) +
            ", expected more than 0 and at most " + std::to_string(kMaxTimeoutS);
  } else if (const int32_t experts = options.num_experts / NodesOf(options).Regions(kWire);
             !CopyCode(options.max_tokens).Fits(experts)) {
    wrong = "max_tokens " + std::to_string(options.max_tokens) + " times experts per " +
            (options.hierarchical ? "node " : "rank ") + std::to_string(experts) +
            " does not fit 31 bits. Lower max_tokens";
  }
  return wrong.empty() ? Status() : Status(FaultKind::kInvalidArgument, wrong);
}

// Ready as soon as what was launched has ended. Its destructor waits for that.
std::future<void> DevicesIdle(const GroupState& state) {
  return std::async(std::launch::async, [&state] {
    for (const auto& rank : state.ranks) {
      const DeviceScope scope(rank->device);
      (void)cudaDeviceSynchronize();
    }
  });
}

}  // namespace

Group::Group(std::unique_ptr<GroupState> state) : state_(std::move(state)) {}
Group::~Group() { Close(); }

StatusOr<std::shared_ptr<Group>> Group::Create(int64_t group_id, const GroupOptions& options,
                                               const std::vector<int32_t>& devices) {
  Status status = CheckOptions(options, devices.size());
  if (!status.ok()) return status;
  auto state = std::make_unique<GroupState>();
  state->group_id = group_id;
  state->options = options;
  status = state->AllocateHere(devices);
  if (!status.ok()) return status;
  return Register(std::move(state));
}

StatusOr<std::shared_ptr<Group>> Group::CreateAmongProcesses(
    int64_t group_id, const GroupOptions& options, int32_t rank, int32_t device,
    const std::vector<int32_t>& process_of_rank, std::shared_ptr<NvshmemMemory> memory) {
  Status status = CheckOptions(options, process_of_rank.size());
  if (!status.ok()) return status;
  auto state = std::make_unique<GroupState>();
  state->group_id = group_id;
  state->options = options;
  status = state->AllocateAmongProcesses(rank, device, memory, process_of_rank);
  if (!status.ok()) return status;
  memory->in_use = true;
  return Register(std::move(state));
}

std::shared_ptr<Group> Group::Register(std::unique_ptr<GroupState> state) {
  const int64_t group_id = state->group_id;
  std::shared_ptr<Group> group(new Group(std::move(state)));
  Registry& registry = TheRegistry();
  const std::lock_guard<std::mutex> lock(registry.mutex);
  registry.groups[group_id].push_back(group);
  return group;
}

void Group::Close() {
  {
    const std::shared_lock<std::shared_mutex> lock(state_->open_mutex);
    if (state_->closed) return;
  }
  // A program under way ends by itself, also where one rank's part is not launched yet and
  // another's waits for it, in a collective too.
  const std::future<void> under_way = DevicesIdle(*state_);
  under_way.wait_for(kGrace);
  std::shared_ptr<Group> removed;  // may be the last reference but the caller's
  {
    Registry& registry = TheRegistry();
    const std::lock_guard<std::mutex> lock(registry.mutex);
    const auto entry = registry.groups.find(state_->group_id);
    if (entry != registry.groups.end()) {
      auto& replicas = entry->second;
      const auto it = std::find_if(replicas.begin(), replicas.end(),
                                   [this](const auto& group) { return group.get() == this; });
      if (it != replicas.end()) {
        removed = std::move(*it);
        replicas.erase(it);
      }
      if (replicas.empty()) registry.groups.erase(entry);
    }
  }
  {
    const std::unique_lock<std::shared_mutex> lock(state_->open_mutex);
    if (std::exchange(state_->closed, true)) return;
  }
  // Nothing more is launched. A rank that still waits, waits for one whose part never was.
  const std::future<void> idle = DevicesIdle(*state_);
  if (idle.wait_for(kGrace) == std::future_status::timeout) {
    state_->Fail(Status(FaultKind::kClosed, "the group was closed while a rank was waiting"));
  }
  idle.wait();
  // All movers before any memory: they write to one another's.
  for (const auto& rank : state_->ranks) rank->mover.reset();
  for (const auto& rank : state_->ranks) {
    rank->memory.reset();
    rank->scratch = {};
    rank->peer_table = {};
    rank->queue = {};
  }
  if (state_->block) state_->block->in_use = false;
}

Status Group::Check() {
  Status fault = state_->Failed() ? state_->FirstFault() : Status();
  return fault.ok() ? state_->TakeOverflow() : fault;
}

Memory Group::memory() const {
  Memory memory;
  memory.pinned_bytes = static_cast<int64_t>(state_->failed.bytes());
  for (const auto& rank : state_->ranks) {
    if (rank->memory) memory.device_bytes += static_cast<int64_t>(rank->memory->bytes());
    memory.scratch_bytes += static_cast<int64_t>(rank->scratch.bytes() + rank->state.bytes() +
                                                 rank->peer_table.bytes());
    memory.pinned_bytes += static_cast<int64_t>(rank->queue.bytes() + rank->host.bytes());
  }
  return memory;
}

namespace {

// Device memory as it is now, without waiting for kernels.
template <typename T>
std::vector<T> ReadDevice(int32_t device, const void* from, size_t count) {
  static_assert(std::is_trivially_copyable_v<T>);
  std::vector<T> copy(count);
  const DeviceScope scope(device);
  cudaStream_t stream = nullptr;
  if (cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) != cudaSuccess) return copy;
  (void)cudaMemcpyAsync(copy.data(), from, count * sizeof(T), cudaMemcpyDeviceToHost, stream);
  (void)cudaStreamSynchronize(stream);
  (void)cudaStreamDestroy(stream);
  return copy;
}

}  // namespace

Stats Group::stats() const {
  Stats stats;
  const int64_t row_bytes = state_->options.hidden * ItemBytes(state_->options.dtype);
  for (const auto& rank : state_->ranks) {
    const RankState state = ReadDevice<RankState>(rank->device, rank->state.as<void>(), 1)[0];
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
      stats.phases[phase].bytes += static_cast<int64_t>(state.rows[phase]) * row_bytes;
      stats.phases[phase].wait_ns += static_cast<int64_t>(state.wait_ns[phase]);
    }
  }
  return stats;
}

std::vector<PhaseRecord> Group::Trace() const {
  std::vector<PhaseRecord> records;
  const GroupOptions& options = state_->options;
  const LaneScratchLayout layout(options);
  for (const auto& rank : state_->ranks) {
    for (int32_t lane = 0; lane < LaneCount(options.num_lanes, options.differentiable); ++lane) {
      const char* const scratch = rank->scratch.as<char>() + lane * layout.bytes;
      const auto entries =
          ReadDevice<TraceEntry>(rank->device, scratch + offsetof(LaneScratch, trace),
                                 size_t{kTracedOperations} * kPhases);
      for (size_t i = 0; i < entries.size(); ++i) {
        const TraceEntry& entry = entries[i];
        if (entry.number == kNoOperation) continue;
        records.push_back({rank->rank, lane % options.num_lanes,
                           static_cast<Side>(lane / options.num_lanes),
                           static_cast<Phase>(i % kPhases), entry.number - 1, entry.begin_ns,
                           entry.end_ns, entry.bytes_read, entry.bytes_written});
      }
    }
  }
  std::sort(records.begin(), records.end(), [](const PhaseRecord& a, const PhaseRecord& b) {
    return a.begin_ns < b.begin_ns;
  });
  return records;
}

Status Group::StartWireTrace() {
  for (const auto& rank : state_->ranks) {
    if (!rank->mover) continue;
    const Status status = rank->mover->StartTrace();
    if (!status.ok()) return status;
  }
  return {};
}

std::vector<WireRecord> Group::EndWireTrace() {
  std::vector<WireRecord> records;
  for (const auto& rank : state_->ranks) {
    if (!rank->mover) continue;
    const std::vector<WireRecord> some = rank->mover->EndTrace();
    records.insert(records.end(), some.begin(), some.end());
  }
  return records;
}

std::shared_ptr<Rank> FindRank(int64_t group_id, int32_t device) {
  Registry& registry = TheRegistry();
  const std::lock_guard<std::mutex> lock(registry.mutex);
  const auto entry = registry.groups.find(group_id);
  if (entry == registry.groups.end()) return nullptr;
  for (const std::shared_ptr<Group>& group : entry->second) {
    for (const auto& rank : group->state_->ranks) {
      if (rank->device == device) return std::shared_ptr<Rank>(group, rank.get());
    }
  }
  return nullptr;
}

const GroupConfig& ConfigOf(const Rank& rank) { return rank.group->options; }

}  // namespace smfree::cuda
