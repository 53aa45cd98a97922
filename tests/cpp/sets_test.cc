// SPDX-License-Identifier: Apache-2.0
#include "csrc/protocol/sets.h"

#include <cstdint>
#include <random>
#include <vector>

#include "csrc/protocol/group_config.h"
#include "tests/cpp/check.h"

using namespace smfree;

TEST(ASendTakesTheLowestFreeSet) {
  CHECK_EQ(FirstFreeSet(0, 3), 0);
  CHECK_EQ(FirstFreeSet(0b101, 3), 1);
  CHECK_EQ(FirstFreeSet(0b111, 3), 3);  // none
  CHECK_EQ(FirstFreeSet(0x7fffffff, kMaxSets), 31);
  CHECK_EQ(FirstFreeSet(0xffffffff, kMaxSets), kMaxSets);
}

// Any order of sends and recvs: on each set numbers grow and parities alternate, and the rank's
// operations are counted from 0.
TEST(NumbersGrowAndParitiesAlternateOnEverySet) {
  constexpr int32_t kSets = 4;
  std::mt19937 random(1);
  for (int round = 0; round < 100; ++round) {
    uint32_t in_flight = 0;
    int64_t sends = 0;
    std::vector<int64_t> last(kSets, kNoOperation);
    for (int step = 0; step < 200; ++step) {
      const int32_t set = FirstFreeSet(in_flight, kSets);
      if (set < kSets && random() % 2 == 0) {
        const int64_t number = NumberInSet(sends, last[set]);
        CHECK(number > last[set]);
        CHECK(ParityOf(number) != ParityOf(last[set]));
        CHECK_EQ(OperationOfNumber(number), sends);
        last[set] = number;
        in_flight |= 1u << set;
        ++sends;
      } else {
        in_flight &= ~(1u << random() % kSets);
      }
    }
  }
}

TEST(TheDefaultHasASetForEveryLaneAndKind) {
  GroupConfig config;
  config.num_lanes = 2;
  config.differentiable = false;
  CHECK_EQ(NumSets(config), 3);
  config.differentiable = true;
  CHECK_EQ(NumSets(config), 8);
  config.hierarchical = true;  // sets are large
  CHECK_EQ(NumSets(config), 6);
  config.num_lanes = 24;
  CHECK_EQ(NumSets(config), 32);
  CHECK_EQ(FirstSets(config), 24);
  config.num_sets = 5;
  CHECK_EQ(NumSets(config), 5);
  CHECK_EQ(FirstSets(config), 5);
}

TEST_MAIN()
