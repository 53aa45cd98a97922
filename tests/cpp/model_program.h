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

// Not every model has all of them.
enum class Kind : uint8_t { kPack, kCopy, kRaise, kRelay, kRead, kAnnounce, kRelease };

// The call that a stream of a rank makes next; nullptr when it has made all. `programs` by rank.
template <typename State>
const Call* NextCall(const std::vector<Program>& programs, const State& state, int rank,
                     size_t stream) {
  const Stream& calls = programs[rank][stream];
  const size_t next = state.ranks[rank].next_call[stream];
  return next < calls.size() ? &calls[next] : nullptr;
}

template <typename State>
bool AllCallsMade(const std::vector<Program>& programs, const State& state) {
  for (size_t rank = 0; rank < programs.size(); ++rank) {
    for (size_t stream = 0; stream < programs[rank].size(); ++stream) {
      if (NextCall(programs, state, static_cast<int>(rank), stream) != nullptr) return false;
    }
  }
  return true;
}

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
