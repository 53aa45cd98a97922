// SPDX-License-Identifier: Apache-2.0
//
// How many operations programs have in flight together, counted as XLA creates their calls.
#include "csrc/cuda/host/in_flight.h"

#include <cctype>
#include <cstdint>
#include <string>
#include <thread>

#include "tests/cpp/check.h"

namespace smfree::cuda {
namespace {

// A call of a group: a send is a capital letter, its recv the same small one.
void Add(int64_t group, char call) {
  CompiledOperation operation;
  operation.group = group;
  operation.call_site = static_cast<uint32_t>(std::toupper(call));
  if (std::isupper(call)) {
    InFlight::Get().Keep(group, InFlight::Get().AddSend(operation));
  } else {
    InFlight::Get().AddRecv(operation);
  }
}

// A program by its schedule.
void Compile(int64_t group, const std::string& calls) {
  InFlight::Get().CompilationBegins();
  for (const char call : calls) Add(group, call);
  InFlight::Get().CompilationEnds();
}

int32_t Most(int64_t group) { return InFlight::Get().Of(group).most; }
bool Leaves(int64_t group) { return InFlight::Get().Of(group).leaves; }

TEST(TheMostThatAreInFlightTogether) {
  CHECK_EQ(Most(1), 0);
  Compile(1, "AaBbAa");
  CHECK_EQ(Most(1), 1);
  Compile(1, "ABaCcbAABabaCc");
  CHECK_EQ(Most(1), 3);
  Compile(1, "ABba");  // the most of all programs
  CHECK_EQ(Most(1), 3);
  CHECK(!Leaves(1));
}

TEST(AProgramThatDidNotGetItsSetsDoesNotCount) {
  CompiledOperation operation;
  operation.group = 14;
  InFlight::Get().CompilationBegins();
  CHECK_EQ(InFlight::Get().AddSend(operation), 1);
  InFlight::Get().Keep(14, 1);
  CHECK_EQ(InFlight::Get().AddSend(operation), 2);
  InFlight::Get().CompilationFails();
  CHECK(InFlight::Get().CompilationEnds().empty());  // JAX says so of a failed one, too
  CHECK_EQ(Most(14), 1);
  CHECK(!Leaves(14));
}

TEST(CallsOutsideOfACompilationAreNotCounted) {
  Compile(15, "Aa");
  CompiledOperation operation;
  operation.group = 15;
  for (int i = 0; i < 100; ++i) CHECK_EQ(InFlight::Get().AddSend(operation), 0);
  InFlight::Get().AddRecv(operation);
  CHECK_EQ(Most(15), 1);
  CHECK(InFlight::Get().Of(15).uncounted && !InFlight::Get().Of(1).uncounted);
}

TEST(GroupsCountForThemselves) {
  InFlight::Get().CompilationBegins();
  for (const int64_t group : {2, 3, 2}) Add(group, 'A');
  CHECK_EQ(Most(2), 2);
  CHECK_EQ(Most(3), 1);
}

TEST(WhatAProgramLeavesInFlightDoesNotCountForTheNext) {
  for (int i = 0; i < 10; ++i) Compile(4, "A");
  CHECK_EQ(Most(4), 1);
  CHECK(Leaves(4));
  Compile(12, "a");
  CHECK(!Leaves(12));
}

TEST(NorWhatAFailedCompilationHasCreated) {
  InFlight::Get().CompilationBegins();
  Add(13, 'A');  // nobody says that it has ended
  Compile(13, "Bb");
  CHECK_EQ(Most(13), 1);
  CHECK(!Leaves(13));
}

TEST(ARecvOfNothingEndsNothing) {
  Compile(5, "bAbBaaC");  // b receives zeros at first, the second a is a clone
  CHECK_EQ(Most(5), 2);
}

TEST(KindsDifferInEachOfTheirParts) {
  const auto in_flight = [](const CompiledOperation& sent, const CompiledOperation& received) {
    InFlight::Get().CompilationBegins();
    CHECK_EQ(InFlight::Get().AddSend(sent), 1);
    InFlight::Get().AddRecv(received);
    return InFlight::Get().AddSend(sent);
  };
  CHECK_EQ(in_flight({6, 1, 2, 3, Operation::kCombine}, {6, 1, 2, 3, Operation::kCombine}), 1);
  CHECK_EQ(in_flight({7, 1, 2, 3, Operation::kCombine}, {7, 0, 2, 3, Operation::kCombine}), 2);
  CHECK_EQ(in_flight({8, 1, 2, 3, Operation::kCombine}, {8, 1, 0, 3, Operation::kCombine}), 2);
  CHECK_EQ(in_flight({9, 1, 2, 3, Operation::kCombine}, {9, 1, 2, 0, Operation::kCombine}), 2);
  CHECK_EQ(in_flight({10, 1, 2, 3, Operation::kCombine}, {10, 1, 2, 3, Operation::kDispatch}), 2);
}

TEST(ThreadsCompileProgramsOfTheirOwn) {
  InFlight::Get().CompilationBegins();
  Add(11, 'A');
  std::thread([] { Compile(11, "Bb"); }).join();
  Add(11, 'A');
  CHECK_EQ(Most(11), 2);
}

}  // namespace
}  // namespace smfree::cuda

TEST_MAIN()
