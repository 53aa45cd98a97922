// SPDX-License-Identifier: Apache-2.0
//
// The four phases: an operation is a send and a recv.
#ifndef SMFREE_CSRC_PROTOCOL_PHASE_H_
#define SMFREE_CSRC_PROTOCOL_PHASE_H_

#include <cstdint>

#include "csrc/protocol/identity.h"

namespace smfree {

enum class Phase : int32_t { kDispatchSend = 0, kDispatchRecv, kCombineSend, kCombineRecv };
constexpr int32_t kPhases = 4;

constexpr bool IsSend(Phase phase) {
  return phase == Phase::kDispatchSend || phase == Phase::kCombineSend;
}
constexpr Operation OperationOf(Phase phase) {
  return phase == Phase::kDispatchSend || phase == Phase::kDispatchRecv ? Operation::kDispatch
                                                                        : Operation::kCombine;
}
constexpr Phase SendOf(Operation operation) {
  return operation == Operation::kDispatch ? Phase::kDispatchSend : Phase::kCombineSend;
}
constexpr Phase RecvOf(Operation operation) {
  return operation == Operation::kDispatch ? Phase::kDispatchRecv : Phase::kCombineRecv;
}
constexpr const char* Name(Phase phase) {
  constexpr const char* kNames[] = {"dispatch_send", "dispatch_recv", "combine_send",
                                    "combine_recv"};
  return kNames[static_cast<int32_t>(phase)];
}

}  // namespace smfree

#endif  // SMFREE_CSRC_PROTOCOL_PHASE_H_
