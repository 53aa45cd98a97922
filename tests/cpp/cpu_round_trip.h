// SPDX-License-Identifier: Apache-2.0
//
// A dispatch and a combine among the ranks of one process, against the reference.
#ifndef SMFREE_TESTS_CPP_CPU_ROUND_TRIP_H_
#define SMFREE_TESTS_CPP_CPU_ROUND_TRIP_H_

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "tests/cpp/check.h"
#include "tests/cpp/cpu_ranks.h"
#include "tests/cpp/cpu_reference.h"

namespace smfree::cpu::test {

inline GroupConfig Config(int32_t num_ranks, int32_t num_experts, int32_t top_k,
                   DType dtype = DType::kF32) {
  GroupConfig config;
  config.num_ranks = num_ranks;
  config.num_experts = num_experts;
  config.top_k = top_k;
  config.num_lanes = 2;
  config.hidden = 37;  // no multiple of any vector width
  config.max_tokens = 50;
  config.dtype = dtype;
  config.timeout_s = 30;
  return config;
}

// In nodes, if there are several of several ranks; else the direct mode.
inline GroupConfig InNodes(GroupConfig config, int32_t ranks_per_node) {
  config.ranks_per_node = ranks_per_node;
  config.hierarchical = ranks_per_node > 1 && ranks_per_node < config.num_ranks;
  return config;
}

inline World MakeWorld(const GroupConfig& config, int64_t tokens, Routing routing, unsigned seed) {
  std::mt19937 random(seed);
  World world;
  for (int32_t rank = 0; rank < config.num_ranks; ++rank) {
    world.emplace_back(config, tokens);
    FillInputs(config, world.back(), routing, random, rank);
  }
  return world;
}

inline bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](float left, float right) {
    return std::memcmp(&left, &right, sizeof(float)) == 0;
  });
}

inline bool Same(float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); }

inline void CheckDispatched(const Arrays& got, const Arrays& want) {
  CHECK(got.places == want.places);
  CHECK(got.send_counts == want.send_counts);
  CHECK(got.rows == want.rows);
  CHECK(got.recv_counts == want.recv_counts);
  CHECK(got.relay == want.relay);
  CHECK(got.group_sizes == want.group_sizes);
  CHECK_EQ(got.num_dropped, want.num_dropped);
  CHECK(got.dx == want.dx);
  CHECK(SameBits(got.weights, want.weights));
}

inline void CheckCombined(const Arrays& got, const Arrays& want, bool with_slots) {
  int64_t wrong = 0;
  for (int64_t i = 0; i < got.out.size(); ++i) wrong += !Same(got.out[i], want.out[i]);
  CHECK_EQ(wrong, 0);
  for (size_t i = 0; with_slots && i < got.slots.size(); ++i) CHECK_EQ(got.slots[i], want.slots[i]);
}

// Dispatch and combine through the group and through the reference.
inline void RoundTrip(const GroupConfig& config, int64_t tokens, Routing routing, unsigned seed) {
  World got = MakeWorld(config, tokens, routing, seed);
  World want = got;
  ReferenceDispatch(config, want);
  const auto group = MakeLocalGroup(config);
  const bool weighted = seed % 2 == 0, with_slots = seed % 3 == 0;
  RunRanks(config.num_ranks, [&](int32_t rank) {
    Arrays& a = got[rank];
    CHECK_OK(Send(*group, rank, MakeIdentity(0), a));
    CHECK_OK(Await([&](Done d) { Receive(*group, rank, MakeIdentity(0), a, std::move(d)); }));
    CheckDispatched(a, want[rank]);
    const float* const weights = a.weights.data();
    CHECK_OK(SendBack(*group, rank, MakeIdentity(1), a, weighted ? weights : nullptr,
                      with_slots ? weights : nullptr));
    CHECK_OK(Await(
        [&](Done d) { ReceiveBack(*group, rank, MakeIdentity(1), a, with_slots, std::move(d)); }));
  });
  std::vector<Array> y;
  std::vector<std::vector<float>> weights;
  for (const Arrays& a : want) {
    y.push_back(a.dx);
    weights.push_back(a.weights);
  }
  ReferenceCombine(config, want, y, weighted ? weights : std::vector<std::vector<float>>{},
                   weights);
  for (int32_t rank = 0; rank < config.num_ranks; ++rank) {
    CheckCombined(got[rank], want[rank], with_slots);
  }
  const GroupStats stats = group->stats();
  CHECK_EQ(stats.of(Phase::kDispatchSend).calls, config.num_ranks);
  CHECK_EQ(stats.of(Phase::kCombineRecv).calls, config.num_ranks);
  CHECK_EQ(stats.of(Phase::kDispatchRecv).rows, stats.of(Phase::kCombineSend).rows);
  CHECK_EQ(stats.of(Phase::kCombineRecv).rows, stats.of(Phase::kDispatchSend).rows);
  CHECK_EQ(stats.rows_relayed,
           config.hierarchical ? stats.of(Phase::kDispatchRecv).rows + stats.of(Phase::kCombineRecv).rows : 0);
  CHECK_EQ(stats.messages_in_flight, 0);
  CHECK_EQ(stats.pending_receives, 0);
  // A relay gives its messages back a moment after it has sent on what was in them.
  CHECK(WaitFor([&] { return group->stats().arena_bytes_in_use == 0; }));
  group->Close();
}

}  // namespace smfree::cpu::test

#endif  // SMFREE_TESTS_CPP_CPU_ROUND_TRIP_H_
