// SPDX-License-Identifier: Apache-2.0
//
// model_check.cc for the hierarchical mode: searches every state of hierarchical_model.h, on GPUs
// (the relay of a combine holds up the calls behind it) and on CPUs (it does not).
#include <cstdio>
#include <string>
#include <vector>

#include "tests/cpp/hierarchical_model.h"
#include "tests/cpp/model_expectations.h"
#include "tests/cpp/model_search.h"

using namespace smfree::model;

namespace {

const char* Name(Relays relays) { return relays == Relays::kBeside ? "CPU" : "GPU"; }

// `streams`: of each rank; one entry: of all ranks.
template <int kLanes>
Verdict Explore(const std::vector<std::vector<std::string>>& streams, Relays relays,
                HierarchicalMutations mutations, Steps steps) {
  std::vector<Program> programs;
  for (size_t rank = 0; rank < 4; ++rank) {
    Program program;
    for (const std::string& stream : streams[streams.size() == 1 ? 0 : rank]) {
      program.push_back(Calls(stream));
    }
    programs.push_back(program);
  }
  const HierarchicalModel<kLanes> model(programs, relays, mutations);
  return Search(model).Run(steps);
}

template <int kLanes>
void ExpectSafe(const char* what, const std::vector<std::vector<std::string>>& streams,
                Relays relays, Steps steps) {
  const Verdict verdict = Explore<kLanes>(streams, relays, {}, steps);
  std::printf("%9zu states  %s, %d lane(s): %s%s\n", verdict.states, Name(relays), kLanes, what,
              steps == Steps::kReduced ? " (reduced)" : "");
  ExpectNothing(verdict);
}

template <int kLanes>
void ExpectFound(const char* what, const char* violation,
                 const std::vector<std::vector<std::string>>& streams, Relays relays,
                 HierarchicalMutations mutations) {
  const Verdict verdict = Explore<kLanes>(streams, relays, mutations, Steps::kAll);
  std::printf("%9zu states  broken, %s: %s\n", verdict.states, Name(relays), what);
  ExpectViolation(verdict, violation);
}

void CheckProtocol() {
  const std::string lane0 = "S0 R0 ", lane1 = "S1 R1 ";
  for (const Relays relays : {Relays::kInTheCall, Relays::kBeside}) {
    ExpectSafe<1>("8 operations", {{Repeat(lane0, 8)}}, relays, Steps::kAll);
  }
  ExpectSafe<2>("2 operations per lane, interleaved", {{Repeat("S0 S1 R0 R1 ", 2)}},
                Relays::kInTheCall, Steps::kReduced);
  // On a CPU no call holds up another lane's, in whatever order the ranks make them.
  ExpectSafe<2>("2 operations on one lane, 1 on the other, side by side",
                {{Repeat(lane0, 2), lane1}}, Relays::kBeside, Steps::kReduced);
}

void CheckThatBugsAreFound() {
  const std::vector<std::vector<std::string>> program = {{Repeat("S0 R0 ", 4)}};
  for (const Relays relays : {Relays::kInTheCall, Relays::kBeside}) {
    HierarchicalMutations broken{};
    broken.one_parity = true;
    ExpectFound<1>("no parity", "overwritten", program, relays, broken);
    broken = {};
    broken.skip_empty_messages = true;
    ExpectFound<1>("no message where there are no rows", "overwritten", program, relays, broken);
    broken = {};
    broken.relay_at_once = true;
    ExpectFound<1>("a relay does not wait for the first leg", "stale relay", program, relays,
                   broken);
  }

  // Fine in direct mode, and on CPUs; PROTOCOL.md asks for one order of all calls on GPUs.
  const std::vector<std::string> one = {"S0 S1 R0 R1 "}, other = {"S1 S0 R1 R0 "};
  ExpectFound<2>("the ranks of a node receive in different orders", "deadlock",
                 {one, other, one, other}, Relays::kInTheCall, {});
}

}  // namespace

int main() {
  CheckProtocol();
  CheckThatBugsAreFound();
  return Conclude();
}
