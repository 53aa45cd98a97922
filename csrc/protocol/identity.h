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

// Which call of a compiled program an operation comes from, among those that are alike in group,
// lane, derivation, call site and operation (a layer that is called twice). The same in all
// processes; see csrc/cpu/exchange/compiled_calls.h. CPU only.
struct Instance {
  uint32_t ordinal = 0;
  uint32_t program = 0;  // 0 if there is one such call only, else a hash of the program's calls
};
constexpr bool operator==(const Instance& a, const Instance& b) {
  return a.ordinal == b.ordinal && a.program == b.program;
}
constexpr bool operator!=(const Instance& a, const Instance& b) { return !(a == b); }

struct Identity {
  int64_t run_id = 0;     // launch of the program: equal on all ranks and processes of the launch
  int64_t number = 0;     // the operation's number in its sequence, from the token
  uint64_t sequence = 0;  // what one token is threaded through: named by where that token began
  Instance instance;      // of the send
  int32_t lane = 0;
  int32_t derivation = 0;  // 0 = the program as written; base-4 digits, one appended per transform:
                           // 1 tangent, 2 transpose, 3 replay
  uint32_t call_site = 0;  // hash of the user's source line
  Operation operation = Operation::kDispatch;  // set by the phase itself
};
static_assert(std::is_trivially_copyable_v<Identity> && sizeof(Identity) == 48);

constexpr Identity WithOperation(Identity identity, Operation operation) {
  identity.operation = operation;
  return identity;
}

// A point in a sequence of operations. A token is used once, so all ranks make one call there; only
// a token that is kept and used again (by a custom_vjp that recomputes) has several calls of one
// line at a point, which their instances tell apart. Messages of one point from one rank to
// another arrive in the order of sending: a loop may come by again.
struct Point {
  int64_t run_id;
  uint64_t sequence;
  int64_t number;
  int32_t lane;
  int32_t derivation;

  explicit Point(const Identity& identity)
      : run_id(identity.run_id),
        sequence(identity.sequence),
        number(identity.number),
        lane(identity.lane),
        derivation(identity.derivation) {}
  friend bool operator<(const Point& a, const Point& b) {
    const auto tied = [](const Point& p) {
      return std::tie(p.run_id, p.sequence, p.number, p.lane, p.derivation);
    };
    return tied(a) < tied(b);
  }
};

// The same line of the user's program.
constexpr bool SameCall(const Identity& a, const Identity& b) {
  return a.call_site == b.call_site && a.operation == b.operation;
}

// The same operation of the same point. Both identities must be of one point, but for the number.
constexpr bool SameOperation(const Identity& a, const Identity& b) {
  return a.number == b.number && a.instance == b.instance && SameCall(a, b);
}

}  // namespace smfree

#endif  // SMFREE_CSRC_PROTOCOL_IDENTITY_H_
