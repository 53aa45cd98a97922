// SPDX-License-Identifier: Apache-2.0
//
// A dispatch and a combine among the ranks of one process, against the reference.
#ifndef SMFREE_TESTS_CPP_CPU_ROUND_TRIP_H_
#define SMFREE_TESTS_CPP_CPU_ROUND_TRIP_H_

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#include "tests/cpp/check.h"
#include "tests/cpp/cpu_ranks.h"
#include "tests/cpp/cpu_reference.h"

namespace smfree::cpu::test {

inline GroupConfig Config(int32_t num_ranks, int32_t num_experts, int32_t top_k) {
  GroupConfig config;
  config.num_ranks = num_ranks;
  config.num_experts = num_experts;
  config.top_k = top_k;
  config.num_lanes = 2;
  config.row_bytes = 37 * 4;  // no multiple of any vector width
  config.max_tokens = 50;
  config.timeout_s = 30;
  return config;
}

// In nodes, if there are several of several ranks; else the direct mode.
inline GroupConfig InNodes(GroupConfig config, int32_t ranks_per_node) {
  config.ranks_per_node = ranks_per_node;
  config.hierarchical = ranks_per_node > 1 && ranks_per_node < config.num_ranks;
  return config;
}

inline World MakeWorld(const GroupConfig& config, int64_t tokens, Routing routing, unsigned seed,
                       const RowFormat& there, const RowFormat& back) {
  std::mt19937 random(seed);
  World world;
  for (int32_t rank = 0; rank < config.num_ranks; ++rank) {
    world.emplace_back(config, tokens, there, back);
    FillInputs(config, world.back(), routing, random, rank);
  }
  return world;
}

inline World MakeWorld(const GroupConfig& config, int64_t tokens, Routing routing, unsigned seed) {
  return MakeWorld(config, tokens, routing, seed, LongestRows(config), LongestRows(config));
}

inline bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](float left, float right) {
    return std::memcmp(&left, &right, sizeof(float)) == 0;
  });
}

inline void CheckDispatched(const Arrays& got, const Arrays& want) {
  CHECK(got.places == want.places);
  CHECK(got.send_counts == want.send_counts);
  CHECK(got.rows == want.rows);
  CHECK(got.recv_counts == want.recv_counts);
  CHECK(got.relay == want.relay);
  CHECK(got.group_sizes == want.group_sizes);
  CHECK(got.num_rows == want.num_rows);
  CHECK_EQ(got.num_dropped, want.num_dropped);
  CHECK(got.dx == want.dx);
  CHECK(SameBits(got.weights, want.weights));
}

inline void CheckCombined(const Arrays& got, const Arrays& want, bool with_slots) {
  int64_t wrong = 0;
  for (int32_t l = 0; l < got.out.format.count; ++l) {
    for (int64_t i = 0; i < got.out[l].size(); ++i) wrong += !Same(got.out[l][i], want.out[l][i]);
  }
  CHECK_EQ(wrong, 0);
  for (size_t i = 0; with_slots && i < got.slots.size(); ++i) CHECK_EQ(got.slots[i], want.slots[i]);
}

// Dispatch and combine through the group and through the reference. `seed` also says whether the
// combine is weighted, has slots, and adds something.
inline void RoundTrip(const GroupConfig& config, World got, unsigned seed) {
  const bool weighted = seed % 2 == 0, with_slots = seed % 3 == 0;
  for (Arrays& a : got) a.adds = seed % 5 > 2;
  const int64_t tokens = got[0].tokens;
  World want = got;
  ReferenceDispatch(config, want);
  const auto group = MakeLocalGroup(config);
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
  ReferenceCombine(config, want, weighted);
  for (int32_t rank = 0; rank < config.num_ranks; ++rank) {
    CheckCombined(got[rank], want[rank], with_slots);
  }
  const GroupStats stats = group->stats();
  CHECK_EQ(stats.of(Phase::kDispatchSend).calls, config.num_ranks);
  CHECK_EQ(stats.of(Phase::kCombineRecv).calls, config.num_ranks);
  int64_t kept = 0, dropped = 0, taken = 0;  // by ranks, and by relays
  for (const Arrays& a : want) {
    kept = std::accumulate(a.recv_counts.begin(), a.recv_counts.end(), kept);
    dropped += a.num_dropped;
    for (size_t row = 0; row < a.relay.size(); row += static_cast<size_t>(PlacesPerNode(config))) {
      taken += a.relay[row] >= 0;
    }
  }
  CHECK_EQ(stats.rows_dropped, dropped);
  CHECK_EQ(stats.of(Phase::kCombineSend).rows, kept);
  CHECK_EQ(stats.of(Phase::kCombineRecv).rows,
           config.hierarchical ? taken : kept);
  if (!MayCut(config, tokens)) CHECK_EQ(stats.of(Phase::kDispatchRecv).rows, kept);
  CHECK_EQ(stats.rows_relayed,
           config.hierarchical ? stats.of(Phase::kDispatchRecv).rows + stats.of(Phase::kCombineRecv).rows : 0);
  CHECK_EQ(stats.messages_in_flight, 0);
  CHECK_EQ(stats.pending_receives, 0);
  // A relay gives its messages back a moment after it has sent on what was in them.
  CHECK(WaitFor([&] { return group->stats().arena_bytes_in_use == 0; }));
  group->Close();
}

inline void RoundTrip(const GroupConfig& config, int64_t tokens, Routing routing, unsigned seed) {
  RoundTrip(config, MakeWorld(config, tokens, routing, seed), seed);
}

// With rows of other formats.
inline void RoundTrip(const GroupConfig& config, int64_t tokens, Routing routing, unsigned seed,
                      const RowFormat& there, const RowFormat& back) {
  RoundTrip(config, MakeWorld(config, tokens, routing, seed, there, back), seed);
}

}  // namespace smfree::cpu::test

#endif  // SMFREE_TESTS_CPP_CPU_ROUND_TRIP_H_
