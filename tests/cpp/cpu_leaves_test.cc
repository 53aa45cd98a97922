// SPDX-License-Identifier: Apache-2.0
//
// Rows of all formats against the reference, in direct and hierarchical mode: several leaves,
// shorter rows than the group's, other rows back than there, quantised leaves; what a combine adds,
// how many rows are filled, and where NaNs say that something is lost.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "csrc/cpu/rows/rows.h"
#include "tests/cpp/check.h"
#include "tests/cpp/cpu_round_trip.h"

namespace smfree::cpu::test {
namespace {

struct LeafOf {
  DType dtype;
  int32_t width;
  int32_t item_bytes = 0;  // of what is no float
};

RowFormat Format(const std::vector<LeafOf>& leaves, const Quantisation& how = {}) {
  RowFormat format;
  format.quantisation = how;
  for (const LeafOf& leaf : leaves) {
    format.Add(leaf.dtype, leaf.item_bytes ? leaf.item_bytes : ItemBytes(leaf.dtype), leaf.width);
  }
  return format;
}

// A group for rows up to those.
GroupConfig ConfigFor(int32_t num_ranks, int32_t ranks_per_node, const RowFormat& there,
                      const RowFormat& back) {
  GroupConfig config = InNodes(Config(num_ranks, num_ranks * 2, 3), ranks_per_node);
  config.row_bytes = std::max(there.stride, back.stride);
  return config;
}

// With and without what `seed` decides.
void RoundTrips(const RowFormat& there, const RowFormat& back) {
  unsigned seed = 0;
  for (const auto& [num_ranks, ranks_per_node] : {std::pair{2, 2}, {3, 3}, {4, 2}, {6, 3}}) {
    for (int i = 0; i < 6; ++i, ++seed) {
      GroupConfig config = ConfigFor(num_ranks, ranks_per_node, there, back);
      config.expert_alignment = seed % 4 == 0 ? 8 : 1;
      RoundTrip(config, 1 + seed * 7 % 20, Routing(seed % 5), seed, there, back);
    }
  }
}

const RowFormat kMixed = Format({{DType::kF32, 5}, {DType::kBF16, 37}, {DType::kE4M3, 19},
                                 {DType::kOther, 3, 4}, {DType::kF16, 8}, {DType::kOther, 1, 1},
                                 {DType::kE5M2, 64}, {DType::kOther, 2, 8}});
const RowFormat kMixedFloats = Format({{DType::kBF16, 33}, {DType::kF32, 1}, {DType::kE4M3, 40},
                                       {DType::kE5M2, 3}, {DType::kF16, 21}});

TEST(LeavesStandAtMultiplesOf16Bytes) {
  CHECK_EQ(kMixed.count, kMaxLeaves);
  CHECK_EQ(kMixed.bytes(), 5 * 4 + 37 * 2 + 19 + 12 + 16 + 1 + 64 + 16);
  CHECK_EQ(kMixed.stride, 32 + 80 + 32 + 16 + 16 + 16 + 64 + 16);
  for (int32_t l = 0; l < kMixed.count; ++l) CHECK_EQ(kMixed.leaves[l].offset % 16, 0);
}

TEST(SeveralLeaves) {
  RoundTrips(kMixed, kMixedFloats);
  RoundTrips(Format({{DType::kE4M3, 48}}), Format({{DType::kE4M3, 48}}));
  RoundTrips(Format({{DType::kE5M2, 20}}), Format({{DType::kE5M2, 4}}));
  RoundTrips(Format({{DType::kOther, 6, 4}}), Format({{DType::kBF16, 100}}));
}

TEST(LargeRowsOfSeveralLeavesAreStreamedByThreads) {
  const RowFormat format = Format({{DType::kF32, 2000}, {DType::kBF16, 1500}});
  GroupConfig config = Config(1, 4, 2);
  config.row_bytes = format.stride;
  config.max_tokens = 500;
  RoundTrip(config, 500, Routing::kUniform, 6, format, format);
}

TEST(ShorterRowsSendFewerBytes) {
  const auto bytes = [](int32_t width) {
    GroupConfig config = Config(2, 4, 2);
    config.row_bytes = 4096;
    const RowFormat format = Plain(DType::kF32, width);
    World world = MakeWorld(config, 32, Routing::kOneExpert, 1, format, format);
    const auto group = MakeLocalGroup(config);
    RunRanks(2, [&](int32_t rank) {
      CHECK_OK(Send(*group, rank, MakeIdentity(0), world[rank]));
      CHECK_OK(Await(
          [&](Done d) { Receive(*group, rank, MakeIdentity(0), world[rank], std::move(d)); }));
    });
    const PhaseStats sent = group->stats().of(Phase::kDispatchSend);
    const PhaseStats received = group->stats().of(Phase::kDispatchRecv);
    CHECK_EQ(sent.bytes, received.bytes);
    group->Close();
    return std::pair{sent.rows, sent.bytes};
  };
  const auto [rows, few] = bytes(32);
  const auto [same_rows, many] = bytes(1024);
  CHECK_EQ(rows, same_rows);
  CHECK_EQ(many - few, rows * (1024 - 32) * 4);
}

TEST(QuantisedOnTheWire) {
  for (const DType values : {DType::kE4M3, DType::kE5M2}) {
    for (const int32_t block : {32, 64, 128}) {
      for (const bool power_of_two : {false, true}) {
        const Quantisation how{values, block, power_of_two};
        RoundTrips(Format({{DType::kBF16, 256}, {DType::kOther, 3, 4}, {DType::kF32, 128},
                           {DType::kE4M3, 17}},
                          how),
                   Format({{DType::kF16, 128}, {DType::kE5M2, 9}, {DType::kBF16, 384},
                           {DType::kF32, 128}},
                          how));
      }
    }
  }
}

// A dispatch that is quantised on the wire, and one of its values and scales, are the same bytes
// there: what one rank sends as the former, another may receive as the latter.
TEST(QuantisedRowsAreReceivedAsValuesAndScales) {
  const RowFormat quantised = Format({{DType::kBF16, 256}}, {DType::kE4M3, 64, false});
  const RowFormat kept = Format({{DType::kE4M3, 256}, {DType::kF32, 4}});
  CHECK_EQ(quantised.stride, kept.stride);
  GroupConfig config = ConfigFor(2, 2, quantised, kept);
  World world = MakeWorld(config, 20, Routing::kUniform, 3, quantised, quantised);
  World want = world;
  ReferenceDispatch(config, want);
  const auto group = MakeLocalGroup(config);
  RunRanks(2, [&](int32_t rank) {
    Arrays& a = world[rank];
    a.dx = Rows(kept, a.capacity);
    CHECK_OK(Send(*group, rank, MakeIdentity(0), a));
    CHECK_OK(Await([&](Done d) { Receive(*group, rank, MakeIdentity(0), a, std::move(d)); }));
    int64_t wrong = 0;
    for (int64_t i = 0; i < a.dx[0].size(); ++i) {
      const float value = a.dx[0][i] * a.dx[1][i / 64];
      wrong += RoundTo(DType::kBF16, value) != want[rank].dx[0][i];
    }
    CHECK_EQ(wrong, 0);
  });
  group->Close();
}

// The gradient of a combine: each leaf is scaled, and the products of the leaves are added.
TEST(WeightedFormOverLeaves) {
  for (const bool wire : {false, true}) {
    const Quantisation how =
        wire ? Quantisation{DType::kE4M3, 32, true} : Quantisation{};
    const RowFormat format =
        Format({{DType::kBF16, 64}, {DType::kF32, 96}, {DType::kE4M3, 11}}, how);
    const GroupConfig config = ConfigFor(4, 2, format, format);
    World world = MakeWorld(config, 30, Routing::kSomeMissing, 11, format, format);
    ReferenceDispatch(config, world);
    const auto group = MakeLocalGroup(config);
    RunRanks(4, [&](int32_t rank) {
      Arrays& a = world[rank];
      const Call call = MakeCall(rank, MakeIdentity(0, 0, 2), a);
      CHECK_OK(DispatchSendCached(
          *group, call, {a.x.in(), /*slots=*/nullptr, a.places.data(), a.send_counts.data()}));
      Rows x(format, a.capacity), scaled(format, 1), zero(format, 1);
      zero.Fill(0);
      std::vector<float> w(a.capacity), values(a.capacity, -7);
      for (int64_t n = 0; n < a.capacity; ++n) w[n] = 0.25f + static_cast<float>(n);
      auto recv = CachedArrays(a, x, values.data());
      recv.y = a.y.in();
      recv.w = w.data();
      CHECK_OK(Await([&](Done d) { DispatchRecvCached(*group, call, recv, std::move(d)); }));
      std::vector<bool> is_row(a.capacity);
      for (const int32_t n : a.rows) {
        if (n >= 0) is_row[n] = true;
      }
      int64_t wrong = 0;
      for (int64_t n = 0; n < a.capacity; ++n) {
        float product = 0;
        for (int32_t l = 0; l < format.count; ++l) {
          const Leaf& leaf = format.leaves[l];
          const auto row = [&](Rows& rows) {
            return reinterpret_cast<std::byte*>(rows[l].data()) + n * leaf.bytes();
          };
          const float of_leaf = ScaleRowAndDot(
              leaf.dtype, reinterpret_cast<std::byte*>(scaled[l].data()), nullptr, row(a.dx),
              row(a.y), w[n], leaf.width, Writes::kCached);
          product += of_leaf;
          const void* const want = is_row[n] ? scaled[l].data() : zero[l].data();
          wrong += std::memcmp(row(x), want, leaf.bytes()) != 0;
        }
        wrong += values[n] != (is_row[n] ? product : 0.0f);
      }
      CHECK_EQ(wrong, 0);
    });
    group->Close();
  }
}

// Rows that go nowhere get what is added, bit by bit.
TEST(RowsWithoutAPlaceAreWhatIsAdded) {
  const Quantisation how{DType::kE4M3, 32, false};
  for (const int32_t ranks_per_node : {4, 2}) {
    const RowFormat format =
        Format({{DType::kF32, 64}, {DType::kBF16, 32}, {DType::kE5M2, 8}}, how);
    const GroupConfig config = ConfigFor(4, ranks_per_node, format, format);
    World world = MakeWorld(config, 10, Routing::kNoRows, 1, format, format);
    const auto group = MakeLocalGroup(config);
    RunRanks(4, [&](int32_t rank) {
      Arrays& a = world[rank];
      a.adds = rank % 2 == 0;
      for (int32_t l = 0; l < format.count; ++l) {
        a.add[l].Set(0, -0.0f);
        a.add[l].Set(1, kNaN);
        a.add[l].Set(2, std::numeric_limits<float>::denorm_min());
      }
      CHECK_OK(Send(*group, rank, MakeIdentity(0), a));
      CHECK_OK(Await([&](Done d) { Receive(*group, rank, MakeIdentity(0), a, std::move(d)); }));
      CHECK_OK(SendBack(*group, rank, MakeIdentity(1), a, nullptr, nullptr));
      CHECK_OK(Await(
          [&](Done d) { ReceiveBack(*group, rank, MakeIdentity(1), a, false, std::move(d)); }));
      Rows zero(format, a.tokens);
      zero.Fill(0);
      CHECK(a.out == (a.adds ? a.add : zero));
    });
    group->Close();
  }
}

// The sum is rounded once: 256 + 1 is no bfloat16, 256 + 1 + 1 is.
TEST(WhatIsAddedIsNotRoundedBefore) {
  const RowFormat format = Plain(DType::kBF16, 16);
  GroupConfig config = ConfigFor(2, 2, format, format);
  World world = MakeWorld(config, 4, Routing::kUniform, 1, format, format);
  const auto group = MakeLocalGroup(config);
  RunRanks(2, [&](int32_t rank) {
    Arrays& a = world[rank];
    a.adds = true;
    for (int64_t t = 0; t < 4; ++t) {  // an expert of each rank
      for (int32_t k = 0; k < 3; ++k) a.topk_idx[t * 3 + k] = k < 2 ? 2 * k : -1;
    }
    for (int64_t i = 0; i < a.y[0].size(); ++i) a.y[0].Set(i, rank == 0 ? 256.0f : 1.0f);
    for (int64_t i = 0; i < a.add[0].size(); ++i) a.add[0].Set(i, 1.0f);
    CHECK_OK(Send(*group, rank, MakeIdentity(0), a));
    CHECK_OK(Await([&](Done d) { Receive(*group, rank, MakeIdentity(0), a, std::move(d)); }));
    CHECK_OK(SendBack(*group, rank, MakeIdentity(1), a, nullptr, nullptr));
    CHECK_OK(Await(
        [&](Done d) { ReceiveBack(*group, rank, MakeIdentity(1), a, false, std::move(d)); }));
    for (int64_t i = 0; i < a.out[0].size(); ++i) CHECK_EQ(a.out[0][i], 258.0f);
  });
  group->Close();
}

// Of the rows of dx only so many are filled, on each rank as it likes; the others are zero.
TEST(OnlySoManyRowsAreFilled) {
  for (const int32_t alignment : {1, 4}) {
    for (const int32_t to_fill : {-9, 0, 1, 3, 4, 7, 16, 41, 42, 1000}) {
      for (const int32_t recv_capacity : {0, 44}) {
        GroupConfig config = Config(4, 8, 3);
        config.recv_capacity = recv_capacity;
        config.expert_alignment = alignment;
        config.overflow = Overflow::kDrop;
        World world = MakeWorld(config, 20, Routing::kUniform, 7);
        for (int32_t rank = 0; rank < 3; ++rank) world[rank].to_fill = to_fill + rank;
        RoundTrip(config, world, 7);
        RoundTrip(config, world, 8);
      }
    }
  }
}

TEST(RowsThatAreNotFilledAreAnOverflow) {
  GroupConfig config = Config(2, 4, 2);
  config.expert_alignment = 4;
  World world = MakeWorld(config, 20, Routing::kUniform, 10);
  World want = world;
  const auto group = MakeLocalGroup(config);
  want[0].to_fill = world[0].to_fill = 11;
  ReferenceDispatch(config, want);
  RunRanks(2, [&](int32_t rank) {
    Arrays& a = world[rank];
    CHECK_OK(Send(*group, rank, MakeIdentity(0), a));
    CHECK_OK(Await([&](Done d) { Receive(*group, rank, MakeIdentity(0), a, std::move(d)); }));
    CheckDispatched(a, want[rank]);
    CHECK_EQ(std::isnan(a.dx[0][0]), rank == 0);
  });
  CheckFault(group->Check(), FaultKind::kOverflow,
             {"rank 0 in dispatch_recv", std::to_string(want[0].num_dropped) + " rows exceed",
              "capacity 8"});
  group->Close();
}

// Under overflow="error": rows that lost all their copies on a rank, and rows that were cut.
TEST(WhatIsLostIsNaN) {
  const Quantisation how{DType::kE4M3, 32, false};
  const RowFormat plain = Format({{DType::kBF16, 21}, {DType::kF32, 3}});
  for (const RowFormat& back : {plain, Format({{DType::kBF16, 64}, {DType::kE4M3, 3}}, how)}) {
    for (const int32_t ranks_per_node : {4, 2}) {
      for (const auto& [wire_capacity, recv_capacity] : {std::pair{30, 0}, {0, 24}, {25, 20}}) {
        GroupConfig config = ConfigFor(4, ranks_per_node, kMixed, back);
        config.wire_capacity = wire_capacity;
        config.recv_capacity = recv_capacity;
        const World world = MakeWorld(config, 20, Routing::kSomeMissing, 5, kMixed, back);
        RoundTrip(config, world, /*seed=*/1);  // of finite y, without weights
        World want = world;
        ReferenceDispatch(config, want);
        ReferenceCombine(config, want, /*weighted=*/false);
        int64_t nan_rows = 0, rows = 0;
        for (const Arrays& a : want) {
          for (int64_t t = 0; t < a.tokens; ++t, ++rows) {
            nan_rows += std::isnan(a.out[0][t * back.leaves[0].width]);
          }
        }
        CHECK(nan_rows > 0 && nan_rows < rows);
        config.overflow = Overflow::kDrop;
        RoundTrip(config, world, /*seed=*/1);
        RoundTrip(config, world, /*seed=*/4);
      }
    }
  }
}

// A combine's rows may be of all ranks' making: NaN and infinity stay what they are.
TEST(QuantisedSumsThatAreNotFiniteAreNaN) {
  const RowFormat format = Format({{DType::kBF16, 64}}, {DType::kE5M2, 32, false});
  for (const int32_t ranks_per_node : {4, 2}) {
    const GroupConfig config = ConfigFor(4, ranks_per_node, format, format);
    World world = MakeWorld(config, 12, Routing::kUniform, 2, format, format);
    for (Arrays& a : world) {
      for (int64_t n = 0; n < a.capacity; n += 5) {
        a.y[0].Set(n * 64 + 40, n % 2 == 0 ? std::numeric_limits<float>::infinity() : kNaN);
      }
      a.x[0].Set(3, kNaN);
    }
    RoundTrip(config, world, 1);
  }
}

}  // namespace
}  // namespace smfree::cpu::test

TEST_MAIN()
