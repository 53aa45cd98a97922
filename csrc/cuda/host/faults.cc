// SPDX-License-Identifier: Apache-2.0
#include <cstdio>
#include <string>

#include "csrc/core/describe.h"
#include "csrc/core/errors.h"
#include "csrc/cuda/host/group.h"
#include "csrc/protocol/sets.h"
#include "csrc/protocol/token.h"

namespace smfree::cuda {
namespace {

// The operation that a FaultRecord or an OverflowRecord is about.
template <typename Record>
Identity IdentityOf(const Record& record, Operation operation) {
  Identity identity;
  identity.number = OperationOfNumber(record.number);
  identity.lane = record.lane;
  identity.derivation = record.derivation;
  identity.call_site = record.call_site;
  identity.operation = operation;
  return identity;
}

Status Invalid(const FaultRecord& fault, const std::string& call) {
  if (fault.row >= 0) return InvalidArgument(call, BrokenPlace(fault.row, fault.seen));
  if (fault.peer >= 0) {
    return InvalidArgument(call, BrokenCount(fault.seen, fault.peer, fault.expected));
  }
  if (fault.expected == fault.seen) return InvalidArgument(call, kTokenUsedTwice);
  return InvalidArgument(call, "the program runs as rank " + std::to_string(fault.seen) +
                                   " on the device of rank " + std::to_string(fault.expected) +
                                   ". Fix: run the program on the mesh of the group.");
}

Status Mismatch(const FaultRecord& fault, const std::string& call, const Identity& expected) {
  Identity seen = expected;
  seen.call_site = fault.seen_call_site;
  seen.operation = fault.seen_operation;
  seen.derivation = fault.seen_derivation;
  seen.number = OperationOfNumber(fault.seen_number);
  if (!SameOperation(expected, seen) || expected.derivation != seen.derivation) {
    return ScheduleMismatch(call, DescribeOperation(expected), DescribeOperation(seen),
                            fault.peer);
  }
  if (fault.seen_stride != fault.stride) {
    return ScheduleMismatch(
        call, "rows of " + std::to_string(fault.stride) + " bytes on the wire",
        "rows of " + std::to_string(fault.seen_stride), fault.peer);
  }
  return ScheduleMismatch(call, std::to_string(fault.expected) + " rows",
                          std::to_string(fault.seen) +
                              " rows, or slots where there should be none,",
                          fault.peer);
}

Status Late(const FaultRecord& fault, const std::string& call, double timeout_s) {
  if (fault.peer >= 0) {
    return DeadlineExceeded(
        call, timeout_s,
        "for rank " + std::to_string(fault.peer) +
            (fault.seen == kNoOperation ? ", which has sent nothing here"
                                        : ", whose last message here is number " +
                                              std::to_string(OperationOfNumber(fault.seen))));
  }
  char waited[32];
  std::snprintf(waited, sizeof(waited), "%.1f s", timeout_s);
  return Fault(fault.kind,
               call + ": waited " + waited + " for its own GPU to start block " +
                   std::to_string(fault.seen) + " of the " + std::to_string(fault.expected) +
                   " of a kernel, which must run together. Fix: something else holds the GPU's "
                   "multiprocessors and does not end; see what else runs there.");
}

}  // namespace

Status DescribeFault(const FaultRecord& fault, int32_t rank, double timeout_s) {
  const Identity identity = IdentityOf(fault, OperationOf(fault.phase));
  const std::string call = DescribeCall(Name(fault.phase), rank, identity);
  switch (fault.kind) {
    case FaultKind::kDeadline: return Late(fault, call, timeout_s);
    case FaultKind::kScheduleMismatch: return Mismatch(fault, call, identity);
    case FaultKind::kPeerFailed:
      return Fault(fault.kind, call + ": rank " + std::to_string(fault.peer) +
                                   " (in another process) failed first. Fix: see that "
                                   "process's log.");
    case FaultKind::kTwoInFlight:
      return TwoInFlight(call, "number " + std::to_string(OperationOfNumber(fault.expected)),
                         "keep XLA from running the parts of a CUDA graph side by side"
                         " (--xla_gpu_command_buffer_scheduling_mode=CONCURRENT)");
    case FaultKind::kNoFreeSet:
      return Fault(fault.kind,
                   call + ": " + std::to_string(fault.expected) +
                       " operations are in flight, as many as the group has sets of buffers. Fix: "
                       "receive every operation that is sent; if programs leave so many in flight "
                       "for others to receive, raise EpConfig.num_sets.");
    case FaultKind::kInvalidRouting:
      return InvalidRouting(call, fault.row, fault.seen, static_cast<int32_t>(fault.expected), "");
    default: return Invalid(fault, call);
  }
}

Status DescribeOverflow(const OverflowRecord& overflow, int32_t rank, const GroupConfig& config) {
  const Identity identity = IdentityOf(overflow, Operation::kDispatch);
  const std::string call = DescribeCall(Name(Phase::kDispatchRecv), rank, identity);
  if (overflow.on_wire) return OverflowedWire(call, overflow.received, config);
  if (overflow.at_relay) return OverflowedRelay(call, config);
  if (config.padded_groups) {
    return OverflowedGroup(call, overflow.dropped, overflow.busiest_expert, overflow.its_copies,
                           overflow.capacity, config);
  }
  return Overflowed(call, overflow.dropped, overflow.capacity, config);
}

}  // namespace smfree::cuda
