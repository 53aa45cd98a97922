// SPDX-License-Identifier: Apache-2.0
//
// What can go wrong between ranks, in the words that Python, C++ and (by number) device code share.
#ifndef SMFREE_CSRC_PROTOCOL_FAULTS_H_
#define SMFREE_CSRC_PROTOCOL_FAULTS_H_

#include <cstdint>

namespace smfree {

// The numbers travel between processes and through device memory: append, never renumber.
enum class FaultKind : int32_t {
  kNone = 0,
  kInvalidArgument = 1,   // shapes, ranks or handle arrays that contradict the group
  kInvalidRouting = 2,    // topk_idx names an expert twice in a row, or one that does not exist
  kTwoInFlight = 3,       // two operations on one set (GPU), or at one point of a sequence (CPU)
  kScheduleMismatch = 4,  // a peer sent another operation, or the same one with other shapes
  kDeadline = 5,          // a receive waited longer than timeout_s
  kPeerDied = 6,          // the process of a rank ended without closing the group
  kPeerClosed = 7,        // the process of a rank closed the group while this rank still needs it
  kClosed = 8,            // this process closed the group, or has not connected it yet
  kOverflow = 9,          // more rows than a capacity; not a protocol fault, the group goes on
  kOutOfMemory = 10,      // the operating system refused memory for the rows in flight
  kSystem = 11,           // a socket or another system call failed
  kPeerFailed = 12,       // a rank in another process has met a fault, which it knows
  kUnreceived = 13,       // a rank goes on sending operations that it never receives
  kNoFreeSet = 14,        // more operations in flight than the group has sets of buffers
};

constexpr const char* Name(FaultKind kind) {
  switch (kind) {
    case FaultKind::kNone: return "ok";
    case FaultKind::kInvalidArgument: return "invalid argument";
    case FaultKind::kInvalidRouting: return "invalid routing";
    case FaultKind::kTwoInFlight: return "two operations in flight on one lane";
    case FaultKind::kScheduleMismatch: return "schedule mismatch";
    case FaultKind::kDeadline: return "deadline exceeded";
    case FaultKind::kPeerDied: return "peer died";
    case FaultKind::kPeerClosed: return "peer closed its group";
    case FaultKind::kClosed: return "group closed";
    case FaultKind::kOverflow: return "receive capacity exceeded";
    case FaultKind::kOutOfMemory: return "out of memory";
    case FaultKind::kSystem: return "system error";
    case FaultKind::kPeerFailed: return "peer failed";
    case FaultKind::kUnreceived: return "operations never received";
    case FaultKind::kNoFreeSet: return "no free buffers";
  }
  return "unknown fault";
}

}  // namespace smfree

#endif  // SMFREE_CSRC_PROTOCOL_FAULTS_H_
