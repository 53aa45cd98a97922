// SPDX-License-Identifier: Apache-2.0
//
// How many operations programs have in flight together, counted as XLA creates their calls.
#include "csrc/cuda/host/in_flight.h"

#include <cstdint>
#include <string>
#include <thread>

#include "tests/cpp/check.h"

namespace smfree::cuda {
namespace {

// A program by its schedule: S a send, R a recv.
void Compile(int64_t group, const std::string& calls) {
  InFlight& in_flight = InFlight::Get();
  in_flight.CompilationBegins();
  for (const char call : calls) {
    if (call == 'S') in_flight.AddSend(group);
    if (call == 'R') in_flight.AddRecv(group);
  }
}

int32_t Most(int64_t group) { return InFlight::Get().Most(group); }

TEST(TheMostThatAreInFlightTogether) {
  CHECK_EQ(Most(1), 0);
  Compile(1, "SRSRSR");
  CHECK_EQ(Most(1), 1);
  Compile(1, "SSRSRR SSSR RR");
  CHECK_EQ(Most(1), 3);
  Compile(1, "SSRR");  // the most of all programs
  CHECK_EQ(Most(1), 3);
}

TEST(GroupsCountForThemselves) {
  InFlight& in_flight = InFlight::Get();
  in_flight.CompilationBegins();
  for (const int64_t group : {2, 3, 2}) in_flight.AddSend(group);
  CHECK_EQ(Most(2), 2);
  CHECK_EQ(Most(3), 1);
}

TEST(WhatAProgramLeavesInFlightDoesNotCountForTheNext) {
  for (int i = 0; i < 10; ++i) Compile(4, "S");
  CHECK_EQ(Most(4), 1);
}

TEST(ARecvThatWasClonedEndsNothingElse) {
  Compile(5, "RRSSR R R SS");
  CHECK_EQ(Most(5), 2);
}

TEST(ThreadsCompileProgramsOfTheirOwn) {
  InFlight& in_flight = InFlight::Get();
  in_flight.CompilationBegins();
  in_flight.AddSend(6);
  std::thread([] { Compile(6, "SR"); }).join();
  in_flight.AddSend(6);
  CHECK_EQ(Most(6), 2);
}

}  // namespace
}  // namespace smfree::cuda

TEST_MAIN()
