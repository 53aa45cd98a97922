// SPDX-License-Identifier: Apache-2.0
//
// The token's array: what one operation tells the next one on its lane.
//
// Floats, because the cotangent of a token is a token and JAX adds zeros to cotangents; numbers are
// split so that float32 holds them exactly. Two tokens that were added have magic 2.
#ifndef SMFREE_CSRC_PROTOCOL_TOKEN_H_
#define SMFREE_CSRC_PROTOCOL_TOKEN_H_

#include <cstdint>

#include "csrc/protocol/host_device.h"

namespace smfree {

struct Token {
  static constexpr int64_t kSize = 6;
  static constexpr int64_t kLimit = int64_t{1} << 48;

  float magic = 0;       // 1; 0: a fresh token, or a cotangent that nothing was added to
  int64_t number = 0;    // in flight: the operation's; ready: CPU, the next one; GPU, the last one
  int64_t run_id = 0;    // in flight, CPU: of the program that ran the send
  int64_t instance = 0;  // in flight, CPU: HLO instance of the send

  SMFREE_HD static Token Read(const float* array) {
    return Token{array[0], Join(array + 1), Join(array + 3), static_cast<int64_t>(array[5])};
  }
  SMFREE_HD void Write(float* array) const {
    array[0] = magic;
    Split(number, array + 1);
    Split(run_id, array + 3);
    array[5] = static_cast<float>(instance);
  }

  SMFREE_HD bool zero() const { return magic == 0.0f; }
  SMFREE_HD bool used_once() const { return magic == 0.0f || magic == 1.0f; }

 private:
  static constexpr int64_t kHalf = int64_t{1} << 24;
  SMFREE_HD static int64_t Join(const float* halves) {
    return static_cast<int64_t>(halves[0]) * kHalf + static_cast<int64_t>(halves[1]);
  }
  SMFREE_HD static void Split(int64_t value, float* halves) {
    halves[0] = static_cast<float>(value / kHalf);
    halves[1] = static_cast<float>(value % kHalf);
  }
};

inline constexpr const char* kTokenUsedTwice =
    "a token was used more than once: its uses in the backward pass were added up. "
    "Pass on the token that each operation returns, and use each one once.";

}  // namespace smfree

#endif  // SMFREE_CSRC_PROTOCOL_TOKEN_H_
