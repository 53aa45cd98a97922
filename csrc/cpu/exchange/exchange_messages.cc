// SPDX-License-Identifier: Apache-2.0
//
// The exchange's messages: begin a send, post, deliver, expect, finish.
#include <algorithm>
#include <new>
#include <utility>

#include "csrc/cpu/runtime/completion_pool.h"
#include "csrc/protocol/describe.h"
#include "csrc/cpu/exchange/exchange.h"

namespace smfree::cpu {
bool Exchange::IsLocal(int32_t rank) const {
  return rank >= 0 && rank < config_.num_ranks &&
         process_of_rank_[static_cast<size_t>(rank)] == my_process_;
}

Status Exchange::CheckCall(const char* phase, int32_t rank, int64_t tokens,
                           const Identity& identity, const Status& arguments) const {
  std::string wrong;
  if (!IsLocal(rank)) {
    wrong = "this process has no rank " + std::to_string(rank) + " of " +
            std::to_string(config_.num_ranks);
  } else if (tokens < 0 || tokens > config_.max_tokens) {
    wrong = "got " + std::to_string(tokens) + " rows, the group's max_tokens is " +
            std::to_string(config_.max_tokens);
  } else if (identity.lane < 0 || identity.lane >= config_.num_lanes) {
    wrong = "got lane " + std::to_string(identity.lane) + ", the group has " +
            std::to_string(config_.num_lanes);
  } else if (!arguments.ok()) {
    wrong = arguments.message();
  } else {
    return Status();
  }
  return Status(FaultKind::kInvalidArgument, DescribeCall(phase, rank, identity) + ": " + wrong);
}

Status Exchange::CheckOpen(const char* phase, int32_t rank, const Identity& identity) const {
  if (closed_) {
    return Status(FaultKind::kClosed, DescribeCall(phase, rank, identity) +
                                          ": the group is closed. Cure: close it after the last "
                                          "operation.");
  }
  if (!fault_.ok()) {
    return Status(fault_.kind(),
                  DescribeCall(phase, rank, identity) +
                      " cannot go on, the group has failed before: " + fault_.message());
  }
  if (num_processes_ > 1 && !connected_) {
    return Status(FaultKind::kClosed, DescribeCall(phase, rank, identity) +
                                          ": the group is not connected to its peers yet");
  }
  return Status();
}

Status Exchange::BeginSend(const char* phase, const Call& call, const Identity& identity,
                           const Status& arguments) {
  Status status = CheckCall(phase, call.rank, call.tokens, identity, arguments);
  if (!status.ok()) return status;
  const std::lock_guard<std::mutex> lock(mutex_);
  status = CheckOpen(phase, call.rank, identity);
  if (!status.ok()) return status;
  status = MailboxOf(call.rank).BeginSend(phase, identity);
  if (status.ok()) {
    ++(identity.operation == Operation::kDispatch ? stats_.dispatch_send : stats_.combine_send)
          .calls;
  }
  return status;
}

StatusOr<std::shared_ptr<Arena::Block>> Exchange::Allocate(int64_t bytes) {
  std::shared_ptr<Arena> arena;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    arena = arena_;
  }
  if (!arena) return Status(FaultKind::kClosed, "the group was closed during this send");
  auto block = arena->Allocate(bytes);
  if (block.ok() || block.status().kind() == FaultKind::kClosed) return block;
  return Status(block.status().kind(), RanksOf(my_process_) + ": " + block.status().message());
}

void Exchange::Post(const MessageHeader& header, std::shared_ptr<Arena::Block> block,
                    int64_t offset) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (closed_) return;
    NoteSent(header);
    // As long as any message is held back, the others queue up behind it, so that those of a place
    // stay in order when chaos ends.
    if (chaos_.enabled() || held_back_ > 0) {
      ++held_back_;
      EventLoop::Get().At(chaos_.DueTime(header),
                      [self = shared_from_this(), header, block = std::move(block), offset] {
                        self->Forward(header, block, offset);
                        const std::lock_guard<std::mutex> relock(self->mutex_);
                        if (--self->held_back_ > 0) return;
                        self->chaos_.Forget();
                        self->none_held_back_.notify_all();
                      });
      return;
    }
  }
  Forward(header, std::move(block), offset);
}

void Exchange::NoteSent(const MessageHeader& header) {
  const bool dispatch = header.identity.operation == Operation::kDispatch;
  PhaseStats& phase = dispatch ? stats_.dispatch_send : stats_.combine_send;
  const bool first_leg = header.leg == nodes_.FirstLeg(header.identity.operation);
  (first_leg ? phase.rows : stats_.rows_relayed) += header.rows;
  (first_leg ? phase.bytes : stats_.bytes_relayed) += header.bytes;
  if (nodes_.NodeOf(header.source) == nodes_.NodeOf(header.destination)) return;
  (dispatch ? stats_.dispatch_internode_bytes : stats_.combine_internode_bytes) += header.bytes;
}

void Exchange::Forward(const MessageHeader& header, std::shared_ptr<Arena::Block> block,
                       int64_t offset) {
  if (!IsLocal(header.destination)) {
    const int32_t process = process_of_rank_[static_cast<size_t>(header.destination)];
    return network_->Send(process, header, std::move(block), offset);
  }
  Message message;
  message.header = header;
  message.data = block->data() + offset;
  message.hold = std::move(block);
  Deliver(std::move(message));
}

void Exchange::OnArrival(Message message) {
  const MessageHeader& header = message.header;
  const bool sound =
      IsLocal(header.destination) && (header.leg == kWire || header.leg == kNode) &&
      header.region >= 0 && header.region < nodes_.Regions(header.leg) &&
      header.source == nodes_.Peer(header.leg, header.destination, header.region) &&
      !IsLocal(header.source) && header.rows >= 0 && header.rows <= header.tokens &&
      header.tokens <= config_.max_tokens &&
      (header.experts == 0 || header.experts == config_.top_k) &&
      (header.slots == 0 || header.slots == config_.top_k) &&
      header.bytes == MessageLayout(header.rows, header.experts, header.slots, row_bytes_).bytes;
  if (sound) return Deliver(std::move(message));
  Raise(Status(FaultKind::kSystem,
               "a malformed message claims to come from rank " + std::to_string(header.source)),
        -1, /*tell_peers=*/true);
}

void Exchange::Deliver(Message message) {
  ReceivePtr complete;
  Status status;
  const int32_t rank = message.header.destination;
  {
    std::unique_lock<std::mutex> lock(mutex_);
    if (closed_ || !fault_.ok()) {
      lock.unlock();  // the message is let go of without it
      return;
    }
    status = MailboxOf(rank).Deliver(std::move(message), &complete);
    if (complete) NoteArrived(*complete);
  }
  if (!status.ok()) Raise(status, rank, /*tell_peers=*/true);
  if (!complete) return;
  // Never on this thread: it may be the event loop, or a sender that XLA waits for.
  CompletionPool::Get().Post(
      [self = shared_from_this(), complete = std::move(complete)] { self->Finish(complete); });
}

void Exchange::NoteArrived(const Receive& receive) {
  EventLoop::Get().Cancel(receive.deadline);
  const Operation operation = receive.expected.identity.operation;
  if (receive.expected.leg != nodes_.LastLeg(operation)) return;  // a relay's
  PhaseStats& stats =
      operation == Operation::kDispatch ? stats_.dispatch_recv : stats_.combine_recv;
  ++stats.calls;
  stats.wait_ns += NanosecondsSince(receive.expected.since);
  for (const Message& message : receive.messages) {
    stats.rows += message.header.rows;
    stats.bytes += message.header.bytes;
  }
}

Clock::time_point Exchange::DeadlineOf(const Expectation& expected) const {
  const double timeout_s = config_.timeout_s;
  // Whoever waits for a relay is more patient than the relay, so that the fault names the rank that
  // is silent, not one that waits for it.
  const bool for_relay = expected.leg != nodes_.FirstLeg(expected.identity.operation);
  const double grace_s = for_relay ? std::min(1.0, timeout_s / 4) : 0.0;
  return expected.since + SecondsToDuration(timeout_s + grace_s);
}

void Exchange::Expect(const Expectation& expected, const Status& arguments, Unpacker unpack,
                      Done done) {
  const int32_t rank = expected.rank;
  const Identity& identity = expected.identity;
  auto receive = std::make_shared<Receive>();
  receive->expected = expected;
  receive->unpack = std::move(unpack);
  receive->done = std::move(done);
  bool complete = false;
  Status peers;
  Status status = CheckCall(expected.phase, rank, expected.tokens, identity, arguments);
  if (status.ok()) {
    const std::lock_guard<std::mutex> lock(mutex_);
    status = CheckOpen(expected.phase, rank, identity);
    if (status.ok()) status = MailboxOf(rank).Expect(receive, &complete);
    if (status.ok() && complete) NoteArrived(*receive);
    if (status.ok() && !complete) {
      peers = CheckPeersOpen(*receive);
      receive->deadline =
          EventLoop::Get().At(DeadlineOf(expected),
                          [self = weak_from_this(), waiting = std::weak_ptr<Receive>(receive)] {
                            const auto exchange = self.lock();
                            const auto late = waiting.lock();
                            if (exchange && late) exchange->OnDeadline(late);
                          });
    }
  }
  if (!status.ok()) {
    receive->messages.clear();
    return receive->done(Fail(rank, std::move(status)));
  }
  if (!peers.ok()) Raise(peers, rank, /*tell_peers=*/true);  // ends the receive, too
  if (complete) Finish(receive);
}

void Exchange::Finish(const ReceivePtr& receive) {
  Status status;
  try {
    status = receive->unpack(receive->messages);
  } catch (const std::bad_alloc&) {
    status = Status(FaultKind::kOutOfMemory, "no memory to unpack a receive");
  }
  receive->messages.clear();  // gives the rows back to their senders before the program goes on
  if (!status.ok()) status = Fail(receive->expected.rank, std::move(status));
  receive->done(status);
}

void Exchange::OnDeadline(const ReceivePtr& receive) {
  const int32_t rank = receive->expected.rank;
  std::string text;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (closed_ || !fault_.ok() || !MailboxOf(rank).IsWaiting(receive)) return;
    text = MailboxOf(rank).DescribeWait(*receive);
  }
  Raise(Status(FaultKind::kDeadline,
               text + ". Cure: see what that rank does instead; every rank must run the same "
                      "program. If it is only slow, raise timeout_s."),
        rank, /*tell_peers=*/true);
}

}  // namespace smfree::cpu
