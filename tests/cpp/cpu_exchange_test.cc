// SPDX-License-Identifier: Apache-2.0
//
// All phases among 1 to 8 ranks of one process against the reference: routings, dtypes, alignment,
// capacity, cached and weighted forms, lanes.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "tests/cpp/check.h"
#include "tests/cpp/cpu_ranks.h"
#include "tests/cpp/cpu_reference.h"
#include "tests/cpp/cpu_round_trip.h"

namespace smfree::cpu::test {
namespace {

TEST(RoundTripsOfAllSizesDtypesAndRoutings) {
  unsigned seed = 0;
  for (const int32_t num_ranks : {1, 2, 3, 4, 5, 6, 7, 8}) {
    for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
      for (const Routing routing : {Routing::kUniform, Routing::kSomeMissing, Routing::kNoRows,
                                    Routing::kOneExpert, Routing::kOneRankSilent}) {
        GroupConfig config = Config(num_ranks, num_ranks * 3, std::min(4, num_ranks * 3));
        config.expert_alignment = seed % 3 == 0 ? 8 : 1;
        RoundTrip(config, 1 + seed % 50, routing, seed, Plain(dtype, 37), Plain(dtype, 37));
        ++seed;
      }
    }
  }
}

TEST(ManyExpertsPerRowAndOnePerRank) {
  RoundTrip(Config(2, 16, 16), 20, Routing::kUniform, 1);
  RoundTrip(Config(8, 8, 2), 50, Routing::kUniform, 2);
  RoundTrip(Config(1, 1, 1), 50, Routing::kUniform, 3);
}

TEST(NoTokens) { RoundTrip(Config(3, 6, 2), 0, Routing::kUniform, 4); }

TEST(LargeRowsUseSeveralThreads) {
  GroupConfig config = Config(1, 4, 2);
  config.row_bytes = 3000 * 4;
  config.max_tokens = 400;
  RoundTrip(config, 400, Routing::kUniform, 6);
}

TEST(CapacityDropsInOrder) {
  for (const int32_t alignment : {1, 4}) {
    GroupConfig config = Config(4, 8, 3);
    config.recv_capacity = 42;
    config.expert_alignment = alignment;
    config.overflow = Overflow::kDrop;
    RoundTrip(config, 40, Routing::kUniform, 7);
    RoundTrip(config, 40, Routing::kOneExpert, 8);
    RoundTrip(config, 3, Routing::kUniform, 9);  // fits
  }
}

// 80 copies of 40 rows on one rank, of which the wire takes those of the first ranks.
TEST(WireCapacityCutsInOrder) {
  for (const int32_t wire_capacity : {1, 19, 20, 25, 79, 80, 200}) {
    GroupConfig config = Config(4, 8, 3);
    config.wire_capacity = wire_capacity;
    config.overflow = Overflow::kDrop;
    RoundTrip(config, 20, Routing::kUniform, 6);
    RoundTrip(config, 20, Routing::kOneExpert, 7);
    config.recv_capacity = 24;
    config.expert_alignment = 4;
    RoundTrip(config, 20, Routing::kUniform, 8);
  }
}

TEST(KeptRowsFillTheCapacity) {
  CHECK_EQ(KeptRows(0, 7, 10), 7);
  CHECK_EQ(KeptRows(7, 7, 10), 3);
  CHECK_EQ(KeptRows(10, 7, 10), 0);
  CHECK_EQ(KeptRows(14, 7, 10), 0);
}

TEST(WireRowsFollowTheCapacities) {
  GroupConfig config = Config(4, 8, 3);  // max_tokens 50
  CHECK_EQ(WireRows(config, 20), 80);
  config.recv_capacity = 42;
  CHECK_EQ(WireRows(config, 20), 42);
  CHECK_EQ(WireRows(config, 10), 40);
  config.wire_capacity = 60;
  CHECK_EQ(WireRows(config, 20), 60);
  CHECK(MayCut(config, 20) && !MayCut(config, 15));
}

TEST(WireCapacityErrorPoisonsAndIsReportedOnce) {
  for (const int32_t ranks_per_node : {4, 2}) {
    for (const bool follows : {false, true}) {
      GroupConfig config = InNodes(Config(4, 8, 2), ranks_per_node);
      (follows ? config.recv_capacity : config.wire_capacity) = 30;
      World got = MakeWorld(config, 20, Routing::kOneExpert, 10);  // all to expert 1, of rank 0
      World want = got;
      ReferenceDispatch(config, want);
      const auto group = MakeLocalGroup(config);
      RunRanks(4, [&](int32_t rank) {
        Arrays& a = got[rank];
        CHECK_OK(Send(*group, rank, MakeIdentity(0), a));
        CHECK_OK(Await([&](Done d) { Receive(*group, rank, MakeIdentity(0), a, std::move(d)); }));
        CHECK_EQ(a.num_dropped, rank == 0 ? 50 : 0);
        CHECK_EQ(std::isnan(a.dx[0][0]), rank == 0);
        CHECK(a.rows == want[rank].rows && a.recv_counts == want[rank].recv_counts);
      });
      CheckFault(group->Check(), FaultKind::kOverflow,
                 {"rank 0 in dispatch_recv", "80 rows came here and exceed wire_capacity 30",
                  follows ? "Fix: raise recv_capacity" : "Fix: raise wire_capacity"});
      CHECK(group->Check().ok());
      CHECK_EQ(group->stats().rows_dropped, 50);
      group->Close();
    }
  }
}

TEST(CapacityErrorPoisonsAndIsReportedOnce) {
  GroupConfig config = Config(2, 4, 2);
  config.recv_capacity = 10;
  config.wire_capacity = 40;
  World got = MakeWorld(config, 20, Routing::kUniform, 10);
  World want = got;
  ReferenceDispatch(config, want);
  const auto group = MakeLocalGroup(config);
  RunRanks(2, [&](int32_t rank) {
    Arrays& a = got[rank];
    CHECK_OK(Send(*group, rank, MakeIdentity(0), a));
    CHECK_OK(Await([&](Done d) { Receive(*group, rank, MakeIdentity(0), a, std::move(d)); }));
    CHECK_EQ(a.num_dropped, want[rank].num_dropped);
    CHECK(std::isnan(a.dx[0][0]) && std::isnan(a.dx[0][a.dx[0].size() - 1]));
    CHECK(std::isnan(a.weights[9]));
    CHECK(a.rows == want[rank].rows);
  });
  const Status overflow = group->Check();
  CHECK_EQ(overflow.kind(), FaultKind::kOverflow);
  CHECK(overflow.message().find("recv_capacity 10") != std::string::npos);
  CHECK(group->Check().ok());
  group->Close();
}

// The gradients' forms along the routing of a dispatch: x and slots to the experts, there grouped
// again, or weighted and multiplied.
TEST(CachedAndWeightedForms) {
  for (const auto& [dtype, ranks_per_node, wire_capacity] :
       {std::tuple{DType::kF32, 4, 0}, {DType::kBF16, 4, 0}, {DType::kF16, 4, 0},
        {DType::kF32, 2, 0}, {DType::kF32, 4, 70}, {DType::kF32, 2, 70}}) {
    GroupConfig config = InNodes(Config(4, 8, 3), ranks_per_node);
    const RowFormat format = Plain(dtype, 37);
    config.wire_capacity = wire_capacity;
    config.overflow = Overflow::kDrop;
    World world = MakeWorld(config, 50, Routing::kSomeMissing, 11, format, format);
    ReferenceDispatch(config, world);  // of x and topk_weights; the cached dispatch sends the same
    const auto group = MakeLocalGroup(config);
    RunRanks(4, [&](int32_t rank) {
      Arrays& a = world[rank];
      for (const bool with_slots : {true, false}) {
        const Identity identity = MakeIdentity(with_slots, 0, 2);
        const Call call = MakeCall(rank, identity, a);
        CHECK_OK(DispatchSendCached(*group, call,
                                    {a.x.in(), with_slots ? a.topk_weights.data() : nullptr,
                                     a.places.data(), a.send_counts.data()}));
        Rows x(format, a.capacity);
        std::vector<float> values(a.capacity, -7);
        const auto recv = CachedArrays(a, x, with_slots ? values.data() : nullptr);
        CHECK_OK(Await([&](Done d) { DispatchRecvCached(*group, call, recv, std::move(d)); }));
        CHECK(x == a.dx);
        if (with_slots) CHECK(SameBits(values, a.weights));
      }

      const Call call = MakeCall(rank, MakeIdentity(2, 0, 2), a);
      CHECK_OK(DispatchSendCached(
          *group, call, {a.x.in(), /*slots=*/nullptr, a.places.data(), a.send_counts.data()}));
      std::mt19937 random(rank);
      std::normal_distribution<float> normal;
      Rows x(format, a.capacity);
      std::vector<float> w(a.capacity), values(a.capacity, -7);
      for (float& weight : w) weight = normal(random);
      auto recv = CachedArrays(a, x, values.data());
      recv.y = a.y.in();
      recv.w = w.data();
      CHECK_OK(Await([&](Done d) { DispatchRecvCached(*group, call, recv, std::move(d)); }));
      int64_t wrong = 0;
      for (int64_t n = 0; n < a.capacity; ++n) {
        double product = 0;
        for (int64_t i = n * 37; i < (n + 1) * 37; ++i) {
          wrong += x[0][i] != RoundTo(dtype, w[n] * a.dx[0][i]);  // dx is 0 where no row is
          product += static_cast<double>(a.y[0][i]) * a.dx[0][i];
        }
        wrong += !(std::abs(values[n] - product) < 1e-4);
      }
      CHECK_EQ(wrong, 0);
    });
    CHECK_EQ(group->stats().messages_in_flight, 0);
    group->Close();
  }
}

TEST(TwoLanesInFlightTogether) {
  const GroupConfig config = Config(3, 6, 2);
  World lane0 = MakeWorld(config, 30, Routing::kUniform, 12);
  World lane1 = MakeWorld(config, 20, Routing::kUniform, 13);
  World want0 = lane0, want1 = lane1;
  ReferenceDispatch(config, want0);
  ReferenceDispatch(config, want1);
  const auto group = MakeLocalGroup(config);
  RunRanks(3, [&](int32_t rank) {
    CHECK_OK(Send(*group, rank, MakeIdentity(0, 0), lane0[rank]));
    CHECK_OK(Send(*group, rank, MakeIdentity(0, 1), lane1[rank]));
    CHECK_OK(Await(
        [&](Done d) { Receive(*group, rank, MakeIdentity(0, 1), lane1[rank], std::move(d)); }));
    CHECK_OK(Await(
        [&](Done d) { Receive(*group, rank, MakeIdentity(0, 0), lane0[rank], std::move(d)); }));
    CheckDispatched(lane0[rank], want0[rank]);
    CheckDispatched(lane1[rank], want1[rank]);
  });
  group->Close();
}

// Calls that no data order, in another order on each rank: by instance, by the token they began
// with, by derivation.
TEST(UnorderedCallsAreTakenByIdentity) {
  std::vector<Identity> identities(7, MakeIdentity(5));
  identities[1].instance = {1, 9};
  identities[2].instance = {2, 9};
  identities[0].instance = {0, 9};
  identities[3].sequence = 3;
  identities[4].sequence = 4;
  identities[4].call_site = 1;
  identities[5].derivation = 3;
  identities[6].number = 6;
  for (const int32_t ranks_per_node : {4, 2}) {
    const GroupConfig config = InNodes(Config(4, 8, 2), ranks_per_node);
    std::vector<World> got, want;
    for (unsigned i = 0; i < identities.size(); ++i) {
      got.push_back(MakeWorld(config, 30, Routing::kUniform, 14 + i));
      want.push_back(got.back());
      ReferenceDispatch(config, want.back());
    }
    const auto group = MakeLocalGroup(config);
    RunRanks(4, [&](int32_t rank) {
      std::vector<size_t> order{0, 1, 2, 3, 4, 5, 6};
      std::mt19937 random(rank);
      for (int round = 0; round < 20; ++round) {  // a loop: the same identities again and again
        std::shuffle(order.begin(), order.end(), random);
        for (const size_t i : order) CHECK_OK(Send(*group, rank, identities[i], got[i][rank]));
        std::shuffle(order.begin(), order.end(), random);
        std::vector<std::future<Status>> received(order.size());
        for (const size_t i : order) {
          received[i] = Start([&](Done done) {
            Receive(*group, rank, identities[i], got[i][rank], std::move(done));
          });
        }
        for (const size_t i : order) {
          CHECK_OK(received[i].get());
          CheckDispatched(got[i][rank], want[i][rank]);
        }
      }
    });
    CHECK_OK(group->Check());
    CHECK_EQ(group->stats().messages_in_flight, 0);
    group->Close();
  }
}

}  // namespace
}  // namespace smfree::cpu::test

TEST_MAIN()
