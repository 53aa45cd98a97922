// SPDX-License-Identifier: Apache-2.0
//
// Searches every state that the model of protocol_model.h can reach (model_search.h). Checked in
// every state: no send or recv region is overwritten too early, no recv reads rows of another
// operation, lanes.h raises no fault, nothing is stuck.
//
// Then the protocol is broken in one place at a time, and the search must find the harm.
#include <cstdio>
#include <string>
#include <vector>

#include "tests/cpp/model_expectations.h"
#include "tests/cpp/model_search.h"
#include "tests/cpp/protocol_model.h"

using namespace smfree::model;

namespace {

template <int kRanks, int kLanes, int kChunks>
Verdict Explore(const std::vector<Program>& programs, Mutations mutations, Steps steps) {
  const Model<kRanks, kLanes, kChunks> model(programs, mutations);
  return Search(model).Run(steps);
}

// The protocol as it is: no violation may be reachable.
template <int kRanks, int kLanes, int kChunks>
void ExpectSafe(const char* what, const std::vector<Program>& programs, Steps steps = Steps::kAll) {
  const Verdict verdict = Explore<kRanks, kLanes, kChunks>(programs, {}, steps);
  std::printf("%9zu states  %d ranks, %d lane(s), %d chunk(s): %s%s\n", verdict.states, kRanks,
              kLanes, kChunks, what, steps == Steps::kReduced ? " (reduced)" : "");
  ExpectNothing(verdict);
}

// A broken protocol: `violation` must be reachable. `reducible`: also by the reduced search.
template <int kRanks, int kLanes, int kChunks>
void ExpectFound(const char* what, const char* violation, const std::vector<Program>& programs,
                 Mutations mutations, bool reducible = true) {
  const Verdict verdict = Explore<kRanks, kLanes, kChunks>(programs, mutations, Steps::kAll);
  std::printf("%9zu states  broken: %s\n", verdict.states, what);
  ExpectViolation(verdict, violation);
  if (reducible && Explore<kRanks, kLanes, kChunks>(programs, mutations, Steps::kReduced)
                           .violation == nullptr) {
    std::printf("  FAILED: the reduced search does not find it\n");
    ++failures;
  }
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
  return Conclude();
}
