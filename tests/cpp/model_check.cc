// SPDX-License-Identifier: Apache-2.0
//
// Searches every state that the model of protocol_model.h can reach, breadth first, so that the
// first violation found has a shortest trace. Checked in every state: no send or recv region is
// overwritten too early, no recv reads rows of another operation, lanes.h raises no fault, and a
// state without a possible step is one where every rank has finished (no deadlock). The states form
// no cycles, since every step adds to a count; so there is no livelock either.
//
// Then the protocol is broken in one place at a time, and the search must find the harm.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "tests/cpp/protocol_model.h"

using namespace smfree::model;

namespace {

struct Verdict {
  size_t states = 0;
  const char* violation = nullptr;  // nullptr: none
  std::vector<std::string> trace;   // the steps that lead to it
};

// kAll takes every step from every state. kReduced searches fewer orders for the same violations,
// where all ranks run the same program:
//  - A signal is raised right behind its copy. A late signal only delays the reads that wait for
//    it, and these are delayed in every way anyhow. (That nothing replaces a message whose signal
//    has not been raised is left to the searches with kAll.)
//  - States that differ by renumbering the ranks in a circle count as one.
enum class Steps { kAll, kReduced };

template <typename M>
class Search {
 public:
  using StateT = typename M::StateT;
  static_assert(std::has_unique_object_representations_v<StateT>, "states are compared as bytes");

  explicit Search(const M& model) : model_(model), table_(1 << 12, kEmpty) {}

  Verdict Run(Steps steps) {
    Add(StateT{}, kEmpty, Action{});
    std::vector<Action> actions;
    for (uint32_t at = 0; at < states_.size(); ++at) {
      model_.Enabled(states_[at], actions);
      if (actions.empty() && !model_.Finished(states_[at])) {
        return Result("deadlock: nobody can take a step, and not all have finished", at, {});
      }
      if (steps == Steps::kReduced) KeepOnlyARaise(actions);
      for (const Action& action : actions) {
        StateT next = states_[at];
        if (const char* violation = model_.Apply(next, action)) {
          return Result(violation, at, action);
        }
        Add(steps == Steps::kReduced ? SmallestRotation(next) : next, at, action);
      }
    }
    return Result(nullptr, 0, {});
  }

 private:
  static constexpr uint32_t kEmpty = ~uint32_t{0};

  static void KeepOnlyARaise(std::vector<Action>& actions) {
    for (const Action action : actions) {
      if (action.kind == Kind::kRaise) return actions.assign(1, action);
    }
  }

  static StateT SmallestRotation(StateT state) {
    StateT smallest = state;
    for (size_t i = 1; i < state.ranks.size(); ++i) {
      std::rotate(state.ranks.begin(), state.ranks.begin() + 1, state.ranks.end());
      if (std::memcmp(&state, &smallest, sizeof(StateT)) < 0) smallest = state;
    }
    return smallest;
  }

  static size_t Hash(const StateT& state) {
    const char* bytes = reinterpret_cast<const char*>(&state);
    uint64_t hash = 0;
    for (size_t i = 0; i < sizeof(StateT); i += 8) {
      uint64_t word = 0;
      std::memcpy(&word, bytes + i, std::min<size_t>(8, sizeof(StateT) - i));
      hash = (hash ^ word) * 0x9E3779B97F4A7C15u;
      hash ^= hash >> 32;
    }
    return hash;
  }

  // Remembers `state` if it is new.
  void Add(const StateT& state, uint32_t parent, const Action& by) {
    if (2 * states_.size() >= table_.size()) Grow();
    const size_t mask = table_.size() - 1;
    size_t slot = Hash(state) & mask;
    for (; table_[slot] != kEmpty; slot = (slot + 1) & mask) {
      if (std::memcmp(&states_[table_[slot]], &state, sizeof(StateT)) == 0) return;
    }
    table_[slot] = static_cast<uint32_t>(states_.size());
    states_.push_back(state);
    parents_.push_back(parent);
    actions_.push_back(by);
  }

  void Grow() {
    table_.assign(4 * table_.size(), kEmpty);
    const size_t mask = table_.size() - 1;
    for (uint32_t i = 0; i < states_.size(); ++i) {
      size_t slot = Hash(states_[i]) & mask;
      while (table_[slot] != kEmpty) slot = (slot + 1) & mask;
      table_[slot] = i;
    }
  }

  Verdict Result(const char* violation, uint32_t at, std::optional<Action> last) const {
    Verdict verdict{states_.size(), violation, {}};
    if (violation == nullptr) return verdict;
    if (last) verdict.trace.push_back(model_.Describe(states_[at], *last));
    for (; parents_[at] != kEmpty; at = parents_[at]) {
      verdict.trace.insert(verdict.trace.begin(),
                           model_.Describe(states_[parents_[at]], actions_[at]));
    }
    return verdict;
  }

  const M& model_;
  std::vector<StateT> states_;  // in order of distance
  std::vector<uint32_t> parents_;
  std::vector<Action> actions_;
  std::vector<uint32_t> table_;  // open addressing, indices of states_
};

int failures = 0;

template <int kRanks, int kLanes, int kChunks>
Verdict Explore(const std::vector<Program>& programs, Mutations mutations, Steps steps) {
  const Model<kRanks, kLanes, kChunks> model(programs, mutations);
  return Search(model).Run(steps);
}

void PrintTrace(const Verdict& verdict) {
  for (size_t i = 0; i < verdict.trace.size(); ++i) {
    std::printf("    %2zu  %s\n", i + 1, verdict.trace[i].c_str());
  }
}

// The protocol as it is: no violation may be reachable.
template <int kRanks, int kLanes, int kChunks>
void ExpectSafe(const char* what, const std::vector<Program>& programs, Steps steps = Steps::kAll) {
  const Verdict verdict = Explore<kRanks, kLanes, kChunks>(programs, {}, steps);
  std::printf("%9zu states  %d ranks, %d lane(s), %d chunk(s): %s%s\n", verdict.states, kRanks,
              kLanes, kChunks, what, steps == Steps::kReduced ? " (reduced)" : "");
  if (verdict.violation == nullptr) return;
  std::printf("  FAILED: %s\n", verdict.violation);
  PrintTrace(verdict);
  ++failures;
}

// A broken protocol: `violation` must be reachable. `reducible`: also by the reduced search.
template <int kRanks, int kLanes, int kChunks>
void ExpectFound(const char* what, const char* violation, const std::vector<Program>& programs,
                 Mutations mutations, bool reducible = true) {
  const Verdict verdict = Explore<kRanks, kLanes, kChunks>(programs, mutations, Steps::kAll);
  std::printf("%9zu states  broken: %s\n", verdict.states, what);
  std::printf("  found: %s\n", verdict.violation == nullptr ? "nothing" : verdict.violation);
  PrintTrace(verdict);
  if (verdict.violation == nullptr || std::strstr(verdict.violation, violation) == nullptr) {
    std::printf("  FAILED: expected to find: %s\n", violation);
    ++failures;
  }
  if (reducible && Explore<kRanks, kLanes, kChunks>(programs, mutations, Steps::kReduced)
                           .violation == nullptr) {
    std::printf("  FAILED: the reduced search does not find it\n");
    ++failures;
  }
}

// "S0 R0 r0 S1" = send, recv, the recv again on lane 0; send on lane 1.
Stream Calls(const std::string& text) {
  Stream stream;
  for (size_t i = 0; i + 1 < text.size(); i += 3) {
    const Phase phase = text[i] == 'S'   ? Phase::kSend
                        : text[i] == 'R' ? Phase::kRecv
                                         : Phase::kRecvAgain;
    stream.push_back({static_cast<uint8_t>(text[i + 1] - '0'), phase});
  }
  return stream;
}

std::string Repeat(const std::string& text, int times) {
  std::string all;
  for (int i = 0; i < times; ++i) all += text;
  return all;
}

// The same streams on every rank.
std::vector<Program> Same(int ranks, const std::vector<std::string>& streams) {
  Program program;
  for (const std::string& stream : streams) program.push_back(Calls(stream));
  return std::vector<Program>(ranks, program);
}

// One stream per rank, each with an order of its own.
std::vector<Program> Each(const std::vector<std::string>& stream_of_rank) {
  std::vector<Program> programs;
  for (const std::string& stream : stream_of_rank) programs.push_back({Calls(stream)});
  return programs;
}

// Every order in which one stream can run `operations` operations on each of two lanes.
void ExpectEveryInterleavingSafe(int operations) {
  const int calls = 4 * operations;
  size_t programs = 0, states = 0;
  for (int order = 0; order < 1 << calls; ++order) {  // bit i: the lane of call i
    std::string stream;
    int done[2] = {0, 0};
    for (int i = 0; i < calls; ++i) {
      const int lane = order >> i & 1;
      stream += done[lane]++ % 2 == 0 ? "S" : "R";
      stream += lane == 0 ? "0 " : "1 ";
    }
    if (done[0] != done[1]) continue;
    const Verdict verdict = Explore<2, 2, 1>(Same(2, {stream}), {}, Steps::kAll);
    ++programs;
    states += verdict.states;
    if (verdict.violation != nullptr) {
      std::printf("  FAILED: %s: %s\n", stream.c_str(), verdict.violation);
      PrintTrace(verdict);
      ++failures;
    }
  }
  std::printf("%9zu states  2 ranks, 2 lanes, 1 chunk: all %zu interleavings of %d operations per "
              "lane\n", states, programs, operations);
}

void CheckProtocol() {
  const std::string lane0 = "S0 R0 ", lane1 = "S1 R1 ", both = "S0 S1 R0 R1 ";
  ExpectSafe<2, 1, 1>("6 operations", Same(2, {Repeat(lane0, 6)}));
  ExpectSafe<2, 1, 2>("6 operations", Same(2, {Repeat(lane0, 6)}));
  ExpectSafe<2, 1, 2>("4 operations, every recv runs twice", Same(2, {Repeat("S0 R0 r0 ", 4)}));
  ExpectSafe<3, 1, 1>("4 operations", Same(3, {Repeat(lane0, 4)}));
  ExpectSafe<3, 1, 1>("4 operations", Same(3, {Repeat(lane0, 4)}), Steps::kReduced);
  ExpectSafe<3, 1, 2>("4 operations", Same(3, {Repeat(lane0, 4)}), Steps::kReduced);
  ExpectEveryInterleavingSafe(3);
  ExpectSafe<2, 2, 2>("4 operations per lane, interleaved", Same(2, {Repeat(both, 4)}));
  ExpectSafe<2, 2, 2>("3 operations per lane, lanes side by side",
                      Same(2, {Repeat(lane0, 3), Repeat(lane1, 3)}));
  ExpectSafe<3, 2, 1>("3 operations per lane, interleaved", Same(3, {Repeat(both, 3)}),
                      Steps::kReduced);
  ExpectSafe<2, 2, 1>("ranks receive in different orders",
                      Each({Repeat(both, 3), Repeat("S1 S0 R1 R0 ", 3)}));
}

void CheckThatBugsAreFound() {
  const std::vector<Program> program = Same(2, {Repeat("S0 R0 ", 4)});
  Mutations broken{};
  broken.one_parity = true;
  ExpectFound<2, 1, 1>("no parity", "send region overwritten", program, broken);
  broken.wait_for_mover = true;
  ExpectFound<2, 1, 1>("no parity, but a send waits for its own mover", "recv region overwritten",
                       program, broken);
  broken = {};
  broken.signal_first = true;
  ExpectFound<2, 1, 1>("signal raised before the copy", "stale read", program, broken, false);
  broken = {};
  broken.one_signal_per_lane = true;
  ExpectFound<2, 1, 1>("one signal for both parities", "stale read", program, broken);
  broken = {};
  broken.skip_empty_messages = true;
  broken.wait_for_mover = true;  // the send region is then safe; the recv region is what suffers
  ExpectFound<3, 1, 1>("no message where there are no rows", "recv region overwritten",
                       Same(3, {Repeat("S0 R0 ", 4)}), broken, false);

  const std::vector<Program> two_in_flight = Same(2, {Repeat("S0 S0 R0 R0 ", 2)});
  ExpectFound<2, 1, 1>("two sends on a lane: lanes.h says so", "two operations in flight",
                       two_in_flight, {});
  broken = {};
  broken.no_lane_check = true;
  ExpectFound<2, 1, 1>("two sends on a lane, unchecked", "send region overwritten", two_in_flight,
                       broken);
  // Not a fault of the protocol but of the program: PROTOCOL.md asks for one order on all ranks.
  ExpectFound<2, 2, 1>("ranks run the lanes in different orders, one call after the other",
                       "deadlock", Each({"S0 R0 S1 R1 ", "S1 R1 S0 R0 "}), {}, false);
}

}  // namespace

int main() {
  CheckProtocol();
  CheckThatBugsAreFound();
  std::printf("%s\n", failures == 0 ? "model check passed" : "model check FAILED");
  return failures == 0 ? 0 : 1;
}
