// SPDX-License-Identifier: Apache-2.0
//
// The Group of backend.h: its creation, and which groups are open.
#include "csrc/cuda/host/group.h"

#include <algorithm>
#include <chrono>
#include <optional>
#include <string>
#include <utility>

#include "csrc/core/errors.h"
#include "csrc/core/registry.h"
#include "csrc/cuda/host/background.h"

namespace smfree::cuda {
namespace {

constexpr std::chrono::seconds kMake{kMakeSeconds};

using Groups = Registry<Group>;

// What the kernels can serve of what CheckConfig allows.
Status CheckLimits(const GroupConfig& config) {
  std::string wrong;
  if (config.num_ranks > kMaxRanks) {
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
  } else if (const int32_t experts = config.num_experts / NodesOf(config).Regions(kWire);
             !CopyCode(config.max_tokens).Fits(experts)) {
    wrong = "max_tokens " + std::to_string(config.max_tokens) + " times experts per " +
            (config.hierarchical ? "node " : "rank ") + std::to_string(experts) +
            " does not fit 31 bits. Lower max_tokens";
  } else if (NumSets(config) > kMaxSets) {
    wrong = std::to_string(NumSets(config)) + " sets of buffers, expected at most " +
            std::to_string(kMaxSets) + ". Lower num_sets";
  } else if (config.max_tokens > kMaxAnnouncedRows) {
    wrong = "max_tokens " + std::to_string(config.max_tokens) + ", expected at most " +
            std::to_string(kMaxAnnouncedRows) + " on GPUs";
  }
  return wrong.empty() ? Status() : Status(FaultKind::kInvalidArgument, wrong);
}

Status TooManyInFlight(const GroupState& group, int32_t in_flight) {
  const bool among_processes = group.nvshmem_memory != nullptr;
  return Status(FaultKind::kNoFreeSet,
                "the program has " + std::to_string(in_flight) +
                    " operations in flight together, expected at most " +
                    std::to_string(group.layout.num_sets) + ", as many as the group has sets of " +
                    "buffers. Fix: thread one token through calls that begin with fresh ones" +
                    (among_processes ? "; or raise EpConfig.num_sets, since a group over several "
                                       "processes has all its sets from the beginning."
                                     : "."));
}

Status TookTooLong(std::chrono::nanoseconds waited) {
  const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(waited);
  return Status(FaultKind::kDeadline,
                "the group has waited " + std::to_string(seconds.count()) +
                    " s for its memory and kernels: a GPU runs something that does not end. Fix: "
                    "see what waits there, such as a collective that another rank never joined, "
                    "and start the process again.");
}

}  // namespace

Group::Group(std::shared_ptr<GroupState> state) : state_(std::move(state)) {}
Group::~Group() { (void)Close(); }

StatusOr<std::shared_ptr<Group>> Group::Create(int64_t group_id, int32_t replica,
                                               const GroupConfig& config,
                                               const std::vector<int32_t>& devices) {
  Status status = CheckConfig(config, static_cast<int64_t>(devices.size()));
  if (status.ok()) status = CheckLimits(config);
  if (!status.ok()) return status;
  auto state = std::make_shared<GroupState>(group_id, replica, config);
  return Make(state, [state, devices] { return state->AllocateHere(devices); });
}

StatusOr<std::shared_ptr<Group>> Group::CreateAmongProcesses(
    int64_t group_id, int32_t replica, const GroupConfig& config, int32_t rank, int32_t device,
    const std::vector<int32_t>& process_of_rank, std::shared_ptr<NvshmemMemory> memory,
    const std::string& name) {
  Status status = CheckConfig(config, static_cast<int64_t>(process_of_rank.size()));
  if (status.ok()) status = CheckLimits(config);
  if (!status.ok()) return status;
  auto state = std::make_shared<GroupState>(group_id, replica, config);
  auto group = Make(state, [=] {
    return state->AllocateAmongProcesses(rank, device, memory, process_of_rank, name);
  });
  if (group.ok()) memory->in_use = true;
  return group;
}

void Group::AllAreHere() { state_->announcements.Unname(); }

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
  return TookTooLong(bound);
}

StatusOr<std::shared_ptr<Group>> Group::Register(std::shared_ptr<GroupState> state) {
  const int64_t group_id = state->group_id;
  const int32_t replica = state->replica;
  std::shared_ptr<Group> group(new Group(std::move(state)));
  Status status = Groups::Get().Add(group_id, replica, group);
  if (!status.ok()) return status;
  status = group->MakeSets(InFlight::Get().Of(group_id));  // of programs compiled before
  if (status.ok()) return group;
  (void)group->Close();
  return status;
}

Status Group::MakeSets(const InFlight::Need& need) {
  const int32_t room = state_->layout.num_sets;
  const int32_t at_first = NumSets(state_->config);
  const int32_t most = std::max(need.most, need.uncounted ? at_first : 0);
  if (most > room) return TooManyInFlight(*state_, most);
  const Status status = MakeSets(most);
  // For what is left in flight, if there is memory for them.
  if (status.ok() && need.leaves) (void)MakeSets(std::min(most + at_first - 1, room));
  return status;
}

Status Group::MakeSets(int32_t count) {
  if (count <= state_->num_sets) return {};
  const auto made = ResultWithin(state_->Timeout() + kMake, [state = state_, count] {
    const std::shared_lock<std::shared_mutex> open(state->open_mutex, std::try_to_lock);
    return open.owns_lock() && !state->closed ? state->MakeSets(count) : Status();
  });
  if (!made) return TookTooLong(state_->Timeout() + kMake);
  if (made->kind() != FaultKind::kOutOfMemory) return *made;
  return Status(made->kind(), "for " + std::to_string(count) + " operations that a program has in "
                              "flight together " + made->message() + " Or thread one token through "
                              "calls that begin with fresh ones.");
}

void CompilationBegins() { InFlight::Get().CompilationBegins(); }

void CompilationEnds() {
  InFlight& in_flight = InFlight::Get();
  for (const int64_t group_id : in_flight.CompilationEnds()) {
    for (const std::shared_ptr<Group>& group : Groups::Get().Replicas(group_id)) {
      (void)group->MakeSets(in_flight.Of(group_id));  // there is nobody to tell; a send will
    }
  }
}

Status CompileSend(const CompiledOperation& operation) {
  InFlight& in_flight = InFlight::Get();
  const int32_t now = in_flight.AddSend(operation);
  const auto make = [&]() -> Status {
    InFlight::Need need = in_flight.Of(operation.group);
    need.most = std::max(need.most, now);
    for (const std::shared_ptr<Group>& group : Groups::Get().Replicas(operation.group)) {
      const Status status = group->MakeSets(need);
      if (!status.ok()) return status;
    }
    return {};
  };
  Status status = make();
  if (status.ok()) {
    in_flight.Keep(operation.group, now);
    status = make();  // of a group that was registered meanwhile, and did not hear of it
  }
  if (!status.ok()) in_flight.CompilationFails();
  return status;
}

Status CompileRecv(const CompiledOperation& operation) {
  InFlight::Get().AddRecv(operation);
  return {};
}

std::shared_ptr<Group> Group::Unregister() {
  return Groups::Get().Remove(state_->group_id, state_->replica, this);
}

std::shared_ptr<Rank> FindRank(int64_t group_id, int32_t device) {
  for (const std::shared_ptr<Group>& group : Groups::Get().Replicas(group_id)) {
    for (const auto& rank : group->state_->ranks) {
      if (rank->device == device) return std::shared_ptr<Rank>(group, rank.get());
    }
  }
  return nullptr;
}

const GroupConfig& ConfigOf(const Rank& rank) { return rank.group->config; }

}  // namespace smfree::cuda
