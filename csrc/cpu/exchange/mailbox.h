// SPDX-License-Identifier: Apache-2.0
//
// The mailbox of one rank: what arrived for it, what it waits for, what it has sent and not
// received yet; and the rules that decide which message a receive takes. It has no lock and no
// threads: the Exchange guards all mailboxes of a process with one mutex.
//
// A receive takes from each region of its leg (nodes.h) the first message of its identity. So
// operations of different points, and of different instances at one point (identity.h), do not
// depend on each other, in whatever order ranks run them. Three things are refused:
//   * a send while the same operation, or one of another line, is in flight at its point;
//   * a send while many of earlier runs of programs are in flight: what is never received would
//     pile up. A token in flight may leave its program, so a few are fine;
//   * a message of another line, or with other shapes, than what is waited for at its point: ranks
//     disagree. It is found at once, where one token was threaded through what they did so far.
#ifndef SMFREE_CSRC_CPU_EXCHANGE_MAILBOX_H_
#define SMFREE_CSRC_CPU_EXCHANGE_MAILBOX_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "csrc/cpu/backend.h"
#include "csrc/cpu/exchange/message.h"
#include "csrc/cpu/exchange/unreceived.h"
#include "csrc/cpu/runtime/event_loop.h"

namespace smfree::cpu {

// What a receive is ready for.
struct Expectation {
  const char* phase = "";  // its name, for errors
  int32_t rank = 0;
  Identity identity;
  int64_t tokens = 0;
  int32_t experts = 0;          // expert ids per row that it needs, or 0
  int32_t slots = 0;            // values per row that it needs, or 0
  int32_t stride = 0;           // bytes from row to row
  Leg leg = kWire;
  std::vector<int32_t> counts;  // rows of each region's message if they are known, else empty
  bool may_be_cut = false;      // whether a message may have fewer rows than that
  Clock::time_point since = Clock::now();  // when the phase was called, which the deadline is from
};

using Unpacker = std::function<Status(const std::vector<Message>&)>;  // messages by region

// A receive that was called and is not complete.
struct Receive {
  Expectation expected;
  Unpacker unpack;
  Done done;
  EventLoop::TimerId deadline{};
  std::vector<Message> messages;  // by region; without data until it is there
  int32_t missing = 0;
};
using ReceivePtr = std::shared_ptr<Receive>;

class Mailbox {
 public:
  Mailbox(int32_t rank, const Nodes& nodes)
      : rank_(rank), nodes_(nodes), last_from_(static_cast<size_t>(nodes.num_ranks)) {}

  Status BeginSend(const char* phase, const Identity& identity);

  // Puts a message in. *complete gets the receive whose last message it was, if so; that receive is
  // then no longer in the mailbox.
  Status Deliver(Message message, ReceivePtr* complete);
  // Puts a receive in, unless its messages are all there: then *complete says so.
  Status Expect(const ReceivePtr& receive, bool* complete);

  bool IsWaiting(const ReceivePtr& receive) const;
  // The ranks that a receive still waits for.
  std::vector<int32_t> Missing(const Receive& receive) const;
  // The fault of a receive whose deadline has passed: for whom it waits, and what came instead.
  Status Late(const Receive& receive) const;

  // Empties the mailbox; the caller ends the receives and lets go of the messages without a lock.
  struct Contents {
    std::vector<ReceivePtr> receives;
    std::vector<Message> messages;
  };
  Contents TakeAll();
  std::vector<ReceivePtr> Waiting() const;
  int64_t messages() const;
  // Adds what this rank has sent and not received, in other runs than this one if it is given.
  void AddUnreceived(std::optional<int64_t> but_run_id, Unreceived* all) const;

 private:
  struct Traffic {  // of one point
    std::vector<std::vector<Message>> arrived[kLegs];  // FIFO by region; short: erasing is cheap
    int32_t unread = 0;                                // messages in them
    std::vector<ReceivePtr> waiting;
    std::vector<Identity> in_flight;  // sent by this rank and not received here

    bool empty() const { return unread == 0 && waiting.empty() && in_flight.empty(); }
  };
  enum class Match { kNone, kTaken };

  Traffic& At(const Identity& identity);
  // Forgets the identity's point if nothing goes on there.
  void Leave(const Identity& identity);
  StatusOr<Match> TakeFrom(Traffic& traffic, int32_t region, Receive& receive) const;
  // All of `receive` is there; on its operation's last leg the operation is in flight no more.
  void Complete(Traffic& traffic, const Receive& receive) const;
  void ForEachUnread(const std::function<void(const Message&)>& body) const;
  std::string DescribeMissing(const Receive& receive, int32_t source) const;

  const int32_t rank_;
  const Nodes nodes_;
  std::map<Point, Traffic> points_;
  std::map<Point, Traffic>::node_type spare_;  // a point that was left, for its memory
  std::vector<std::optional<MessageHeader>> last_from_;  // the last arrival of each source
};

}  // namespace smfree::cpu

#endif  // SMFREE_CSRC_CPU_EXCHANGE_MAILBOX_H_
