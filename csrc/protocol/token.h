// SPDX-License-Identifier: Apache-2.0
//
// The token's array: what one operation tells the next one that it is threaded through.
//
// Floats, because the cotangent of a token is a token and JAX adds zeros to cotangents; numbers are
// split so that float32 holds them exactly. Two tokens that were added have magic 2.
#ifndef SMFREE_CSRC_PROTOCOL_TOKEN_H_
#define SMFREE_CSRC_PROTOCOL_TOKEN_H_

#include <cstdint>

#include "csrc/protocol/host_device.h"
#include "csrc/protocol/identity.h"

namespace smfree {

struct Token {
  static constexpr int64_t kSize = 9;
  static constexpr int64_t kExact = int64_t{1} << 24;  // float32 holds all integers up to this
  static constexpr int64_t kLimit = kExact * kExact;

  float magic = 0;        // 1; 0: a fresh token, or a cotangent that nothing was added to
  int64_t number = 0;     // in flight: the operation's; ready: CPU, the next one; GPU, the last one
  int64_t run_id = 0;     // in flight, CPU: of the program that ran the send; GPU: the set
  Instance instance;      // in flight, CPU: of the send
  uint64_t sequence = 0;  // CPU; 0: of the next send

  SMFREE_HD static Token Read(const float* array) {
    return Token{array[0], Join(array + 1), Join(array + 3),
                 Instance{static_cast<uint32_t>(array[5]), static_cast<uint32_t>(array[6])},
                 static_cast<uint64_t>(Join(array + 7))};
  }
  SMFREE_HD void Write(float* array) const {
    array[0] = magic;
    Split(number, array + 1);
    Split(run_id, array + 3);
    array[5] = static_cast<float>(instance.ordinal);
    array[6] = static_cast<float>(instance.program);
    Split(static_cast<int64_t>(sequence), array + 7);
  }

  // On a GPU: of the operation in flight.
  SMFREE_HD static Token InSet(int64_t number, int32_t set) {
    return {1.0f, number, set, Instance{}, 0};
  }
  SMFREE_HD int32_t set() const { return static_cast<int32_t>(run_id); }

  SMFREE_HD bool zero() const { return magic == 0.0f; }
  SMFREE_HD bool used_once() const { return magic == 0.0f || magic == 1.0f; }

 private:
  SMFREE_HD static int64_t Join(const float* halves) {
    return static_cast<int64_t>(halves[0]) * kExact + static_cast<int64_t>(halves[1]);
  }
  SMFREE_HD static void Split(int64_t value, float* halves) {
    halves[0] = static_cast<float>(value / kExact);
    halves[1] = static_cast<float>(value % kExact);
  }
};

inline constexpr const char* kTokenUsedTwice =
    "a token was used more than once: its uses in the backward pass were added up. "
    "Pass on the token that each operation returns, and use each one once.";

}  // namespace smfree

#endif  // SMFREE_CSRC_PROTOCOL_TOKEN_H_
