// SPDX-License-Identifier: Apache-2.0
//
// The Group of backend.h: what a caller may ask for, and which groups are open.
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "csrc/core/errors.h"
#include "csrc/core/registry.h"
#include "csrc/cpu/backend.h"
#include "csrc/cpu/exchange/exchange.h"
#include "csrc/cpu/runtime/completion_pool.h"

namespace smfree::cpu {
namespace {

using Groups = Registry<Group>;

// The process that made the first group: a forked child ends nothing.
pid_t Owner() {
  static const pid_t owner = getpid();
  return owner;
}

// A receive that is pending when the process exits would hang the exit, and peers would take it for
// a crash.
void CloseAtExit() {
  if (getpid() != Owner()) return;
  CloseAllGroups();
  CompletionPool::Get().Drain(Clock::now() + std::chrono::seconds(1));
}

Status CheckProcesses(const std::vector<int32_t>& process_of_rank, int32_t my_process,
                      const std::string& cookie) {
  const auto is_process = [&](int32_t process) {
    return std::find(process_of_rank.begin(), process_of_rank.end(), process) !=
           process_of_rank.end();
  };
  std::string wrong;
  if (cookie.size() > static_cast<size_t>(packets::kMaxCookieBytes)) {
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
  Status status = CheckConfig(config, static_cast<int64_t>(process_of_rank.size()));
  if (status.ok()) status = CheckProcesses(process_of_rank, my_process, cookie);
  if (!status.ok()) return status;
  auto exchange = std::make_shared<Exchange>(group_id, replica, config, std::move(process_of_rank),
                                             my_process, std::move(cookie));
  status = exchange->Open();
  if (!status.ok()) return status;
  std::shared_ptr<Group> group(new Group(std::move(exchange)));
  Owner();
  [[maybe_unused]] static const int registered = std::atexit(CloseAtExit);
  status = Groups::Get().Add(group_id, replica, group);
  if (!status.ok()) return status;
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
  const std::shared_ptr<Group> removed =  // may be the last reference but the caller's
      Groups::Get().Remove(exchange_->group_id(), exchange_->replica(), this);
  exchange_->Close();
}

Status Group::Check() { return exchange_->Check(); }
Status Group::Fault() const { return exchange_->Fault(); }
std::string Group::Unreceived() const {
  const auto unreceived = exchange_->UnreceivedHere();
  return unreceived.count() == 0 ? "" : unreceived.Describe();
}
GroupStats Group::stats() const { return exchange_->stats(); }
void Group::SetChaos(const Chaos& chaos) { exchange_->SetChaos(chaos); }
int64_t Group::memory_bytes() const { return exchange_->memory_bytes(); }
const GroupConfig& Group::config() const { return exchange_->config(); }
bool Group::IsLocal(int32_t rank) const { return exchange_->IsLocal(rank); }

std::shared_ptr<Group> FindGroup(int64_t group_id, int32_t replica) {
  return Groups::Get().Find(group_id, replica);
}

void CloseAllGroups() {
  while (const std::shared_ptr<Group> group = Groups::Get().Any()) group->Close();
}

}  // namespace smfree::cpu
