// SPDX-License-Identifier: Apache-2.0
//
// How long a wait for another rank may last, on the host and on devices.
#ifndef SMFREE_CSRC_CORE_PATIENCE_H_
#define SMFREE_CSRC_CORE_PATIENCE_H_

#include <cstdint>

#include "csrc/protocol/host_device.h"

namespace smfree {

// What making a group, or sets of it, may take beside timeout_s: kernels are loaded, memory is
// zeroed.
constexpr int32_t kMakeSeconds = 30;

constexpr int64_t Nanoseconds(double seconds) { return static_cast<int64_t>(seconds * 1e9); }

// Whoever waits for a relay is more patient than the relay, so that the fault names the rank that
// is silent, not one that waits for it.
SMFREE_HD constexpr int64_t PatienceNs(int64_t timeout_ns, bool for_relay) {
  constexpr int64_t kMostGraceNs = 1'000'000'000;
  const int64_t grace_ns = timeout_ns / 4 < kMostGraceNs ? timeout_ns / 4 : kMostGraceNs;
  return for_relay ? timeout_ns + grace_ns : timeout_ns;
}

}  // namespace smfree

#endif  // SMFREE_CSRC_CORE_PATIENCE_H_
