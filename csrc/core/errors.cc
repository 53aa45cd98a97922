// SPDX-License-Identifier: Apache-2.0
#include "csrc/core/errors.h"

#include <cstdio>
#include <limits>

#include "csrc/protocol/layout.h"

namespace smfree {

Status Fault(FaultKind kind, const std::string& text) {
  return Status(kind, std::string(Name(kind)) + ": " + text);
}

Status CheckConfig(const GroupConfig& config, int64_t ranks) {
  const Nodes nodes = NodesOf(config);
  std::string wrong;
  if (config.num_ranks < 1 || ranks != config.num_ranks) {
    wrong = "num_ranks is " + std::to_string(config.num_ranks) + ", and there are " +
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
  } else if (config.num_lanes < 1 || config.expert_alignment < 1 || config.row_bytes < 1 ||
             config.max_tokens < 1 || config.recv_capacity < 0 || config.wire_capacity < 0) {
    wrong = "a size is not positive";
  } else if (config.padded_groups &&
             config.recv_capacity % (config.num_experts / config.num_ranks *
                                     int64_t{config.expert_alignment}) != 0) {
    wrong = "recv_capacity " + std::to_string(config.recv_capacity) +
            " has no equal parts for the local experts";
  } else if (!IsTimeout(config.timeout_s)) {
    wrong = "timeout_s is " + std::to_string(config.timeout_s) +
            ", expected more than 0 and at most " + std::to_string(kMaxTimeoutS);
  } else if (config.max_tokens > std::numeric_limits<int32_t>::max() / config.num_ranks ||
             RowsCapacity(config, config.max_tokens) > std::numeric_limits<int32_t>::max()) {
    wrong = "max_tokens times num_ranks does not fit 32 bits";
  }
  return wrong.empty() ? Status() : Status(FaultKind::kInvalidArgument, wrong);
}

Status CheckSizes(const GroupConfig& config, const std::string& call, int64_t tokens,
                  int32_t lane) {
  if (tokens >= 0 && tokens <= config.max_tokens && lane >= 0 && lane < config.num_lanes) {
    return Status();
  }
  return InvalidArgument(call, "got " + std::to_string(tokens) + " rows on lane " +
                                   std::to_string(lane) + ", expected up to max_tokens " +
                                   std::to_string(config.max_tokens) + " and lanes below " +
                                   std::to_string(config.num_lanes) +
                                   "; the program was compiled for another EpConfig. Fix: compile "
                                   "it again.");
}

Status InvalidArgument(const std::string& call, const std::string& what) {
  return Fault(FaultKind::kInvalidArgument, call + ": " + what);
}

std::string BrokenHandle(const std::string& what) {
  return "invalid handle: " + what +
         ". Fix: pass the handle of the dispatch unchanged, and only to the rank that got it.";
}

std::string BrokenPlace(int64_t row, int64_t place) {
  return BrokenHandle("row " + std::to_string(row) + " has place " + std::to_string(place));
}

std::string BrokenCount(int64_t seen, int32_t rank, int64_t most) {
  return BrokenHandle("a count or row number of rank " + std::to_string(rank) + " is " +
                      std::to_string(seen) + ", out of the range up to " + std::to_string(most));
}

Status InvalidRouting(const std::string& call, int64_t row, int64_t expert, int32_t num_experts,
                      const std::string& seen) {
  const bool exists = expert >= 0 && expert < num_experts;
  return Fault(FaultKind::kInvalidRouting,
               call + ": row " + std::to_string(row) + " names expert " + std::to_string(expert) +
                   (exists ? " twice" : " of " + std::to_string(num_experts)) + seen +
                   ". Fix: name each expert of a row once, -1 for none.");
}

Status TwoInFlight(const std::string& call, const std::string& other,
                   const std::string& else_where) {
  return Fault(FaultKind::kTwoInFlight,
               call + " begins, and " + other +
                   " was not received here yet. Fix: receive it first and go on with the token "
                   "that its recv returned, or " +
                   else_where + ".");
}

Status ScheduleMismatch(const std::string& call, const std::string& expected,
                        const std::string& got, int32_t source) {
  return Fault(FaultKind::kScheduleMismatch,
               call + ": expected " + expected + " and got " + got + " from rank " +
                   std::to_string(source) +
                   ". Fix: every rank of the group must run the same program with the same "
                   "shapes, and recv must get the token and the handle of its own send.");
}

Status DeadlineExceeded(const std::string& call, double waited_s, const std::string& whom) {
  char waited[32];
  std::snprintf(waited, sizeof(waited), "%.1f s", waited_s);
  return Fault(FaultKind::kDeadline,
               call + ": waited " + waited + " " + whom +
                   ". Fix: see what that rank does instead; every rank must run the same program. "
                   "If it is only slow, raise timeout_s.");
}

namespace {

std::string IsNaNUnlessRaised(const std::string& option) {
  return "; the outputs are NaN. Fix: raise " + option + ", or take overflow='drop'.";
}

// A group without a capacity (0) has room for the worst case: only a call can be short of it.
bool IsOfCall(int64_t capacity, int64_t of_group) { return of_group == 0 || capacity != of_group; }

}  // namespace

Status Overflowed(const std::string& call, int64_t dropped, int64_t capacity,
                  const GroupConfig& config) {
  const bool of_call = IsOfCall(capacity, config.recv_capacity);
  return Fault(FaultKind::kOverflow,
               call + ": " + std::to_string(dropped) + " rows exceed " +
                   (of_call ? "capacity " : "recv_capacity ") + std::to_string(capacity) +
                   (of_call ? " of this call" : "") +
                   IsNaNUnlessRaised(of_call ? "capacity" : "recv_capacity"));
}

Status OverflowedGroup(const std::string& call, int64_t dropped, int32_t expert, int64_t copies,
                       int64_t capacity, const GroupConfig& config) {
  const int32_t local_experts = config.num_experts / config.num_ranks;
  const bool of_call = IsOfCall(capacity, config.recv_capacity / local_experts);
  return Fault(FaultKind::kOverflow,
               call + ": " + std::to_string(dropped) + " rows exceed " +
                   (of_call ? "capacity " + std::to_string(capacity) + " of this call"
                            : "recv_capacity " + std::to_string(config.recv_capacity) + ", " +
                                  std::to_string(capacity) + " for each local expert") +
                   "; the busiest, expert " + std::to_string(expert) + ", got " +
                   std::to_string(copies) +
                   IsNaNUnlessRaised(of_call ? "capacity" : "recv_capacity"));
}

namespace {

Status OverflowedOnTheWay(const std::string& what, const GroupConfig& config) {
  const bool given = config.wire_capacity > 0;
  return Fault(FaultKind::kOverflow,
               what + " wire_capacity " + std::to_string(WireCapacity(config)) +
                   (given ? "" : ", which follows recv_capacity") +
                   IsNaNUnlessRaised(given ? "wire_capacity" : "recv_capacity"));
}

}  // namespace

Status OverflowedWire(const std::string& call, int64_t rows, const GroupConfig& config) {
  return OverflowedOnTheWay(call + ": " + std::to_string(rows) + " rows came here and exceed",
                            config);
}

Status OverflowedRelay(const std::string& call, const GroupConfig& config) {
  return OverflowedOnTheWay(call + ": a relay had more rows for the ranks of this node than",
                            config);
}

Status GroupClosed(const std::string& call) {
  return Fault(FaultKind::kClosed,
               call + ": the group is closed. Fix: close it after the last operation.");
}

Status FailedBefore(const std::string& call, const Status& fault) {
  return Status(fault.kind(),
                call + " cannot go on, since the group failed earlier: " + fault.message());
}

}  // namespace smfree
