// SPDX-License-Identifier: Apache-2.0
#include "csrc/protocol/layout.h"

#include <algorithm>
#include <initializer_list>
#include <random>
#include <tuple>
#include <utility>
#include <vector>

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
  config.dtype = DType::kBF16;
  config.hidden = 7168;
  config.max_tokens = 8192;
  config.differentiable = false;
  config.hierarchical = false;
  return config;
}

// Checks that all signals and regions are aligned, disjoint, and fill the memory exactly but for
// the padding of the signal blocks.
void CheckMemory(const GroupConfig& config) {
  const Layout layout = Layout::Make(config);
  std::vector<std::pair<int64_t, int64_t>> ranges;  // [begin, end)
  ranges.push_back({layout.FaultWordOffset(), layout.FaultWordOffset() + kAlignment});
  for (Leg leg : {kWire, kNode}) {
    for (int32_t lane = 0; lane < LaneCount(config.num_lanes, config.differentiable); ++lane) {
      for (int64_t number : {1, 2}) {
        for (int32_t peer = 0; peer < layout.peers[leg]; ++peer) {
          const int64_t signal = layout.SignalOffset(leg, lane, number, peer);
          CHECK_EQ(signal % kSignalBytes, 0);
          CHECK(signal + kSignalBytes <= layout.FaultWordOffset());
          ranges.push_back({signal, signal + kSignalBytes});
          for (int64_t region : {layout.SendRegionOffset(leg, lane, number, peer),
                                 layout.RecvRegionOffset(leg, lane, number, peer)}) {
            CHECK_EQ(region % kAlignment, 0);
            CHECK(region >= layout.regions_offset);
            ranges.push_back({region, region + layout.region_bytes});
          }
          CHECK_EQ(signal, layout.SignalOffset(leg, lane, number + kParities, peer));
          CHECK_EQ(layout.RecvRegionOffset(leg, lane, number, peer),
                   layout.RecvRegionOffset(leg, lane, number + kParities, peer));
        }
      }
    }
  }
  std::sort(ranges.begin(), ranges.end());
  int64_t regions_bytes = 0;
  for (size_t i = 0; i < ranges.size(); ++i) {
    const auto [begin, end] = ranges[i];
    if (i > 0) CHECK(ranges[i - 1].second <= begin);
    if (begin >= layout.regions_offset) regions_bytes += end - begin;
  }
  CHECK_EQ(ranges.back().second, layout.TotalBytes());
  CHECK_EQ(layout.regions_offset + regions_bytes, layout.TotalBytes());
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
    config.dtype = one_of({2, 4}) == 2 ? DType::kBF16 : DType::kF32;
    config.hidden = one_of({1, 7, 8, 100, 1024});
    config.max_tokens = one_of({1, 3, 128, 1000});
    config.differentiable = one_of({0, 1}) != 0;
    config.hierarchical = one_of({0, 1}) != 0;
    CheckMemory(config);
  }
}

TEST(MessagePartsAreAlignedAndFitTheRegion) {
  const Layout layout = Layout::Make(FourRanks());
  int64_t last_bytes = 0;
  for (int64_t rows : {0, 1, 2, 63, 64, 4095, 8192}) {
    for (bool has_slots : {false, true}) {
      for (bool has_experts : {false, true}) {
        const MessageLayout message = layout.Message(rows, has_experts, has_slots);
        CHECK_EQ(message.experts_offset, 0);
        CHECK(message.slots_offset >= (has_experts ? rows * 8 * 4 : 0));
        CHECK(message.rows_offset - message.slots_offset >= (has_slots ? rows * 8 * 4 : 0));
        CHECK_EQ(message.slots_offset % kAlignment, 0);
        CHECK_EQ(message.rows_offset % kAlignment, 0);
        CHECK(message.bytes >= message.rows_offset + rows * layout.row_bytes);
        CHECK(layout.header_bytes + message.bytes <= layout.region_bytes);
      }
    }
    const int64_t bytes = layout.Message(rows, true, true).bytes;
    CHECK(rows == 0 ? bytes == 0 : bytes > last_bytes);
    last_bytes = bytes;
  }
  CHECK_EQ(layout.header_bytes + last_bytes, layout.region_bytes);
}

TEST(RowsArePaddedToTheirAlignment) {
  GroupConfig config = FourRanks();
  for (auto [hidden, dtype, row_bytes] :
       {std::tuple{1, DType::kBF16, 16},
        {7, DType::kF32, 32},
        {8, DType::kF16, 16},
        {9, DType::kBF16, 32},
        {7168, DType::kBF16, 14336}}) {
    config.hidden = hidden;
    config.dtype = dtype;
    CHECK_EQ(Layout::Make(config).row_bytes, row_bytes);
  }
}

// The figures of one well-known shape, so that a change of the layout is seen for what it costs.
TEST(BytesOfFourRanks) {
  const int64_t header_bytes = 128 + 64 * 4;
  const int64_t side_bytes = 8192 * 8 * 4 * 2;  // expert ids and slots
  const int64_t rows_bytes = int64_t{8192} * 7168 * 2;
  const Layout layout = Layout::Make(FourRanks());
  CHECK_EQ(layout.region_bytes, header_bytes + side_bytes + rows_bytes);
  CHECK_EQ(layout.SignalsBytes(), 2 * 128 + 128);
  const int64_t lane_bytes = 2 * (128 + 4 * 2 * layout.region_bytes);
  CHECK_EQ(layout.TotalBytes(), 128 + lane_bytes);

  GroupConfig config = FourRanks();
  config.differentiable = true;
  CHECK_EQ(Layout::Make(config).TotalBytes(), 128 + kSides * lane_bytes);
  config.num_lanes = 3;
  CHECK_EQ(Layout::Make(config).TotalBytes(), 128 + 3 * kSides * lane_bytes);
}

TEST(SizeHintsByLink) {
  GroupConfig config = FourRanks();
  const int64_t sets = kParities;
  const auto extra_bytes = [&] {  // of a region, beside its rows
    const Layout layout = Layout::Make(config);
    return layout.region_bytes - config.max_tokens * layout.row_bytes;
  };
  const int64_t rows_bytes = config.max_tokens * config.hidden * ItemBytes(config.dtype);

  // One node: everything is served by NVLink.
  CHECK_EQ(RdmaSizeHint(config), 0);
  CHECK_EQ(NvlSizeHint(config), 128 + sets * (128 + 4 * 2 * (rows_bytes + extra_bytes())));

  // Two nodes, direct: every rank is a peer over the network.
  config.ranks_per_node = 2;
  CHECK_EQ(RdmaSizeHint(config), 128 + sets * (128 + 4 * 2 * (rows_bytes + extra_bytes())));
  CHECK_EQ(NvlSizeHint(config), 0);

  // Two nodes, hierarchical: the network has one peer per node.
  config.hierarchical = true;
  CHECK_EQ(RdmaSizeHint(config), 128 + sets * (128 + 2 * 2 * (rows_bytes + extra_bytes())));
  CHECK_EQ(NvlSizeHint(config), sets * (128 + 4 * 2 * (rows_bytes + extra_bytes())));
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

TEST_MAIN()
