// SPDX-License-Identifier: Apache-2.0
//
// The exchange's messages: begin a send, post, deliver, expect, finish.
#include <chrono>
#include <new>
#include <utility>

#include "csrc/core/describe.h"
#include "csrc/core/errors.h"
#include "csrc/core/patience.h"
#include "csrc/cpu/exchange/exchange.h"
#include "csrc/cpu/runtime/completion_pool.h"

namespace smfree::cpu {

bool Exchange::IsLocal(int32_t rank) const {
  return rank >= 0 && rank < config_.num_ranks &&
         process_of_rank_[static_cast<size_t>(rank)] == my_process_;
}

Status Exchange::CheckCall(const char* phase, int32_t rank, int64_t tokens,
                           const Identity& identity, const Status& arguments) const {
  const std::string call = DescribeCall(phase, rank, identity);
  if (!IsLocal(rank)) {
    return InvalidArgument(call, "this process has no rank " + std::to_string(rank) + " of " +
                                     std::to_string(config_.num_ranks));
  }
  const Status sizes = CheckSizes(config_, call, tokens, identity.lane);
  return sizes.ok() && !arguments.ok() ? InvalidArgument(call, arguments.message()) : sizes;
}

Status Exchange::CheckOpen(const char* phase, int32_t rank, const Identity& identity) const {
  if (closed_) return GroupClosed(DescribeCall(phase, rank, identity));
  if (!fault_.ok()) return FailedBefore(DescribeCall(phase, rank, identity), fault_);
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
  if (status.ok()) ++stats_.of(SendOf(identity.operation)).calls;
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
    // As long as any message is held back, the others queue up behind it, so that those of a point
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
  const Operation operation = header.identity.operation;
  PhaseStats& phase = stats_.of(SendOf(operation));
  const bool first_leg = header.leg == nodes_.FirstLeg(operation);
  (first_leg ? phase.rows : stats_.rows_relayed) += header.rows;
  (first_leg ? phase.bytes : stats_.bytes_relayed) += header.bytes;
  if (nodes_.NodeOf(header.source) == nodes_.NodeOf(header.destination)) return;
  stats_.internode(operation) += header.bytes;
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
      header.handed >= 0 && header.handed <= header.rows &&
      header.tokens <= config_.max_tokens &&
      (header.experts == 0 || header.experts == config_.top_k) &&
      (header.slots == 0 || header.slots == config_.top_k) &&
      header.stride >= 0 && header.stride <= AlignUp(config_.row_bytes, kRowAlignment) &&
      header.bytes == message.layout().bytes;
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
  PhaseStats& stats = stats_.of(RecvOf(operation));
  ++stats.calls;
  stats.wait_ns += NanosecondsSince(receive.expected.since);
  for (const Message& message : receive.messages) {
    stats.rows += message.header.rows;
    stats.bytes += message.header.bytes;
  }
}

Clock::time_point Exchange::DeadlineOf(const Expectation& expected) const {
  const bool for_relay = expected.leg != nodes_.FirstLeg(expected.identity.operation);
  return expected.since +
         std::chrono::nanoseconds(PatienceNs(Nanoseconds(config_.timeout_s), for_relay));
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
  Status late;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (closed_ || !fault_.ok() || !MailboxOf(rank).IsWaiting(receive)) return;
    late = MailboxOf(rank).Late(*receive);
  }
  Raise(late, rank, /*tell_peers=*/true);
}

}  // namespace smfree::cpu
