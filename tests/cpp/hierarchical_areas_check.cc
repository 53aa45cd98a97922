// SPDX-License-Identifier: Apache-2.0
//
// hierarchical_model_check.cc for large operations: searches every state of hierarchical_areas.h.
#include <cstdio>
#include <string>

#include "tests/cpp/hierarchical_areas.h"
#include "tests/cpp/model_expectations.h"
#include "tests/cpp/model_search.h"

using namespace smfree::model;
using smfree::kNode;
using smfree::kWire;

namespace {

Verdict Explore(int operations, LegMutations mutations, Steps steps = Steps::kReduced) {
  const HierarchicalAreas model(Calls(Repeat("S0 R0 ", operations)), mutations);
  return Search(model).Run(steps);
}

void ExpectSafe(const char* what, int operations, LegMutations mutations = {},
                Steps steps = Steps::kReduced) {
  const Verdict verdict = Explore(operations, mutations, steps);
  std::printf("%9zu states  %d operations: %s\n", verdict.states, operations, what);
  ExpectNothing(verdict);
}

void ExpectFound(const char* what, const char* violation, LegMutations mutations) {
  const Verdict verdict = Explore(4, mutations);
  std::printf("%9zu states  broken: %s\n", verdict.states, what);
  ExpectViolation(verdict, violation);
}

void CheckThatBugsAreFound() {
  LegMutations broken{};
  for (const auto leg : {kWire, kNode}) {
    broken = {};
    broken.waits[leg] = LegWaits::kForNobody;
    ExpectFound(leg == kWire ? "rows leave at once, on the wire"
                             : "rows leave at once, in the node",
                "overwritten", broken);
    broken.waits[leg] = LegWaits::kForItself;
    ExpectFound(leg == kWire ? "rows leave when their rank has announced, on the wire"
                             : "rows leave when their rank has announced, in the node",
                "overwritten", broken);
  }
  broken = {};
  broken.announce_early = true;
  ExpectFound("a rank announces before it has received the operation before",
              "announcement is replaced", broken);
  broken = {};
  broken.one_slot = true;
  ExpectFound("announcements in one slot", "announcement is replaced", broken);
  broken = {};
  broken.fixed_areas = true;
  ExpectFound("areas by direction", "overwritten before it left", broken);
  broken = {};
  broken.legs_share_areas = true;
  ExpectFound("one pair of areas for both legs", "overlap", broken);
  broken = {};
  broken.relay_at_once = true;
  ExpectFound("a relay does not wait for the first leg", "stale read", broken);
}

}  // namespace

int main() {
  ExpectSafe("as it is", 9);
  ExpectSafe("as it is, every order of steps", 5, {}, Steps::kAll);
  // The areas are safe as soon as all members have begun; the counts are what R2 has to tell.
  LegMutations other{};
  other.first_leg_tells_all = true;
  ExpectSafe("the words of the first leg release the second one", 6, other);
  CheckThatBugsAreFound();
  return Conclude();
}
