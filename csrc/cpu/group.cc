// SPDX-License-Identifier: Apache-2.0
//
// The Group of backend.h: what a caller may ask for, and the registry of open groups.
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <map>
#include <mutex>
#include <utility>

#include "csrc/cpu/backend.h"
#include "csrc/cpu/runtime/completion_pool.h"
#include "csrc/cpu/exchange/exchange.h"

namespace smfree::cpu {
namespace {

struct Registry {
  const pid_t owner = getpid();
  std::mutex mutex;
  std::map<std::pair<int64_t, int32_t>, std::shared_ptr<Group>> groups;
};

Registry& TheRegistry() {
  static Registry& registry = *new Registry;  // leaked: see threads.h
  return registry;
}

// A receive that is pending when the process exits would hang the exit, and peers would take it for
// a crash.
void CloseAtExit() {
  if (getpid() != TheRegistry().owner) return;  // a forked child: none of this is its own
  CloseAllGroups();
  CompletionPool::Get().Drain(Clock::now() + std::chrono::seconds(1));
}

Status CheckConfig(const GroupConfig& config, const std::vector<int32_t>& process_of_rank,
                   int32_t my_process, const std::string& cookie) {
  const auto ranks = static_cast<int64_t>(process_of_rank.size());
  const Nodes nodes = NodesOf(config);
  const auto is_process = [&](int32_t process) {
    return std::find(process_of_rank.begin(), process_of_rank.end(), process) !=
           process_of_rank.end();
  };
  std::string wrong;
  if (config.num_ranks < 1 || ranks != config.num_ranks) {
    wrong = "num_ranks is " + std::to_string(config.num_ranks) + " and process_of_rank names " +
            std::to_string(ranks) + " ranks";
  } else if (nodes.ranks_per_node < 1 || nodes.num_ranks % nodes.ranks_per_node != 0 ||
             (nodes.hierarchical && (nodes.count() == 1 || nodes.ranks_per_node == 1))) {
    wrong = std::to_string(config.num_ranks) + " ranks in nodes of " +
            std::to_string(config.ranks_per_node) +
            ": nodes are equally large, and hierarchical mode needs several of several ranks";
  } else if (config.num_experts < 1 || config.num_experts % config.num_ranks != 0) {
    wrong = "num_experts " + std::to_string(config.num_experts) + " is no multiple of num_ranks " +
            std::to_string(config.num_ranks);
  } else if (config.top_k < 1 || config.top_k > config.num_experts) {
    wrong = "top_k " + std::to_string(config.top_k) + " is not between 1 and num_experts";
  } else if (config.num_lanes < 1 || config.expert_alignment < 1 || config.hidden < 1 ||
             config.max_tokens < 1 || config.recv_capacity < 0) {
    wrong = "a size is not positive";
  } else if (!IsTimeout(config.timeout_s)) {
    wrong = "timeout_s is " + std::to_string(config.timeout_s) +
            ", expected more than 0 and at most " + std::to_string(kMaxTimeoutS);
  } else if (config.max_tokens > std::numeric_limits<int32_t>::max() / config.num_ranks ||
             RowsCapacity(config, config.max_tokens) > std::numeric_limits<int32_t>::max()) {
    wrong = "max_tokens times num_ranks does not fit 32 bits";
  } else if (cookie.size() > static_cast<size_t>(packets::kMaxCookieBytes)) {
    wrong = "the cookie is longer than " + std::to_string(packets::kMaxCookieBytes) + " bytes";
  } else if (!is_process(my_process)) {
    wrong = "process " + std::to_string(my_process) + " has no rank";
  } else {
    const int32_t last = *std::max_element(process_of_rank.begin(), process_of_rank.end());
    for (int32_t process = 0; process <= last; ++process) {
      if (!is_process(process)) wrong = "process " + std::to_string(process) + " has no rank";
    }
  }
  return wrong.empty() ? Status() : Status(FaultKind::kInvalidArgument, wrong);
}

}  // namespace

StatusOr<std::shared_ptr<Group>> Group::Create(int64_t group_id, int32_t replica,
                                               const GroupConfig& config,
                                               std::vector<int32_t> process_of_rank,
                                               int32_t my_process, std::string cookie) {
  Status status = CheckConfig(config, process_of_rank, my_process, cookie);
  if (!status.ok()) return status;
  auto exchange = std::make_shared<Exchange>(group_id, replica, config, std::move(process_of_rank),
                                             my_process, std::move(cookie));
  status = exchange->Open();
  if (!status.ok()) return status;
  std::shared_ptr<Group> group(new Group(std::move(exchange)));
  Registry& registry = TheRegistry();
  const std::lock_guard<std::mutex> lock(registry.mutex);
  [[maybe_unused]] static const int registered = std::atexit(CloseAtExit);
  if (!registry.groups.emplace(std::make_pair(group_id, replica), group).second) {
    return Status(FaultKind::kInvalidArgument, "group " + std::to_string(group_id) + ", replica " +
                                                   std::to_string(replica) +
                                                   " exists already in this process");
  }
  return group;
}

Group::Group(std::shared_ptr<Exchange> exchange) : exchange_(std::move(exchange)) {}
Group::~Group() { exchange_->Close(); }

std::string Group::address() const { return exchange_->address(); }
Status Group::Connect(const std::vector<std::string>& addresses) {
  return exchange_->Connect(addresses);
}

void Group::Close() {
  // Where one rank of this process is through, and waits in a collective of XLA for another whose
  // receive fails now, XLA ends the process. So both get the time to end.
  exchange_->Settle();
  std::shared_ptr<Group> removed;  // may be the last reference but the caller's
  {
    Registry& registry = TheRegistry();
    const std::lock_guard<std::mutex> lock(registry.mutex);
    const auto it = registry.groups.find({exchange_->group_id(), exchange_->replica()});
    if (it != registry.groups.end() && it->second.get() == this) {
      removed = std::move(it->second);
      registry.groups.erase(it);
    }
  }
  exchange_->Close();
}

Status Group::Check() { return exchange_->Check(); }
Status Group::Fault() const { return exchange_->Fault(); }
std::string Group::Unreceived() const {
  const auto unreceived = exchange_->UnreceivedHere();
  return unreceived.count() == 0 ? "" : unreceived.Describe();
}
Stats Group::stats() const { return exchange_->stats(); }
void Group::SetChaos(const Chaos& chaos) { exchange_->SetChaos(chaos); }
int64_t Group::memory_bytes() const { return exchange_->memory_bytes(); }
const GroupConfig& Group::config() const { return exchange_->config(); }
bool Group::IsLocal(int32_t rank) const { return exchange_->IsLocal(rank); }

std::shared_ptr<Group> FindGroup(int64_t group_id, int32_t replica) {
  Registry& registry = TheRegistry();
  const std::lock_guard<std::mutex> lock(registry.mutex);
  const auto it = registry.groups.find({group_id, replica});
  return it == registry.groups.end() ? nullptr : it->second;
}

void CloseAllGroups() {
  Registry& registry = TheRegistry();
  for (;;) {
    std::shared_ptr<Group> group;
    {
      const std::lock_guard<std::mutex> lock(registry.mutex);
      if (registry.groups.empty()) return;
      group = registry.groups.begin()->second;
    }
    group->Close();
  }
}

}  // namespace smfree::cpu
