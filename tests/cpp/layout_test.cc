// SPDX-License-Identifier: Apache-2.0
#include "csrc/protocol/layout.h"

#include <algorithm>
#include <initializer_list>
#include <random>
#include <utility>
#include <vector>

#include "csrc/core/errors.h"
#include "csrc/cpu/exchange/message_header.h"
#include "tests/cpp/check.h"

using namespace smfree;

static_assert(sizeof(cpu::MessageHeader) <= kHeaderIdentityBytes);

namespace {

GroupConfig FourRanks() {
  GroupConfig config{};
  config.num_ranks = 4;
  config.ranks_per_node = 4;
  config.num_experts = 256;
  config.top_k = 8;
  config.num_lanes = 1;
  config.num_sets = 1;
  config.row_bytes = 7168 * 2;
  config.max_tokens = 8192;
  config.differentiable = false;
  config.hierarchical = false;
  return config;
}

// Checks that all signals, regions and areas are aligned, disjoint, and fill the memory exactly but
// for the padding of the signal blocks; and that those of each set stand behind those of the set
// before, which alone may be there.
void CheckMemory(const GroupConfig& config) {
  const Layout layout = Layout::Make(config);
  const auto in_set = [&](int64_t begin, int64_t bytes, int32_t set) {
    return begin >= layout.BytesOfSets(set) && begin + bytes <= layout.BytesOfSets(set + 1);
  };
  std::vector<std::pair<int64_t, int64_t>> ranges;  // [begin, end)
  ranges.push_back({layout.FaultWordOffset(), layout.FaultWordOffset() + kAlignment});
  for (Leg leg : {kWire, kNode}) {
    for (int32_t lane = 0; lane < NumSets(config); ++lane) {
      for (int64_t number : {1, 2}) {
        for (int32_t peer = 0; peer < layout.peers[leg]; ++peer) {
          const int64_t signal = layout.SignalOffset(leg, lane, number, peer);
          CHECK_EQ(signal % kSignalBytes, 0);
          CHECK(signal + kSignalBytes <= layout.FaultWordOffset());
          ranges.push_back({signal, signal + kSignalBytes});
          for (int64_t region : {layout.SendRegionOffset(leg, lane, number, peer),
                                 layout.RecvRegionOffset(leg, lane, number, peer)}) {
            CHECK_EQ(region % kAlignment, 0);
            CHECK(in_set(region, layout.region_bytes, lane));
            ranges.push_back({region, region + layout.region_bytes});
          }
          CHECK_EQ(signal, layout.SignalOffset(leg, lane, number + kParities, peer));
          CHECK_EQ(layout.RecvRegionOffset(leg, lane, number, peer),
                   layout.RecvRegionOffset(leg, lane, number + kParities, peer));
        }
      }
    }
  }
  for (Leg leg : {kWire, kNode}) {
    for (int32_t lane = 0; lane < NumSets(config); ++lane) {
      for (int64_t number : {1, 2}) {  // what one of them packs, the other one receives in
        const int64_t area = layout.SendAreaOffset(leg, lane, number);
        CHECK_EQ(area % kAlignment, 0);
        CHECK(in_set(area, layout.area_bytes[leg], lane));
        CHECK_EQ(area, layout.RecvAreaOffset(leg, lane, number + 1));
        CHECK_EQ(area, layout.SendAreaOffset(leg, lane, number + kParities));
        const int64_t bytes = layout.area_bytes[leg];
        if (bytes > 0) ranges.push_back({area, area + bytes});
      }
    }
  }
  if (layout.announced_bytes > 0) {
    const int64_t announced = layout.AnnouncedOffset();
    CHECK_EQ(announced % kAlignment, 0);
    ranges.push_back({announced, announced + layout.announced_bytes});
  }
  std::sort(ranges.begin(), ranges.end());
  int64_t sets_bytes = 0;
  for (size_t i = 0; i < ranges.size(); ++i) {
    const auto [begin, end] = ranges[i];
    if (i > 0) CHECK(ranges[i - 1].second <= begin);
    if (begin >= layout.BytesOfSets(0)) sets_bytes += end - begin;
  }
  CHECK_EQ(ranges.back().second, layout.TotalBytes());
  CHECK_EQ(layout.BytesOfSets(0) + sets_bytes, layout.TotalBytes());
  CHECK_EQ(RdmaSizeHint(config) + NvlSizeHint(config), layout.TotalBytes());
}

}  // namespace

TEST(RegionsAreDisjointAndFillTheMemory) {
  std::mt19937 random(1);
  const auto one_of = [&](std::initializer_list<int32_t> values) {
    return values.begin()[random() % values.size()];
  };
  for (int round = 0; round < 300; ++round) {
    GroupConfig config{};
    config.num_ranks = one_of({1, 2, 3, 4, 6, 8});
    do config.ranks_per_node = one_of({1, 2, 3, 4, 6, 8});
    while (config.num_ranks % config.ranks_per_node != 0);
    config.num_experts = config.num_ranks * one_of({1, 2, 7, 33});
    config.top_k = one_of({1, 2, 8});
    config.num_lanes = one_of({1, 2, 3});
    config.row_bytes = one_of({1, 14, 16, 400, 4096});
    config.max_tokens = one_of({1, 3, 128, 1000});
    config.recv_capacity = one_of({0, 1, 500, 100'000});
    config.sm_push_bytes = one_of({0, 1 << 10, 1 << 16, 1 << 24});
    config.differentiable = one_of({0, 1}) != 0;
    config.puts_on_device = one_of({0, 1}) != 0;
    config.hierarchical = one_of({0, 1}) != 0;
    CheckMemory(config);
  }
}

TEST(MessagePartsAreAlignedAndFitTheRegion) {
  GroupConfig config = FourRanks();
  config.sm_push_bytes = int64_t{1} << 30;  // all operations are small
  const Layout layout = Layout::Make(config);
  int64_t last_bytes = 0;
  for (int64_t rows : {0, 1, 2, 63, 64, 4095, 8192}) {
    for (bool has_slots : {false, true}) {
      for (bool has_experts : {false, true}) {
        const MessageLayout message(rows, has_experts ? 8 : 0, has_slots ? 8 : 0,
                                    layout.row_bytes);
        CHECK_EQ(message.experts_offset, 0);
        CHECK(message.slots_offset >= (has_experts ? rows * 8 * 4 : 0));
        CHECK(message.rows_offset - message.slots_offset >= (has_slots ? rows * 8 * 4 : 0));
        CHECK_EQ(message.slots_offset % kAlignment, 0);
        CHECK_EQ(message.rows_offset % kAlignment, 0);
        CHECK(message.bytes >= message.rows_offset + rows * layout.row_bytes);
        CHECK(layout.header_bytes + message.bytes <= layout.region_bytes);
      }
    }
    const int64_t bytes = MessageLayout(rows, 8, 8, layout.row_bytes).bytes;
    CHECK(rows == 0 ? bytes == 0 : bytes > last_bytes);
    last_bytes = bytes;
  }
  CHECK_EQ(layout.header_bytes + last_bytes, layout.region_bytes);
}

TEST(RowsArePaddedToTheirAlignment) {
  GroupConfig config = FourRanks();
  for (auto [bytes, stride] :
       {std::pair{1, 16}, {2, 16}, {16, 16}, {17, 32}, {28, 32}, {14336, 14336}}) {
    config.row_bytes = bytes;
    CHECK_EQ(Layout::Make(config).row_bytes, stride);
  }
}

TEST(LargeOperationsUseAreas) {
  GroupConfig config = FourRanks();
  const int64_t row_bytes = 7168 * 2;
  const auto rows = [&](int64_t sm_push_bytes) {
    config.sm_push_bytes = sm_push_bytes;
    const Layout layout = Layout::Make(config);
    CHECK(!layout.UsesAreas(layout.region_rows));
    CHECK_EQ(layout.UsesAreas(config.max_tokens), layout.region_rows < config.max_tokens);
    return std::pair(layout.region_rows, layout.area_rows[kWire]);
  };
  const int64_t packed = 8192 * 4;  // a row goes to at most four ranks
  CHECK(rows(0) == std::pair(int64_t{0}, packed));
  CHECK(rows(100 * row_bytes + 1) == std::pair(int64_t{100}, packed));
  CHECK(rows(8192 * row_bytes) == std::pair(int64_t{8192}, int64_t{0}));

  config.num_ranks = config.ranks_per_node = 64;
  CHECK_EQ(rows(0).second, 64 * 8192);  // what is received is the most
  config.recv_capacity = 81'920;
  CHECK_EQ(rows(0).second, 81'920);
  config.wire_capacity = 8192 * 8 + 1;
  CHECK_EQ(rows(0).second, 8192 * 8 + 1);
  config.wire_capacity = 8192;
  CHECK_EQ(rows(0).second, 8192 * 8);  // what is packed is

  config.ranks_per_node = 8;
  config.puts_on_device = true;  // whoever puts
  CHECK_EQ(rows(0).second, 8192 * 8);
}

TEST(EachLegHasAreas) {
  GroupConfig config = FourRanks();
  config.num_ranks = 64;
  config.ranks_per_node = 8;
  config.hierarchical = true;
  const auto rows = [&] {
    const Layout layout = Layout::Make(config);
    return std::pair(layout.area_rows[kWire], layout.area_rows[kNode]);
  };
  using Rows = std::pair<int64_t, int64_t>;
  CHECK(rows() == Rows(8192 * 8, 8192 * 64));  // a row from each rank of an index, of all ranks
  config.recv_capacity = 81'920;
  CHECK(rows() == Rows(8192 * 8, 81'920));
  config.num_ranks = 256;  // a relay takes no more than it may hand on, and one message
  CHECK(rows() == Rows(81'920 + 8192, 81'920));
  config.wire_capacity = 8192;
  CHECK(rows() == Rows(8192 * 8, 8192));  // what is packed is the most
  config.sm_push_bytes = int64_t{1} << 30;  // all operations are small
  CHECK(rows() == Rows(0, 0));
}

TEST(TablesOfAnnouncementsAreDisjoint) {
  GroupConfig config = FourRanks();
  config.num_sets = 3;
  for (const bool hierarchical : {false, true}) {
    config.num_ranks = 8;
    config.ranks_per_node = 4;
    config.hierarchical = hierarchical;
    const Layout layout = Layout::Make(config);
    std::vector<bool> taken(static_cast<size_t>(layout.AnnouncementsBytes() / 8));
    int64_t twice = 0;
    for (const Leg leg : {kWire, kNode}) {
      const AnnouncementTable table = layout.Announcements(leg);
      for (int32_t set = 0; set < 3; ++set) {
        for (int64_t number : {1, 2}) {
          for (int32_t rank = 0; rank < 8; ++rank) {
            for (int32_t word = 0; word < table.words; ++word) {
              const auto at = static_cast<size_t>(table.At(set, number, rank, word));
              if (leg == kWire) CHECK(static_cast<int64_t>(at) * 8 < layout.announced_bytes);
              twice += taken.at(at);
              taken.at(at) = true;
            }
          }
        }
      }
    }
    CHECK_EQ(twice, 0);
    CHECK(std::find(taken.begin(), taken.end(), false) == taken.end());
  }
}

// The figures of one well-known shape, so that a change of the layout is seen for what it costs.
TEST(BytesOfFourRanks) {
  const int64_t header_bytes = 128 + 64 * 4;
  const int64_t row_bytes = 7168 * 2 + 8 * 4 * 2;  // with expert ids and slots
  const Layout layout = Layout::Make(FourRanks());
  CHECK_EQ(layout.region_bytes, header_bytes);
  CHECK_EQ(layout.area_bytes[kWire], 8192 * 4 * row_bytes + 4 * 3 * 128);
  CHECK_EQ(layout.area_bytes[kNode], 0);
  CHECK_EQ(layout.SignalsBytes(), 2 * 128 + 128);
  const int64_t set_bytes = 2 * (128 + 4 * 2 * layout.region_bytes + layout.area_bytes[kWire]);
  CHECK_EQ(layout.TotalBytes(), 128 + set_bytes);

  GroupConfig config = FourRanks();
  config.differentiable = true;
  config.num_sets = 0;
  CHECK_EQ(Layout::Make(config).TotalBytes(), 128 + NumSets(config) * set_bytes);

  config.ranks_per_node = 2;  // and the words of 4 x 4 messages, which other nodes announce
  const Layout two_nodes = Layout::Make(config);
  CHECK_EQ(two_nodes.area_bytes[kWire], layout.area_bytes[kWire]);
  CHECK_EQ(two_nodes.announced_bytes, NumSets(config) * 2 * 4 * 4 * 8);
}

TEST(AreasDoNotGrowWithTheRanks) {
  GroupConfig config = FourRanks();
  config.recv_capacity = 81'920;  // 1.25 times what a balanced routing brings
  for (auto [ranks, most_gib] : {std::pair{2, 0.6}, {8, 2.0}, {64, 2.5}, {256, 2.5}}) {
    config.num_ranks = config.ranks_per_node = ranks;
    config.sm_push_bytes = std::min(int64_t{2} << 20, (int64_t{16} << 20) / ranks);
    for (int32_t node : {ranks, std::min(ranks, 8)}) {
      config.ranks_per_node = node;
      CHECK(static_cast<double>(Layout::Make(config).TotalBytes()) < most_gib * (1 << 30));
    }
  }
  config.hierarchical = true;
  for (auto [ranks, most_gib] : {std::pair{16, 3.5}, {64, 4.1}, {256, 4.9}}) {
    config.num_ranks = ranks;
    config.ranks_per_node = 8;
    config.sm_push_bytes = std::min(int64_t{2} << 20, (int64_t{16} << 20) / ranks);
    CHECK(static_cast<double>(Layout::Make(config).TotalBytes()) < most_gib * (1 << 30));
  }
}

// Where nothing is ever cut, the network's share is a region for each node, there and back.
TEST(TheWireOfHierarchicalModeGrowsWithTheNodesAtMost) {
  GroupConfig config = FourRanks();
  config.num_ranks = 64;
  config.ranks_per_node = 8;
  config.hierarchical = true;
  const Layout layout = Layout::Make(config);
  const int64_t row_bytes = 7168 * 2 + 8 * 4 * 2;
  CHECK_EQ(layout.area_bytes[kWire], 8 * (8192 * row_bytes + 3 * 128));
  const int64_t headers = 2 * 8 * layout.header_bytes;
  CHECK_EQ(layout.RdmaBytes(), 128 + kParities * (128 + headers + layout.area_bytes[kWire]) +
                                   layout.announced_bytes);
}

TEST(SizeHintsByLink) {
  GroupConfig config = FourRanks();
  const auto leg_bytes = [&](Leg leg, int64_t peers) {
    const Layout layout = Layout::Make(config);
    return kParities * (128 + peers * 2 * layout.region_bytes + layout.area_bytes[leg]) +
           (leg == kWire ? layout.announced_bytes : 0);
  };

  // One node: everything is served by NVLink.
  CHECK_EQ(RdmaSizeHint(config), 0);
  CHECK_EQ(NvlSizeHint(config), 128 + leg_bytes(kWire, 4));

  // Two nodes, direct: every rank is a peer over the network.
  config.ranks_per_node = 2;
  CHECK_EQ(RdmaSizeHint(config), 128 + leg_bytes(kWire, 4));
  CHECK_EQ(NvlSizeHint(config), 0);

  // Two nodes, hierarchical: the network has one peer per node.
  config.hierarchical = true;
  CHECK_EQ(RdmaSizeHint(config), 128 + leg_bytes(kWire, 2));
  CHECK_EQ(NvlSizeHint(config), leg_bytes(kNode, 4));
}

// The largest number of rows, by brute force over what routing can do: one expert gets g of the
// R * T rows, and no row goes to an expert twice.
int64_t LargestByTrying(int64_t rows_sent, int64_t top_k, int64_t experts, int64_t alignment) {
  // best[c] = most padded rows with c copies given out to the experts so far
  const int64_t copies = rows_sent * std::min(top_k, experts);
  std::vector<int64_t> best(copies + 1, 0);
  for (int64_t expert = 0; expert < experts; ++expert) {
    std::vector<int64_t> next(best);
    for (int64_t given = 0; given <= copies; ++given) {
      for (int64_t group = 1; group <= rows_sent && given + group <= copies; ++group) {
        next[given + group] =
            std::max(next[given + group], best[given] + AlignUp(group, alignment));
      }
    }
    best = next;
  }
  return *std::max_element(best.begin(), best.end());
}

TEST(MaxRecvRowsIsEnough) {
  CHECK_EQ(MaxRecvRows(4, 8192, 8, 64, 1), 4 * 8192 * 8);
  CHECK_EQ(MaxRecvRows(4, 8192, 8, 2, 1), 4 * 8192 * 2);
  CHECK_EQ(MaxRecvRows(4, 0, 8, 2, 16), 0);
  CHECK_EQ(MaxRecvRows(1, 1, 2, 8, 16), 2 * 16);
  for (int32_t ranks : {1, 2}) {
    for (int64_t tokens : {1, 2, 5}) {
      for (int32_t top_k : {1, 2, 3}) {
        for (int32_t experts : {1, 2, 4}) {
          for (int32_t alignment : {1, 2, 4, 8}) {
            const int64_t rows = MaxRecvRows(ranks, tokens, top_k, experts, alignment);
            const int64_t largest = LargestByTrying(ranks * tokens, top_k, experts, alignment);
            CHECK_EQ(rows % alignment, 0);
            CHECK(rows >= largest);
            if (alignment == 1) CHECK_EQ(rows, largest);
          }
        }
      }
    }
  }
}

TEST(PaddedGroupsHaveEqualParts) {
  GroupConfig config = FourRanks();
  config.num_experts = 4 * 8;
  config.padded_groups = true;
  CHECK_EQ(RowsCapacity(config, 5), 8 * 4 * 5);  // each row of each rank, for each expert
  config.expert_alignment = 16;
  CHECK_EQ(RowsCapacity(config, 5), 8 * 32);
  CHECK(CheckConfig(config, 4).ok());
  config.recv_capacity = 8 * 16;
  CHECK_EQ(RowsCapacity(config, 5), 8 * 16);
  CHECK(CheckConfig(config, 4).ok());
  config.recv_capacity = 4 * 16;
  CHECK(!CheckConfig(config, 4).ok());
}

TEST_MAIN()
