// SPDX-License-Identifier: Apache-2.0
//
// The exchange's life: opening, connecting, faults, closing. Messages: exchange_messages.cc.
#include "csrc/cpu/exchange/exchange.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <system_error>
#include <thread>
#include <utility>

#include "csrc/cpu/processes/system_error.h"
#include "csrc/cpu/runtime/completion_pool.h"
#include "csrc/core/describe.h"

namespace smfree::cpu {
namespace {

// How long Settle waits, and how often it looks.
constexpr std::chrono::milliseconds kGrace{500}, kBetweenLooks{1};
// How long Close may take to hand the peers what they still need.
constexpr std::chrono::seconds kCloseLimit{5};

int UsableCores() {
  cpu_set_t cores;
  return sched_getaffinity(0, sizeof(cores), &cores) == 0 ? CPU_COUNT(&cores) : 1;
}

int32_t CountProcesses(const std::vector<int32_t>& process_of_rank) {
  return *std::max_element(process_of_rank.begin(), process_of_rank.end()) + 1;
}

}  // namespace

Exchange::Exchange(int64_t group_id, int32_t replica, const GroupConfig& config,
                   std::vector<int32_t> process_of_rank, int32_t my_process, std::string cookie)
    : group_id_(group_id),
      replica_(replica),
      config_(config),
      nodes_(NodesOf(config)),
      process_of_rank_(std::move(process_of_rank)),
      my_process_(my_process),
      cookie_(std::move(cookie)),
      num_processes_(CountProcesses(process_of_rank_)),
      threads_per_rank_(std::max(1, UsableCores() / config.num_ranks)),
      num_local_(static_cast<int32_t>(
          std::count(process_of_rank_.begin(), process_of_rank_.end(), my_process_))),
      owner_(getpid()),
      peer_closed_(static_cast<size_t>(num_processes_)) {
  for (int32_t rank = 0; rank < config_.num_ranks; ++rank) {
    mailboxes_.push_back(IsLocal(rank) ? std::make_unique<Mailbox>(rank, nodes_) : nullptr);
  }
}

Status Exchange::Open() {
  try {
    EventLoop::Get();  // its thread and its descriptor, where an error can still be returned
  } catch (const std::system_error& error) {
    return SystemError("starting the event loop's thread", error.code().value());
  }
  if (num_processes_ == 1) {
    arena_ = std::make_shared<Arena>(Arena::Backing::kAnonymous, nullptr);
    return Status();
  }
  // Until Connect nothing is sent, so no segment exists that the network would have missed.
  network_ = std::make_shared<Network>(num_processes_);
  arena_ = std::make_shared<Arena>(
      Arena::Backing::kMemfd,
      [network = std::weak_ptr<Network>(network_)](int32_t segment, const Mapping& mapping) {
        if (const auto alive = network.lock()) alive->ShowSegment(segment, mapping);
      });
  auto listener = Listen(&address_);
  if (!listener.ok()) return listener.status();
  listener_ = std::move(listener.value());
  return Status();
}

Status Exchange::Connect(const std::vector<std::string>& addresses) {
  if (num_processes_ == 1) return Status();
  if (static_cast<int32_t>(addresses.size()) != num_processes_) {
    return Status(FaultKind::kInvalidArgument,
                  "Connect got " + std::to_string(addresses.size()) + " addresses and expected " +
                      std::to_string(num_processes_) + ", one per process");
  }
  std::vector<int32_t> ranks_of_process(addresses.size());
  for (const int32_t process : process_of_rank_) ++ranks_of_process[static_cast<size_t>(process)];
  packets::HelloPacket hello{};
  hello.kind = packets::PacketKind::kHello;
  hello.magic = packets::kMagic;
  hello.version = packets::kVersion;
  hello.process = my_process_;
  hello.group_id = group_id_;
  hello.replica = replica_;
  hello.cookie_bytes = static_cast<int32_t>(cookie_.size());
  std::memcpy(hello.cookie, cookie_.data(), cookie_.size());
  hello.num_local = ranks_of_process[static_cast<size_t>(my_process_)];

  auto sockets = Greet(listener_, addresses, hello, ranks_of_process,
                       Clock::now() + SecondsToDuration(config_.timeout_s));
  if (!sockets.ok()) return sockets.status();
  listener_ = Socket();
  network_->Start(std::move(sockets.value()), weak_from_this());
  const std::lock_guard<std::mutex> lock(mutex_);
  connected_ = true;
  return Status();
}

Status Exchange::Fail(int32_t rank, Status fault) {
  // A group that is not open yet, or no more, does not fail.
  if (fault.kind() != FaultKind::kClosed) Raise(fault, rank, /*tell_peers=*/true);
  return fault;
}

void Exchange::Raise(const Status& fault, int32_t rank, bool tell_peers) {
  Mailbox::Contents contents;  // let go of after the lock: that writes to sockets and the arena
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (closed_ || !fault_.ok()) return;
    fault_ = fault;
    contents = TakeAll();
    tell_peers = tell_peers && connected_;
  }
  if (tell_peers) network_->SendFault(fault);
  EndReceives(std::move(contents.receives), fault, rank);
}

Mailbox::Contents Exchange::TakeAll() {
  Mailbox::Contents all;
  for (const auto& mailbox : mailboxes_) {
    if (!mailbox) continue;
    Mailbox::Contents one = mailbox->TakeAll();
    std::move(one.receives.begin(), one.receives.end(), std::back_inserter(all.receives));
    std::move(one.messages.begin(), one.messages.end(), std::back_inserter(all.messages));
  }
  return all;
}

void Exchange::EndReceives(std::vector<ReceivePtr> receives, const Status& fault, int32_t rank) {
  for (ReceivePtr& receive : receives) {
    EventLoop::Get().Cancel(receive->deadline);
    const Expectation& expected = receive->expected;
    std::string text = fault.message();
    if (expected.rank != rank) {
      text =
          DescribeCall(expected.phase, expected.rank, expected.identity) + " cannot go on: " + text;
    }
    CompletionPool::Get().Post(
        [receive = std::move(receive), status = Status(fault.kind(), std::move(text))] {
          receive->messages.clear();
          receive->done(status);
        });
  }
}

std::string Exchange::RanksOf(int32_t process) const {
  std::vector<int32_t> ranks;
  for (int32_t rank = 0; rank < config_.num_ranks; ++rank) {
    if (process_of_rank_[static_cast<size_t>(rank)] == process) ranks.push_back(rank);
  }
  return "rank(s) " + JoinNumbers(ranks) + " (process " + std::to_string(process) + ")";
}

void Exchange::OnPeerFault(const Status& fault) { Raise(fault, -1, /*tell_peers=*/false); }

void Exchange::OnLoss(const Status& why) {
  Raise(Status(why.kind(), RanksOf(my_process_) + ": " + why.message()), -1, /*tell_peers=*/true);
}

void Exchange::OnPeerDied(int32_t process, const std::string& why) {
  Raise(Status(FaultKind::kPeerDied,
               RanksOf(process) + " died" + (why.empty() ? "" : " (" + why + ")") +
                   ": the connection ended without a goodbye. Fix: see the log of that process, "
                   "which crashed or was killed, and start the job again."),
        -1, /*tell_peers=*/true);
}

void Exchange::OnPeerClosed(int32_t process) {
  Status fault;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    peer_closed_[static_cast<size_t>(process)] = true;
    for (const auto& mailbox : mailboxes_) {
      if (!mailbox) continue;
      for (const ReceivePtr& receive : mailbox->Waiting()) {
        if (fault.ok()) fault = CheckPeersOpen(*receive);
      }
    }
  }
  if (!fault.ok()) Raise(fault, -1, /*tell_peers=*/true);
}

Status Exchange::CheckPeersOpen(const Receive& receive) const {
  const Expectation& expected = receive.expected;
  for (const int32_t source : MailboxOf(expected.rank).Missing(receive)) {
    const int32_t process = process_of_rank_[static_cast<size_t>(source)];
    if (!peer_closed_[static_cast<size_t>(process)]) continue;
    return Status(
        FaultKind::kPeerClosed,
        RanksOf(process) + " closed its group, and " +
            DescribeCall(expected.phase, expected.rank, expected.identity) +
            " waits for it. Fix: close a group only after the last operation of every rank.");
  }
  return Status();
}

void Exchange::Settle() const {
  const auto in_flight = [this] {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (closed_ || !fault_.ok()) return false;
    }
    const GroupStats now = stats();
    return now.pending_receives > 0 || now.messages_in_flight > 0;
  };
  const Clock::time_point deadline = Clock::now() + kGrace;
  while (in_flight() && Clock::now() < deadline) std::this_thread::sleep_for(kBetweenLooks);
}

void Exchange::Close() {
  // A child that was forked has the parent's sockets, and must not say goodbye for it.
  if (getpid() != owner_) return;
  Mailbox::Contents contents;
  std::shared_ptr<Arena> arena;
  const Clock::time_point deadline = Clock::now() + kCloseLimit;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (closed_) return;
    closed_ = true;
    contents = TakeAll();
  }
  EndReceives(std::move(contents.receives),
              Status(FaultKind::kClosed, "the group was closed while this receive was waiting"),
              -1);
  contents.messages.clear();
  {
    std::unique_lock<std::mutex> lock(mutex_);
    none_held_back_.wait_until(lock, deadline, [this] { return held_back_ == 0; });
    arena = std::move(arena_);
    arena_high_water_ = arena->high_water();
  }
  // Sends that still pack in other threads, and receives that still unpack, keep the arena alive.
  arena->Retire();
  if (network_) network_->Close(deadline);
}

Status Exchange::Check() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!fault_.ok()) return fault_;
  return std::exchange(overflow_, Status());
}

Status Exchange::Fault() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return fault_;
}

Unreceived Exchange::UnreceivedHere() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  Unreceived unreceived;
  for (const auto& mailbox : mailboxes_) {
    if (mailbox) mailbox->AddUnreceived(std::nullopt, &unreceived);
  }
  return unreceived;
}

GroupStats Exchange::stats() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  GroupStats stats{stats_};
  for (const auto& mailbox : mailboxes_) {
    if (!mailbox) continue;
    stats.pending_receives += static_cast<int64_t>(mailbox->Waiting().size());
    stats.messages_in_flight += mailbox->messages();
  }
  stats.messages_in_flight += held_back_;
  if (arena_) stats.arena_bytes_in_use = arena_->bytes_in_use();
  stats.arena_bytes_high_water = arena_ ? arena_->high_water() : arena_high_water_;
  return stats;
}

int64_t Exchange::memory_bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return arena_ ? arena_->committed() : 0;
}

void Exchange::SetChaos(const Chaos& chaos) {
  const std::lock_guard<std::mutex> lock(mutex_);
  chaos_.Set(chaos);
}

void Exchange::ReportDropped(int64_t copies, Status overflow) {
  const std::lock_guard<std::mutex> lock(mutex_);
  stats_.rows_dropped += copies;
  if (overflow_.ok()) overflow_ = std::move(overflow);
}

}  // namespace smfree::cpu
