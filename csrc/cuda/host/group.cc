// SPDX-License-Identifier: Apache-2.0
//
// The Group of backend.h: its creation, and the registry of open groups.
#include "csrc/cuda/host/group.h"

#include <algorithm>
#include <chrono>
#include <map>
#include <optional>
#include <string>
#include <utility>

#include "csrc/cuda/host/background.h"

namespace smfree::cuda {
namespace {

// What making a group may take beside timeout_s: kernels are loaded, memory is zeroed.
constexpr std::chrono::seconds kMake{30};

struct Registry {
  std::mutex mutex;
  std::map<int64_t, std::vector<std::shared_ptr<Group>>> groups;  // replicas share an id
};

Registry& TheRegistry() {
  static Registry& registry = *new Registry;  // leaked: handlers may run while the process exits
  return registry;
}

Status CheckConfig(const GroupConfig& config, size_t devices) {
  std::string wrong;
  if (static_cast<int32_t>(devices) != config.num_ranks) {
    wrong = std::to_string(devices) + " devices for " + std::to_string(config.num_ranks) +
            " ranks";
  } else if (config.num_ranks > kMaxRanks) {
    wrong = std::to_string(config.num_ranks) + " ranks, expected at most " +
            std::to_string(kMaxRanks);
  } else if (const Nodes nodes = NodesOf(config);
             config.hierarchical && std::max(nodes.count(), nodes.ranks_per_node) > kMaxLists) {
    wrong = std::to_string(nodes.count()) + " nodes of " + std::to_string(nodes.ranks_per_node) +
            " ranks, expected at most " + std::to_string(kMaxLists) +
            " of both in hierarchical mode";
  } else if (config.top_k > kMaxTopK) {
    wrong = "top_k " + std::to_string(config.top_k) + ", expected at most " +
            std::to_string(kMaxTopK) + " on GPUs";
  } else if (!IsTimeout(config.timeout_s)) {
    wrong = "timeout_s is " + std::to_string(config.timeout_s) +
            ", expected more than 0 and at most " + std::to_string(kMaxTimeoutS);
  } else if (const int32_t experts = config.num_experts / NodesOf(config).Regions(kWire);
             !CopyCode(config.max_tokens).Fits(experts)) {
    wrong = "max_tokens " + std::to_string(config.max_tokens) + " times experts per " +
            (config.hierarchical ? "node " : "rank ") + std::to_string(experts) +
            " does not fit 31 bits. Lower max_tokens";
  }
  return wrong.empty() ? Status() : Status(FaultKind::kInvalidArgument, wrong);
}

}  // namespace

Group::Group(std::shared_ptr<GroupState> state) : state_(std::move(state)) {}
Group::~Group() { (void)Close(); }

StatusOr<std::shared_ptr<Group>> Group::Create(int64_t group_id, int32_t replica,
                                               const GroupConfig& config,
                                               const std::vector<int32_t>& devices) {
  Status status = CheckConfig(config, devices.size());
  if (!status.ok()) return status;
  auto state = std::make_shared<GroupState>(group_id, replica, config);
  return Make(state, [state, devices] { return state->AllocateHere(devices); });
}

StatusOr<std::shared_ptr<Group>> Group::CreateAmongProcesses(
    int64_t group_id, int32_t replica, const GroupConfig& config, int32_t rank, int32_t device,
    const std::vector<int32_t>& process_of_rank, std::shared_ptr<NvshmemMemory> memory) {
  Status status = CheckConfig(config, process_of_rank.size());
  if (!status.ok()) return status;
  auto state = std::make_shared<GroupState>(group_id, replica, config);
  auto group = Make(state, [=] {
    return state->AllocateAmongProcesses(rank, device, memory, process_of_rank);
  });
  if (group.ok()) memory->in_use = true;
  return group;
}

StatusOr<std::shared_ptr<Group>> Group::Make(std::shared_ptr<GroupState> state,
                                             std::function<Status()> allocate) {
  const auto bound = state->Timeout() + kMake;
  const std::optional<Status> status = ResultWithin(bound, std::move(allocate));
  if (status && status->ok()) return Register(std::move(state));
  // What was allocated is given back, if there is a way.
  const Background gone([state = std::move(state)]() mutable { state.reset(); });
  if (status) {
    (void)gone.EndsWithin(bound);
    return *status;
  }
  const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(bound);
  return Status(FaultKind::kDeadline,
                "the group has waited " + std::to_string(seconds.count()) +
                    " s for its memory and kernels: a GPU runs something that does not end. Cure: "
                    "see what waits there, such as a collective that another rank never joined, "
                    "and start the process again.");
}

std::shared_ptr<Group> Group::Register(std::shared_ptr<GroupState> state) {
  const int64_t group_id = state->group_id;
  std::shared_ptr<Group> group(new Group(std::move(state)));
  Registry& registry = TheRegistry();
  const std::lock_guard<std::mutex> lock(registry.mutex);
  registry.groups[group_id].push_back(group);
  return group;
}

std::shared_ptr<Group> Group::Unregister() {
  Registry& registry = TheRegistry();
  const std::lock_guard<std::mutex> lock(registry.mutex);
  const auto entry = registry.groups.find(state_->group_id);
  if (entry == registry.groups.end()) return nullptr;
  auto& replicas = entry->second;
  std::shared_ptr<Group> removed;
  const auto it = std::find_if(replicas.begin(), replicas.end(),
                               [this](const auto& group) { return group.get() == this; });
  if (it != replicas.end()) {
    removed = std::move(*it);
    replicas.erase(it);
  }
  if (replicas.empty()) registry.groups.erase(entry);
  return removed;
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

const GroupConfig& ConfigOf(const Rank& rank) { return rank.group->config; }

}  // namespace smfree::cuda
