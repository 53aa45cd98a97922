// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/exchange/mailbox.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "csrc/core/describe.h"
#include "csrc/core/errors.h"

namespace smfree::cpu {
namespace {

constexpr int64_t kMaxDescribed = 4;  // ranks, and messages of a rank
// Operations of earlier runs that a rank may have in flight.
constexpr int64_t kMaxOfEarlierRuns = 16;

Status Mismatch(const Expectation& expected, const MessageHeader& found,
                const std::string& what, const std::string& got) {
  return ScheduleMismatch(DescribeCall(expected.phase, expected.rank, expected.identity), what, got,
                          found.source);
}

// The shapes of a message of the right operation.
Status CheckShapes(const Expectation& expected, const MessageHeader& found) {
  if (found.tokens != expected.tokens) {
    return Mismatch(expected, found,
                    "an operation of " + std::to_string(expected.tokens) + " rows per rank",
                    "one of " + std::to_string(found.tokens));
  }
  if (found.stride != expected.stride) {
    return Mismatch(expected, found,
                    "rows of " + std::to_string(expected.stride) + " bytes on the wire",
                    "rows of " + std::to_string(found.stride));
  }
  // Without rows there is nothing that could ride along with them.
  if (found.rows > 0 && expected.experts != 0 && found.experts != expected.experts) {
    return Mismatch(expected, found, "rows with expert ids", "rows without");
  }
  if (found.rows > 0 && expected.slots != 0 && found.slots != expected.slots) {
    return Mismatch(expected, found, "rows with slots", "rows without");
  }
  const auto region = static_cast<size_t>(found.region);
  if (expected.counts.empty()) return Status();
  const int32_t rows = expected.counts[region];
  if (found.rows > rows || (found.rows < rows && !expected.may_be_cut)) {
    return Mismatch(expected, found,
                    (expected.may_be_cut ? "at most " : "") + std::to_string(rows) +
                        " rows by its handle",
                    std::to_string(found.rows));
  }
  return Status();
}

// Whether a message at the point of `expected` may be of another call of the same line.
bool MayBeAnotherCall(const Expectation& expected, const MessageHeader& found) {
  return SameCall(found.identity, expected.identity) && found.tokens == expected.tokens &&
         found.stride == expected.stride &&
         found.identity.instance.program == expected.identity.instance.program;
}

std::string DescribeOtherCall(const Expectation& expected, const MessageHeader& found) {
  if (!SameCall(found.identity, expected.identity)) return DescribeOperation(found.identity);
  std::string of;
  if (found.tokens != expected.tokens) {
    of = std::to_string(found.tokens) + " rows per rank instead of " +
         std::to_string(expected.tokens);
  } else if (found.stride != expected.stride) {
    of = "rows of " + std::to_string(found.stride) + " bytes on the wire instead of " +
         std::to_string(expected.stride);
  } else {
    return "a call of that line in another program";
  }
  return "another call of that line (another branch of a cond, or a jitted function that is called "
         "twice), of " +
         of + ",";
}

}  // namespace

Mailbox::Traffic& Mailbox::At(const Identity& identity) {
  const Point point(identity);
  const auto found = points_.find(point);
  if (found != points_.end()) return found->second;
  if (!spare_.empty()) {
    spare_.key() = point;
    return points_.insert(std::move(spare_)).position->second;
  }
  Traffic& traffic = points_[point];
  for (const Leg leg : {kWire, kNode}) {
    traffic.arrived[leg].resize(static_cast<size_t>(nodes_.Regions(leg)));
  }
  return traffic;
}

void Mailbox::Leave(const Identity& identity) {
  const auto it = points_.find(Point(identity));
  if (it->second.empty()) spare_ = points_.extract(it);
}

Status Mailbox::BeginSend(const char* phase, const Identity& identity) {
  Traffic& traffic = At(identity);
  for (const Identity& other : traffic.in_flight) {
    if (SameCall(other, identity) && other.instance != identity.instance) continue;
    return TwoInFlight(DescribeCall(phase, rank_, identity),
                       DescribeOperation(other) + ", which began with the same token,",
                       "begin each with a fresh group.token()");
  }
  traffic.in_flight.push_back(identity);
  if (points_.size() <= kMaxOfEarlierRuns) return Status();
  Unreceived unreceived;
  AddUnreceived(identity.run_id, &unreceived);
  if (unreceived.count() <= kMaxOfEarlierRuns) return Status();
  return Status(FaultKind::kUnreceived,
                DescribeCall(phase, rank_, identity) +
                    " begins, and in earlier runs this rank has sent and never received " +
                    unreceived.Describe() +
                    ". Fix: receive every operation with the token that its send returned, also "
                    "where its result is not needed.");
}

StatusOr<Mailbox::Match> Mailbox::TakeFrom(Traffic& traffic, int32_t region,
                                           Receive& receive) const {
  const Expectation& expected = receive.expected;
  auto& fifo = traffic.arrived[expected.leg][static_cast<size_t>(region)];
  Message& taken = receive.messages[static_cast<size_t>(region)];
  if (fifo.empty() || taken.data != nullptr) return Match::kNone;
  const auto found = std::find_if(fifo.begin(), fifo.end(), [&](const Message& message) {
    return SameOperation(message.header.identity, expected.identity);
  });
  if (found == fifo.end()) {
    const auto other = std::find_if(fifo.begin(), fifo.end(), [&](const Message& message) {
      return !MayBeAnotherCall(expected, message.header);
    });
    if (other == fifo.end()) return Match::kNone;
    return Mismatch(expected, other->header, DescribeOperation(expected.identity),
                    DescribeOtherCall(expected, other->header));
  }
  Status shapes = CheckShapes(expected, found->header);
  if (!shapes.ok()) return shapes;
  taken = std::move(*found);
  fifo.erase(found);
  --traffic.unread;
  --receive.missing;
  return Match::kTaken;
}

void Mailbox::Complete(Traffic& traffic, const Receive& receive) const {
  const Expectation& expected = receive.expected;
  if (expected.leg != nodes_.LastLeg(expected.identity.operation)) return;
  auto& sent = traffic.in_flight;
  const auto it = std::find_if(sent.begin(), sent.end(), [&](const Identity& identity) {
    return SameOperation(identity, expected.identity);
  });
  if (it != sent.end()) sent.erase(it);
}

Status Mailbox::Deliver(Message message, ReceivePtr* complete) {
  const MessageHeader header = message.header;
  const Identity& identity = header.identity;
  last_from_[static_cast<size_t>(header.source)] = header;
  Traffic& traffic = At(identity);
  traffic.arrived[header.leg][static_cast<size_t>(header.region)].push_back(std::move(message));
  ++traffic.unread;
  for (auto it = traffic.waiting.begin(); it != traffic.waiting.end(); ++it) {
    if ((*it)->expected.leg != header.leg) continue;
    const auto match = TakeFrom(traffic, header.region, **it);
    if (!match.ok()) return match.status();
    if (match.value() == Match::kNone) continue;
    if ((*it)->missing == 0) {
      *complete = *it;
      traffic.waiting.erase(it);
      Complete(traffic, **complete);
      Leave(identity);
    }
    break;
  }
  return Status();
}

Status Mailbox::Expect(const ReceivePtr& receive, bool* complete) {
  const Identity& identity = receive->expected.identity;
  Traffic& traffic = At(identity);
  const int32_t regions = nodes_.Regions(receive->expected.leg);
  receive->messages.resize(static_cast<size_t>(regions));
  receive->missing = regions;
  for (int32_t region = 0; region < regions; ++region) {
    const auto match = TakeFrom(traffic, region, *receive);
    if (!match.ok()) return match.status();
  }
  *complete = receive->missing == 0;
  if (!*complete) {
    traffic.waiting.push_back(receive);
  } else {
    Complete(traffic, *receive);
    Leave(identity);
  }
  return Status();
}

bool Mailbox::IsWaiting(const ReceivePtr& receive) const {
  const auto it = points_.find(Point(receive->expected.identity));
  if (it == points_.end()) return false;
  const auto& waiting = it->second.waiting;
  return std::find(waiting.begin(), waiting.end(), receive) != waiting.end();
}

std::vector<int32_t> Mailbox::Missing(const Receive& receive) const {
  std::vector<int32_t> missing;
  for (size_t region = 0; region < receive.messages.size(); ++region) {
    if (receive.messages[region].data != nullptr) continue;
    const int32_t peer = nodes_.Peer(receive.expected.leg, rank_, static_cast<int32_t>(region));
    if (std::find(missing.begin(), missing.end(), peer) == missing.end()) missing.push_back(peer);
  }
  return missing;
}

std::string Mailbox::DescribeMissing(const Receive& receive, int32_t source) const {
  // What lies unread from that source, at whatever point: most often the operation that the peer
  // took instead of the expected one.
  std::string unread;
  int64_t count = 0;
  bool of_this_run = false;
  ForEachUnread([&](const Message& message) {
    if (message.header.source != source) return;
    const Identity& identity = message.header.identity;
    of_this_run |= identity.run_id == receive.expected.identity.run_id;
    if (++count > kMaxDescribed) return;
    unread += (unread.empty() ? "; unread from it: " : ", ") + DescribeOperation(identity);
  });
  if (count > kMaxDescribed) unread += " and " + std::to_string(count - kMaxDescribed) + " more";
  if (of_this_run) unread += ", which nothing here waits for (schedule mismatch)";
  const auto& last = last_from_[static_cast<size_t>(source)];
  std::string text = "rank " + std::to_string(source) + ": nothing arrived; ";
  text +=
      last ? "last from rank " + std::to_string(source) + ": " + DescribeOperation(last->identity)
           : "rank " + std::to_string(source) + " never sent anything";
  if (last && last->identity.run_id != receive.expected.identity.run_id) text += " of another run";
  return text + unread;
}

Status Mailbox::Late(const Receive& receive) const {
  const Expectation& expected = receive.expected;
  const std::vector<int32_t> missing = Missing(receive);
  std::string whom = expected.leg == kNode ? "inside its node for " : "for ";
  const size_t described = std::min<size_t>(missing.size(), kMaxDescribed);
  for (size_t i = 0; i < described; ++i) {
    whom += (i == 0 ? "" : "; for ") + DescribeMissing(receive, missing[i]);
  }
  if (missing.size() > described) {
    whom += "; and for rank(s) " + JoinNumbers({missing.begin() + kMaxDescribed, missing.end()});
  }
  return DeadlineExceeded(DescribeCall(expected.phase, expected.rank, expected.identity),
                          Seconds(Clock::now() - expected.since), whom);
}

Mailbox::Contents Mailbox::TakeAll() {
  Contents contents;
  for (auto& [point, traffic] : points_) {
    for (ReceivePtr& receive : traffic.waiting) contents.receives.push_back(std::move(receive));
    for (auto& leg : traffic.arrived) {
      for (auto& fifo : leg) {
        std::move(fifo.begin(), fifo.end(), std::back_inserter(contents.messages));
      }
    }
  }
  points_.clear();
  return contents;
}

std::vector<ReceivePtr> Mailbox::Waiting() const {
  std::vector<ReceivePtr> waiting;
  for (const auto& [point, traffic] : points_) {
    waiting.insert(waiting.end(), traffic.waiting.begin(), traffic.waiting.end());
  }
  return waiting;
}

int64_t Mailbox::messages() const {
  int64_t count = 0;
  ForEachUnread([&](const Message&) { ++count; });
  return count;
}

void Mailbox::AddUnreceived(std::optional<int64_t> but_run_id, Unreceived* all) const {
  for (const auto& [point, traffic] : points_) {
    if (point.run_id == but_run_id) continue;
    int64_t bytes = 0;
    for (const auto& leg : traffic.arrived) {
      for (const auto& fifo : leg) {
        for (const Message& message : fifo) bytes += message.header.bytes;
      }
    }
    for (const Identity& sent : traffic.in_flight) all->Add(sent, std::exchange(bytes, 0));
  }
}

void Mailbox::ForEachUnread(const std::function<void(const Message&)>& body) const {
  for (const auto& [point, traffic] : points_) {
    for (const auto& leg : traffic.arrived) {
      for (const auto& fifo : leg) std::for_each(fifo.begin(), fifo.end(), body);
    }
  }
}

}  // namespace smfree::cpu
