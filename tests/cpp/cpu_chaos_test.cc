// SPDX-License-Identifier: Apache-2.0
//
// 10,000 consecutive operations of each rank on two lanes, with a mover that delays, reorders and
// stalls: every value is right, and has the bits that it has without chaos. In both modes.
#include <algorithm>
#include <cstring>
#include <vector>

#include "tests/cpp/check.h"
#include "tests/cpp/cpu_ranks.h"
#include "tests/cpp/cpu_reference.h"

namespace smfree::cpu::test {
namespace {

constexpr int32_t kRanks = 4;
constexpr int32_t kLanes = 2;
constexpr int64_t kOperations = kSanitized ? 1000 : 10000;
constexpr int64_t kSteps = kOperations / (2 * kLanes);  // a dispatch and a combine on each lane
constexpr size_t kWorlds = 24;
const RowFormat kRows = Plain(DType::kBF16, 16);

GroupConfig Config(bool hierarchical) {
  GroupConfig config;
  config.num_ranks = kRanks;
  config.ranks_per_node = 2;
  config.hierarchical = hierarchical;
  config.num_experts = 8;
  config.top_k = 3;
  config.num_lanes = kLanes;
  config.row_bytes = 16 * 2;
  config.max_tokens = 24;
  config.timeout_s = 60;
  return config;
}

// Inputs with all that must come of them.
std::vector<World> MakeWorlds(const GroupConfig& config) {
  std::mt19937 random(1);
  std::vector<World> worlds(kWorlds);
  for (size_t i = 0; i < kWorlds; ++i) {
    for (int32_t rank = 0; rank < kRanks; ++rank) {
      worlds[i].emplace_back(config, 1 + static_cast<int64_t>(i), kRows);
      FillInputs(config, worlds[i].back(), Routing(i % 5), random, rank);
    }
    ReferenceDispatch(config, worlds[i]);
    ReferenceCombine(config, worlds[i], /*weighted=*/true);
  }
  return worlds;
}

void Step(Group& group, int32_t rank, int64_t step, const std::vector<World>& worlds,
          std::mt19937& order) {
  std::vector<const Arrays*> want;
  std::vector<Arrays> got;
  for (int32_t lane = 0; lane < kLanes; ++lane) {
    const auto index = static_cast<size_t>(step * 7 + lane * 11) % kWorlds;
    want.push_back(&worlds[index][static_cast<size_t>(rank)]);
    got.emplace_back(group.config(), want.back()->tokens, kRows);
    got.back().x = want.back()->x;
    got.back().y = want.back()->y;
    got.back().topk_idx = want.back()->topk_idx;
    got.back().topk_weights = want.back()->topk_weights;
  }
  const auto lanes_in_some_order = [&] {
    std::vector<int32_t> lanes{0, 1};
    std::shuffle(lanes.begin(), lanes.end(), order);
    return lanes;
  };
  for (const int32_t lane : lanes_in_some_order()) {
    CHECK_OK(Send(group, rank, MakeIdentity(2 * step, lane), got[lane]));
  }
  // All receives are started before one is waited for: in hierarchical mode others need them.
  std::future<Status> received[kLanes];
  for (const int32_t lane : lanes_in_some_order()) {
    received[lane] = Start([&](Done d) {
      Receive(group, rank, MakeIdentity(2 * step, lane), got[lane], std::move(d));
    });
  }
  for (const int32_t lane : lanes_in_some_order()) {
    Arrays& a = got[lane];
    CHECK_OK(received[lane].get());
    CHECK(a.dx == want[lane]->dx && a.weights == want[lane]->weights &&
          a.rows == want[lane]->rows && a.group_sizes == want[lane]->group_sizes);
    const Identity next = MakeIdentity(2 * step + 1, lane);
    CHECK_OK(SendBack(group, rank, next, a, a.weights.data(), a.weights.data()));
  }
  for (const int32_t lane : lanes_in_some_order()) {
    const Identity identity = MakeIdentity(2 * step + 1, lane);
    Arrays& a = got[lane];
    CHECK_OK(Await([&](Done d) { ReceiveBack(group, rank, identity, a, true, std::move(d)); }));
    bool equal = a.slots == want[lane]->slots;
    for (int64_t i = 0; i < a.out[0].size(); ++i) {
      equal = equal && a.out[0][i] == want[lane]->out[0][i];
    }
    CHECK(equal);
  }
}

void Run(const Chaos& chaos, int64_t steps, bool hierarchical = false) {
  const GroupConfig config = Config(hierarchical);
  const std::vector<World> worlds = MakeWorlds(config);
  const auto group = MakeLocalGroup(config);
  group->SetChaos(chaos);
  RunRanks(kRanks, [&](int32_t rank) {
    std::mt19937 order(static_cast<unsigned>(rank));
    for (int64_t step = 0; step < steps; ++step) Step(*group, rank, step, worlds, order);
  });
  CHECK_OK(group->Check());
  // The mover lets go of the last message a moment after its receiver may have completed.
  CHECK(WaitFor([&] { return group->stats().arena_bytes_in_use == 0; }));
  const GroupStats stats = group->stats();
  CHECK_EQ(stats.of(Phase::kDispatchRecv).calls + stats.of(Phase::kCombineRecv).calls, steps * 2 * kLanes * kRanks);
  CHECK_EQ(stats.messages_in_flight, 0);
  CHECK(stats.arena_bytes_high_water < 64 << 20);  // blocks are used again and again
  group->Close();
}

constexpr Chaos kChaos{2, 150, true, 1e-4, 5};

TEST(WithoutChaos) { Run(Chaos{}, kSteps / 4); }
TEST(WithoutChaosInNodes) { Run(Chaos{}, kSteps / 4, /*hierarchical=*/true); }
TEST(TenThousandOperationsUnderChaos) { Run(kChaos, kSteps); }
TEST(TenThousandOperationsUnderChaosInNodes) { Run(kChaos, kSteps, /*hierarchical=*/true); }

TEST(DelaysWithoutReordering) {
  Chaos chaos;
  chaos.seed = 3;
  chaos.max_delay_us = 20;
  Run(chaos, kSteps / 10);
}

}  // namespace
}  // namespace smfree::cpu::test

TEST_MAIN()
