// SPDX-License-Identifier: Apache-2.0
//
// What ranks do in a model: which phases they call in which order, and the kinds of steps in them.
#ifndef SMFREE_TESTS_CPP_MODEL_PROGRAM_H_
#define SMFREE_TESTS_CPP_MODEL_PROGRAM_H_

#include <cstdint>
#include <string>
#include <vector>

namespace smfree::model {

enum class Phase : uint8_t { kSend, kRecv, kRecvAgain /* of the operation received last */ };
struct Call {
  uint8_t lane;
  Phase phase;
};
using Stream = std::vector<Call>;     // calls that run one after the other; a recv blocks the rest
using Program = std::vector<Stream>;  // of one rank; streams run side by side

enum class Kind : uint8_t { kPack, kCopy, kRaise, kRelay, kRead };

// "S0 R0 r0 S1" = send, recv, the recv again on lane 0; send on lane 1.
inline Stream Calls(const std::string& text) {
  Stream stream;
  for (size_t i = 0; i + 1 < text.size(); i += 3) {
    const Phase phase = text[i] == 'S'   ? Phase::kSend
                        : text[i] == 'R' ? Phase::kRecv
                                         : Phase::kRecvAgain;
    stream.push_back({static_cast<uint8_t>(text[i + 1] - '0'), phase});
  }
  return stream;
}

inline std::string Repeat(const std::string& text, int times) {
  std::string all;
  for (int i = 0; i < times; ++i) all += text;
  return all;
}

}  // namespace smfree::model

#endif  // SMFREE_TESTS_CPP_MODEL_PROGRAM_H_
