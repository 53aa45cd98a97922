// SPDX-License-Identifier: Apache-2.0
//
// model_check.cc for large operations: searches every state of areas_model.h. Checked in every
// state, beside what model_check.cc checks: no row is written over one that has yet to leave or to
// be read, payloads of an operation do not overlap, every row is found where it is looked for, no
// announcement is replaced too early.
#include <cstdio>
#include <string>
#include <vector>

#include "tests/cpp/areas_model.h"
#include "tests/cpp/model_expectations.h"
#include "tests/cpp/model_search.h"

using namespace smfree::model;

namespace {

// What all ranks run: the calls of each stream, and how large the operations of each lane are.
struct Run {
  std::vector<std::string> streams;
  std::vector<std::string> sizes = {"L", "L"};
};

template <int kRanks, int kLanes>
Verdict Explore(const Run& run, AreasMutations mutations, Steps steps) {
  Program program;
  for (const std::string& stream : run.streams) program.push_back(Calls(stream));
  const AreasModel<kRanks, kLanes> model(std::vector<Program>(kRanks, program), run.sizes,
                                         mutations);
  return Search(model).Run(steps);
}

template <int kRanks, int kLanes>
void ExpectSafe(const char* what, const Run& run, Steps steps = Steps::kAll,
                AreasMutations mutations = {}) {
  const Verdict verdict = Explore<kRanks, kLanes>(run, mutations, steps);
  std::printf("%9zu states  %d ranks, %d lane(s): %s%s\n", verdict.states, kRanks, kLanes, what,
              steps == Steps::kReduced ? " (reduced)" : "");
  ExpectNothing(verdict);
}

template <int kRanks>
void ExpectFound(const char* what, const char* violation, const Run& run,
                 AreasMutations mutations) {
  const Steps steps = kRanks == 2 ? Steps::kAll : Steps::kReduced;
  const Verdict verdict = Explore<kRanks, 1>(run, mutations, steps);
  std::printf("%9zu states  broken, %d ranks: %s\n", verdict.states, kRanks, what);
  ExpectViolation(verdict, violation);
}

// Every sequence of four large or small operations.
template <int kRanks>
void ExpectEveryMixSafe(Steps steps) {
  for (int mix = 0; mix < 16; ++mix) {
    std::string sizes;
    for (int i = 0; i < 4; ++i) sizes += mix >> i & 1 ? 'L' : 's';
    ExpectSafe<kRanks, 1>(sizes.c_str(), {{Repeat("S0 R0 ", 4)}, {sizes}}, steps);
  }
}

void CheckProtocol() {
  const std::string both = "S0 S1 R0 R1 ";
  ExpectSafe<2, 1>("8 large operations", {{Repeat("S0 R0 ", 8)}});
  ExpectSafe<3, 1>("4 large operations", {{Repeat("S0 R0 ", 4)}});
  ExpectSafe<3, 1>("7 operations", {{Repeat("S0 R0 ", 7)}, {"LLsL"}}, Steps::kReduced);
  ExpectSafe<3, 1>("4 operations, every recv runs twice", {{Repeat("S0 R0 r0 ", 4)}, {"LLs"}},
                   Steps::kReduced);
  ExpectEveryMixSafe<2>(Steps::kAll);
  ExpectEveryMixSafe<3>(Steps::kReduced);
  ExpectSafe<2, 2>("4 operations per lane, interleaved", {{Repeat(both, 4)}, {"L", "LsL"}});
  ExpectSafe<2, 2>("3 operations per lane, lanes side by side",
                   {{Repeat("S0 R0 ", 3), Repeat("S1 R1 ", 3)}, {"LLs", "L"}}, Steps::kReduced);

  // Headers have parities of their own: by themselves they need not wait for announcements.
  AreasMutations other{};
  other.headers_at_once = true;
  ExpectSafe<2, 1>("headers leave at once", {{Repeat("S0 R0 ", 6)}}, Steps::kAll, other);
  ExpectSafe<3, 1>("headers leave at once", {{Repeat("S0 R0 ", 4)}}, Steps::kReduced, other);
  // What alternating saves.
  other = {};
  other.fixed_areas = other.wait_for_own_mover = true;
  ExpectSafe<3, 1>("areas by direction, and a send waits for its own mover",
                   {{Repeat("S0 R0 ", 4)}}, Steps::kReduced, other);
}

void CheckThatBugsAreFound() {
  const Run two = {{Repeat("S0 R0 ", 2)}}, four = {{Repeat("S0 R0 ", 4)}};
  AreasMutations broken{};
  broken.one_slot = true;
  ExpectFound<2>("announcements in one slot", "announcement is replaced", four, broken);
  broken = {};
  broken.waits = Waits::kForNone;
  ExpectFound<2>("rows leave at once", "overwritten", four, broken);
  ExpectFound<3>("rows leave at once", "overwritten", four, broken);
  broken.waits = Waits::kForCounts;
  ExpectFound<3>("rows leave when their offset is known", "overwritten", four, broken);
  broken = {};
  broken.release_next_too = true;
  ExpectFound<3>("rows leave with those of the operation before", "overwritten", four, broken);
  broken = {};
  broken.stale_counts = true;
  ExpectFound<3>("counts of the operation before", "other rows lie there", four, broken);
  broken = {};
  broken.fixed_areas = true;
  ExpectFound<2>("areas by direction", "overwritten before they left", four, broken);
  broken = {};
  broken.announce_early = true;
  ExpectFound<2>("a rank announces before it has received the operation before",
                 "announcement is replaced", four, broken);
  ExpectFound<3>("the same where nothing is announced after it", "overwritten", two, broken);

  const Run two_in_flight = {{Repeat("S0 S0 R0 R0 ", 2)}};
  ExpectFound<2>("two sends on a lane: lanes.h says so", "two operations in flight", two_in_flight,
                 {});
  broken = {};
  broken.no_lane_check = true;
  ExpectFound<3>("two sends on a lane, unchecked", "overwritten", two_in_flight, broken);
}

}  // namespace

int main() {
  CheckProtocol();
  CheckThatBugsAreFound();
  return Conclude();
}
