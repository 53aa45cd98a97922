// SPDX-License-Identifier: Apache-2.0
#include "csrc/protocol/lanes.h"

#include "tests/cpp/check.h"

using namespace smfree;

TEST(ParityAlternates) {
  for (int64_t number = 1; number < 100; ++number) {
    CHECK(ParityOf(number) == 0 || ParityOf(number) == 1);
    CHECK(ParityOf(number) != ParityOf(number + 1));
  }
  CHECK_EQ(ParityOf((int64_t{1} << 55) - 1), 1);
}

// Base-4 digits of a derivation: 1 tangent, 2 transpose, 3 replay.
TEST(OperationsThatInterleaveHaveSidesOfTheirOwn) {
  CHECK(SideOf(0) == Side::kForward);
  CHECK(SideOf(1) == Side::kMirrored);                 // in flight together with its primal
  CHECK(SideOf(1 * 4 + 2) == Side::kMirrored);         // the backward pass
  CHECK(SideOf(3) == Side::kReplay);                   // may begin before the forward pass ends
  CHECK(SideOf((1 * 4 + 2) * 4 + 1) == Side::kForward);  // the tangent of a gradient
}

TEST(OperationsAreNumberedFromOne) {
  LaneState lane{};
  for (int64_t expected = 1; expected <= 5; ++expected) {
    int64_t number = -1;
    CHECK_EQ(BeginSend(lane, number), FaultKind::kNone);
    CHECK_EQ(number, expected);
    CHECK(MayReceive(lane, number));
    FinishRecv(lane, number);
  }
}

TEST(SecondSendInFlightIsAFaultAndChangesNothing) {
  LaneState lane{};
  int64_t number = 0;
  CHECK_EQ(BeginSend(lane, number), FaultKind::kNone);
  int64_t second = -1;
  CHECK_EQ(BeginSend(lane, second), FaultKind::kTwoInFlight);
  CHECK_EQ(second, -1);
  CHECK_EQ(lane.sent, 1);
  FinishRecv(lane, number);
  CHECK_EQ(BeginSend(lane, second), FaultKind::kNone);
  CHECK_EQ(second, 2);
}

TEST(RecvMayRunAgainUntilTheNextSend) {
  LaneState lane{};
  CHECK(!MayReceive(lane, kNoOperation));
  CHECK(!MayReceive(lane, 1));
  int64_t first = 0, second = 0;
  BeginSend(lane, first);
  FinishRecv(lane, first);
  CHECK(MayReceive(lane, first));
  FinishRecv(lane, first);
  CHECK_EQ(BeginSend(lane, second), FaultKind::kNone);
  CHECK(!MayReceive(lane, first));
  CHECK(MayReceive(lane, second));
  CHECK(!MayReceive(lane, second + 1));
}

TEST_MAIN()
