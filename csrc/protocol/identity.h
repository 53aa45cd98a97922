// SPDX-License-Identifier: Apache-2.0
//
// Identity: what a message belongs to. Every message carries one, and a receiver takes a message
// only if it is the one it expects; another one is a schedule mismatch, never silent corruption.
#ifndef SMFREE_CSRC_PROTOCOL_IDENTITY_H_
#define SMFREE_CSRC_PROTOCOL_IDENTITY_H_

#include <cstdint>
#include <tuple>
#include <type_traits>

namespace smfree {

enum class Operation : int32_t { kDispatch = 0, kCombine = 1 };

constexpr const char* Name(Operation operation) {
  return operation == Operation::kDispatch ? "dispatch" : "combine";
}

struct Identity {
  int64_t run_id = 0;    // launch of the program: equal on all ranks and processes of the launch
  int64_t number = 0;    // the operation's number on its lane, from the token
  int64_t instance = 0;  // HLO instance of the send; process-local, so 0 if the group spans several
  int32_t lane = 0;
  int32_t derivation = 0;  // 0 = the program as written; base-4 digits, one appended per transform:
                           // 1 tangent, 2 transpose, 3 replay
  uint32_t call_site = 0;  // hash of the user's source line
  Operation operation = Operation::kDispatch;  // set by the phase itself
};
static_assert(std::is_trivially_copyable_v<Identity> && sizeof(Identity) == 40);

// One sequence of operations: within it a rank's messages to a peer arrive in the order of sending.
struct StreamKey {
  int64_t run_id;
  int32_t lane;
  int32_t derivation;

  explicit StreamKey(const Identity& identity)
      : run_id(identity.run_id), lane(identity.lane), derivation(identity.derivation) {}
  friend bool operator<(const StreamKey& a, const StreamKey& b) {
    return std::tie(a.run_id, a.lane, a.derivation) < std::tie(b.run_id, b.lane, b.derivation);
  }
};

// The same operation of the same stream. Both identities must be of one stream.
constexpr bool SameOperation(const Identity& a, const Identity& b) {
  return a.number == b.number && a.instance == b.instance && a.call_site == b.call_site &&
         a.operation == b.operation;
}

// A stream that holds a replay (a rematerialised forward pass) has no order of its own: XLA CPU may
// run the replays of several layers side by side. In all other streams one operation follows the
// other, and a message out of turn is a fault.
constexpr bool IsReplay(int32_t derivation) {
  for (; derivation > 0; derivation /= 4) {
    if (derivation % 4 == 3) return true;
  }
  return false;
}

}  // namespace smfree

#endif  // SMFREE_CSRC_PROTOCOL_IDENTITY_H_
