// SPDX-License-Identifier: Apache-2.0
//
// Large operations of many virtual ranks, in direct and in hierarchical mode: which rows move is
// written down here row by row; release_ranks.h moves them and looks where they are.
#include "csrc/cuda/host/release.h"

#include <algorithm>
#include <random>
#include <vector>

#include "csrc/protocol/signals.h"
#include "tests/cpp/check.h"
#include "tests/cpp/release_ranks.h"

using namespace smfree;
using namespace smfree::cuda;
using namespace smfree::cuda::test;

namespace {

constexpr int32_t kLongestStride = 32;

GroupConfig RanksOfOneNode(int32_t ranks) {
  GroupConfig config{};
  config.num_ranks = ranks;
  config.num_experts = 2 * ranks;
  config.top_k = 4;
  config.num_lanes = 2;
  config.row_bytes = 12 * 2;
  config.max_tokens = kTokens;
  config.differentiable = false;
  return config;
}

// How many rows each rank sends to each, and to each node.
struct Routing {
  Counts by_rank, by_node;
};

// Each token goes to some ranks; the higher `skew`, the more often to low ones.
Routing RandomRouting(const GroupConfig& config, int32_t skew, Random& random) {
  const Nodes nodes = NodesOf(config);
  const auto ranks = static_cast<size_t>(config.num_ranks);
  Routing routing{Counts(ranks, std::vector<int32_t>(ranks, 0)),
                  Counts(ranks, std::vector<int32_t>(nodes.count(), 0))};
  for (size_t source = 0; source < ranks; ++source) {
    for (int32_t token = 0; token < kTokens; ++token) {
      std::vector<bool> goes(ranks, false), goes_to_node(nodes.count(), false);
      for (int32_t slot = 0; slot < config.top_k; ++slot) {
        size_t to = random() % (ranks + 1);  // or nowhere
        for (int32_t i = 0; i < skew; ++i) to = std::min<size_t>(to, random() % ranks);
        if (to == ranks) continue;
        goes[to] = true;
        goes_to_node[nodes.NodeOf(static_cast<int32_t>(to))] = true;
      }
      for (size_t to = 0; to < ranks; ++to) routing.by_rank[source][to] += goes[to];
      for (int32_t n = 0; n < nodes.count(); ++n) routing.by_node[source][n] += goes_to_node[n];
    }
  }
  return routing;
}

// Rows that each receiver keeps, one row after the other.
Counts Kept(const Counts& counts, int64_t capacity) {
  Counts kept(counts.size(), std::vector<int32_t>(counts.size(), 0));
  for (size_t destination = 0; destination < counts.size(); ++destination) {
    int64_t room = capacity;
    for (size_t source = 0; source < counts.size(); ++source) {
      for (int32_t row = 0; row < counts[source][destination] && room > 0; ++row, --room) {
        ++kept[source][destination];
      }
    }
  }
  return kept;
}

Counts Transposed(const Counts& counts) {
  Counts transposed = counts;
  for (size_t s = 0; s < counts.size(); ++s) {
    for (size_t d = 0; d < counts.size(); ++d) transposed[d][s] = counts[s][d];
  }
  return transposed;
}

// A dispatch and the combine that returns its rows.
void ThereAndBack(int32_t num_ranks, int64_t wire_capacity, int32_t skew, uint32_t seed) {
  Random random(seed);
  GroupConfig config = RanksOfOneNode(num_ranks);
  config.wire_capacity = wire_capacity;
  Ranks ranks(config);
  const Counts counts = RandomRouting(config, skew, random).by_rank;
  const Counts kept = Kept(counts, WireRows(config, kTokens));
  CHECK_EQ(kept != counts, wire_capacity > 0);
  const auto lane = static_cast<int32_t>(random() % 2);
  const int64_t number = 1 + random() % 9;
  const auto with = [&] { return static_cast<int16_t>(random() % 2 * config.top_k); };
  const auto chunks = [&] { return static_cast<int32_t>(1 + random() % 5); };
  // Operations of a group may have shorter rows.
  const auto stride = [&] { return kLongestStride - static_cast<int32_t>(random() % 2) * 16; };
  const int16_t experts = with(), slots = with();
  ranks.Run({Operation::kDispatch, kWire, lane, number, stride(), experts, slots, chunks()}, counts,
            {}, Transposed(kept), random);
  ranks.Run({Operation::kCombine, kWire, lane, number + 1, stride(), 0, slots, chunks()},
            Transposed(kept), {}, kept, random);
}

// What moves on the legs of a dispatch in hierarchical mode: rows [rank][region].
struct Legs {
  Counts wire, in_node, wire_taken;  // sent; what becomes of them; and received by relays
  Counts node, node_taken;           // handed on; and received
};

Legs LegsOf(const GroupConfig& config, const Routing& routing) {
  const Nodes nodes = NodesOf(config);
  const int32_t L = nodes.ranks_per_node;
  const int64_t capacity = WireRows(config, kTokens);
  const auto none = [&](int32_t regions) {
    return Counts(config.num_ranks, std::vector<int32_t>(regions, 0));
  };
  Legs legs{routing.by_node, none(nodes.count()), none(nodes.count()), none(config.num_ranks),
            none(config.num_ranks)};
  for (int32_t relay = 0; relay < config.num_ranks; ++relay) {
    const int32_t first = nodes.NodeOf(relay) * L;  // rank of its node
    int64_t room = capacity;
    for (int32_t n = 0; n < nodes.count(); ++n) {
      const int32_t source = n * L + nodes.IndexOf(relay);
      if (room > 0) legs.wire_taken[relay][n] = routing.by_node[source][nodes.NodeOf(relay)];
      for (int32_t j = 0; j < L; ++j) {
        const int32_t rows = routing.by_rank[source][first + j];
        legs.in_node[source][nodes.NodeOf(relay)] += rows;
        for (int32_t row = 0; row < rows && room > 0; ++row, --room) {
          ++legs.node[relay][n * L + j];
        }
      }
    }
  }
  for (int32_t rank = 0; rank < config.num_ranks; ++rank) {
    int64_t room = capacity;
    for (int32_t source = 0; source < config.num_ranks; ++source) {
      const int32_t relay = nodes.NodeOf(rank) * L + nodes.IndexOf(source);
      const int32_t rows = legs.node[relay][nodes.NodeOf(source) * L + nodes.IndexOf(rank)];
      for (int32_t row = 0; row < rows && room > 0; ++row, --room) {
        ++legs.node_taken[rank][source];
      }
    }
  }
  return legs;
}

// The same rows on their way back, by the region that they arrive in.
Counts AtPeers(const Nodes& nodes, Leg leg, const Counts& counts) {
  Counts at_peers = counts;
  for (int32_t rank = 0; rank < nodes.num_ranks; ++rank) {
    for (int32_t region = 0; region < nodes.Regions(leg); ++region) {
      at_peers[nodes.Peer(leg, rank, region)][nodes.RegionAtPeer(leg, rank, region)] =
          counts[rank][region];
    }
  }
  return at_peers;
}

GroupConfig RanksInNodes(int32_t num_ranks, int32_t per_node, int64_t wire_capacity) {
  GroupConfig config = RanksOfOneNode(num_ranks);
  config.ranks_per_node = per_node;
  config.hierarchical = true;
  config.wire_capacity = wire_capacity;
  return config;
}

// A dispatch and a combine over both legs.
void ThereAndBackInNodes(const GroupConfig& config, const Routing& routing, Random& random) {
  const Nodes nodes = NodesOf(config);
  Ranks ranks(config);
  const Legs legs = LegsOf(config, routing);
  const Counts none(config.num_ranks, std::vector<int32_t>(nodes.count(), 0));
  const auto chunks = [&] { return static_cast<int32_t>(1 + random() % 5); };
  const auto slots = static_cast<int16_t>(random() % 2 * config.top_k);
  Shape shape{Operation::kDispatch, kWire, static_cast<int32_t>(random() % 2),
              static_cast<int64_t>(1 + random() % 9),
              kLongestStride, static_cast<int16_t>(random() % 2 * config.top_k), slots, chunks()};
  ranks.Run(shape, legs.wire, legs.in_node, legs.wire_taken, random);
  shape.leg = kNode;
  ranks.Run(shape, legs.node, {}, legs.node_taken, random);

  shape = {Operation::kCombine, kNode, shape.set, shape.number + 1, 16, 0, slots, chunks()};
  ranks.Run(shape, legs.node_taken, {}, AtPeers(nodes, kNode, legs.node_taken), random);
  shape.leg = kWire;
  ranks.Run(shape, legs.wire_taken, none, AtPeers(nodes, kWire, legs.wire_taken), random);
}

void ThereAndBackInNodes(int32_t num_ranks, int32_t per_node, int64_t wire_capacity, int32_t skew,
                         uint32_t seed) {
  Random random(seed);
  const GroupConfig config = RanksInNodes(num_ranks, per_node, wire_capacity);
  ThereAndBackInNodes(config, RandomRouting(config, skew, random), random);
}

}  // namespace

TEST(EveryByteArrivesWhereItsReceiverLooks) {
  for (uint32_t seed = 0; seed < 12; ++seed) {
    ThereAndBack(8, 0, static_cast<int32_t>(seed % 4), seed);
  }
  for (uint32_t seed = 0; seed < 3; ++seed) ThereAndBack(64, 0, static_cast<int32_t>(seed), seed);
}

TEST(WhatDoesNotFitStaysAtItsSource) {
  for (uint32_t seed = 0; seed < 12; ++seed) {
    ThereAndBack(8, 30 + 5 * seed, static_cast<int32_t>(seed % 4), seed);
  }
  for (uint32_t seed = 0; seed < 3; ++seed) ThereAndBack(64, 50, static_cast<int32_t>(seed), seed);
}

TEST(EveryByteOfBothLegsArrivesWhereItsReceiverLooks) {
  for (uint32_t seed = 0; seed < 8; ++seed) {
    ThereAndBackInNodes(8, 2, 0, static_cast<int32_t>(seed % 4), seed);
    ThereAndBackInNodes(8, 4, 0, static_cast<int32_t>(seed % 4), seed);
  }
  ThereAndBackInNodes(64, 8, 0, 0, 1);
}

TEST(WhatARelayHasTooManyOfStaysWhereItIs) {
  for (uint32_t seed = 0; seed < 12; ++seed) {
    ThereAndBackInNodes(8, 2, 10 + 15 * seed, static_cast<int32_t>(seed % 4), seed);
    ThereAndBackInNodes(12, 3, 10 + 15 * seed, static_cast<int32_t>(seed % 4), seed);
  }
  for (uint32_t seed = 0; seed < 2; ++seed) {
    ThereAndBackInNodes(64, 8, 150, static_cast<int32_t>(2 * seed), seed);
  }
  ThereAndBackInNodes(256, 8, 200, 0, 3);
}

// All rows go to the last rank, each in one message: relays take a message more than they hand on.
TEST(ARelayTakesAsMuchAsItsAreaHolds) {
  Random random(1);
  GroupConfig config = RanksInNodes(10, 2, 2 * kTokens + 1);
  config.top_k = 1;
  Routing routing{Counts(10, std::vector<int32_t>(10, 0)), Counts(10, std::vector<int32_t>(5, 0))};
  for (size_t rank = 0; rank < 10; ++rank) {
    routing.by_rank[rank][9] = routing.by_node[rank][4] = kTokens;
  }
  CHECK_EQ(RelayRows(config, kTokens), 3 * kTokens + 1);
  const std::vector<int32_t> taken = {kTokens, kTokens, kTokens, 0, 0};
  CHECK(LegsOf(config, routing).wire_taken[9] == taken);
  ThereAndBackInNodes(config, routing, random);
}

// Announces that each of two ranks sends three rows to each.
void AnnounceOfTwo(std::vector<uint64_t>& announced, int64_t number, uint32_t other_mark) {
  for (int32_t rank = 0; rank < 2; ++rank) {
    for (int32_t peer = 0; peer < 2; ++peer) {
      announced[AnnouncementTable{0, 2, 2}.At(0, number, rank, peer)] =
          Announcement::Of(number, rank == 0 ? kMark : other_mark, 3).word;
    }
  }
}

Descriptor ThreeRowsToTheOther(int64_t number) {
  Descriptor chunk{};
  chunk.signal = SignalAfterChunk(number, 0, 1);
  chunk.region = 1;
  chunk.rows = 3;
  chunk.chunks = 1;
  chunk.tokens = kTokens;
  chunk.stride = kLongestStride;
  return chunk;
}

TEST(NoRowMovesWhereRanksRunDifferentOperations) {
  const GroupConfig config = RanksOfOneNode(2);
  const Layout layout = Layout::Make(config);
  std::vector<uint64_t> announced(layout.AnnouncementsBytes() / sizeof(uint64_t));
  AnnounceOfTwo(announced, 1, kMark + 1);
  Release release;
  release.Add(ThreeRowsToTheOther(1));
  CHECK_EQ(release.Take(config, layout, 0, announced.data()).size(), size_t{1});  // the header
  CHECK(!release.plan().agreed);
}

// A mover that comes late finds chunks of the next operation behind those that it waits with: its
// rank may have received without them.
TEST(ChunksOfTheNextOperationWaitForItsAnnouncements) {
  const GroupConfig config = RanksOfOneNode(2);
  const Layout layout = Layout::Make(config);
  std::vector<uint64_t> announced(layout.AnnouncementsBytes() / sizeof(uint64_t));
  Release release;
  release.Add(ThreeRowsToTheOther(1));
  CHECK(release.Take(config, layout, 0, announced.data()).empty());
  release.Add(ThreeRowsToTheOther(2));
  for (const int64_t number : {1, 2}) {
    AnnounceOfTwo(announced, number, kMark);
    const std::vector<Descriptor> chunks = release.Take(config, layout, 0, announced.data());
    CHECK_EQ(chunks.size(), size_t{1});
    if (!chunks.empty()) CHECK_EQ(NumberOf(chunks[0].signal), number);
    CHECK_EQ(release.plan().payload_at[1], layout.RecvAreaOffset(kWire, 0, number));
    CHECK_EQ(release.waits(), number == 1);
    if (!release.waits()) break;
    CHECK(release.Take(config, layout, 0, announced.data()).empty());
  }
}

TEST_MAIN()
