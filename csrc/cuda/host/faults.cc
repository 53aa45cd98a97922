// SPDX-License-Identifier: Apache-2.0
#include <cstdio>
#include <string>

#include "csrc/cuda/host/group.h"
#include "csrc/protocol/describe.h"
#include "csrc/protocol/token.h"

namespace smfree::cuda {
namespace {

Identity IdentityOf(const FaultRecord& fault) {
  Identity identity;
  identity.number = fault.number - 1;  // for users, the first operation of a lane is number 0
  identity.lane = fault.lane;
  identity.derivation = fault.derivation;
  identity.call_site = fault.call_site;
  const bool dispatch =
      fault.phase == Phase::kDispatchSend || fault.phase == Phase::kDispatchRecv;
  identity.operation = dispatch ? Operation::kDispatch : Operation::kCombine;
  return identity;
}

std::string Seconds(double seconds) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.1f s", seconds);
  return text;
}

std::string InvalidArgument(const FaultRecord& fault) {
  const std::string seen = std::to_string(fault.seen);
  if (fault.row >= 0 || fault.peer >= 0) {
    return "the handle is broken: " +
           (fault.row >= 0 ? "row " + std::to_string(fault.row) + " has place " + seen
                           : "it says " + seen + " of rank " + std::to_string(fault.peer) +
                                 ", where at most " + std::to_string(fault.expected) +
                                 " is possible") +
           ". Cure: pass the handle of the dispatch unchanged, and only to the rank that got it.";
  }
  if (fault.expected == fault.seen) return kTokenUsedTwice;
  return "the program runs as rank " + seen + " on the device of rank " +
         std::to_string(fault.expected) + ". Cure: run the program on the mesh of the group.";
}

std::string Mismatch(const FaultRecord& fault) {
  const Identity expected = IdentityOf(fault);
  Identity seen = expected;
  seen.call_site = fault.seen_call_site;
  seen.operation = fault.seen_operation;
  seen.derivation = fault.seen_derivation;
  seen.number = fault.seen_number - 1;
  const std::string peer = "rank " + std::to_string(fault.peer);
  if (!SameOperation(expected, seen) || expected.derivation != seen.derivation) {
    return "expected " + DescribeOperation(expected) + " from " + peer + ", got " +
           DescribeOperation(seen) + ". Cure: run the same program on all ranks.";
  }
  return "expected " + std::to_string(fault.expected) + " rows from " + peer + ", got " +
         std::to_string(fault.seen) +
         ", or slots where there should be none. Cure: run the same program with the same shapes "
         "on all ranks.";
}

std::string What(const FaultRecord& fault, double timeout_s) {
  switch (fault.kind) {
    case FaultKind::kDeadline:
      if (fault.peer < 0) {
        return "waited " + Seconds(timeout_s) + " for its own GPU to start block " +
               std::to_string(fault.seen) + " of the " + std::to_string(fault.expected) +
               " of a kernel, which must run together. Cure: something else holds the GPU's "
               "multiprocessors and does not end; see what else runs there.";
      }
      return "waited " + Seconds(timeout_s) + " for rank " + std::to_string(fault.peer) +
             (fault.seen == kNoOperation
                  ? ", which has sent nothing here"
                  : ", whose last message here is number " + std::to_string(fault.seen - 1)) +
             ". Cure: see what that rank does instead; every rank must run the same program. If it "
             "is only slow, raise timeout_s.";
    case FaultKind::kScheduleMismatch: return Mismatch(fault);
    case FaultKind::kPeerFailed:
      return "rank " + std::to_string(fault.peer) +
             ", which is in another process, is at fault. Cure: see its error.";
    case FaultKind::kTwoInFlight:
      return "number " + std::to_string(fault.expected - 1) +
             " was sent, and not received here yet. Cure: receive it first, with the token that "
             "its send returned, or use another lane.";
    case FaultKind::kInvalidRouting:
      return "row " + std::to_string(fault.row) + " names expert " + std::to_string(fault.seen) +
             " of " + std::to_string(fault.expected) +
             (fault.seen >= 0 && fault.seen < fault.expected ? " twice" : "") +
             ". Cure: name each expert of a row once, -1 for none.";
    default: return InvalidArgument(fault);
  }
}

}  // namespace

Status DescribeFault(const FaultRecord& fault, int32_t rank, double timeout_s) {
  return Status(fault.kind, std::string(Name(fault.kind)) + ": " +
                                DescribeCall(Name(fault.phase), rank, IdentityOf(fault)) + ": " +
                                What(fault, timeout_s));
}

Status DescribeOverflow(const OverflowRecord& overflow, int32_t rank) {
  Identity identity;
  identity.number = overflow.number - 1;
  identity.lane = overflow.lane;
  identity.derivation = overflow.derivation;
  identity.call_site = overflow.call_site;
  return Status(FaultKind::kOverflow,
                DescribeCall(Name(Phase::kDispatchRecv), rank, identity) + ": " +
                    std::to_string(overflow.dropped) + " rows exceed recv_capacity " +
                    std::to_string(overflow.capacity) +
                    "; the outputs are NaN. Cure: raise recv_capacity, or take overflow='drop'.");
}

}  // namespace smfree::cuda
