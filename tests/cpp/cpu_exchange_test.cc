// SPDX-License-Identifier: Apache-2.0
//
// All phases among 1 to 8 ranks of one process against the reference: routings, dtypes, alignment,
// capacity, cached and weighted forms, lanes.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <string>
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
        GroupConfig config = Config(num_ranks, num_ranks * 3, std::min(4, num_ranks * 3), dtype);
        config.expert_alignment = seed % 3 == 0 ? 8 : 1;
        RoundTrip(config, 1 + seed % 50, routing, seed);
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
  config.hidden = 3000;
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

TEST(CapacityErrorPoisonsAndIsReportedOnce) {
  GroupConfig config = Config(2, 4, 2);
  config.recv_capacity = 10;
  World got = MakeWorld(config, 20, Routing::kUniform, 10);
  World want = got;
  ReferenceDispatch(config, want);
  const auto group = MakeLocalGroup(config);
  RunRanks(2, [&](int32_t rank) {
    Arrays& a = got[rank];
    CHECK_OK(Send(*group, rank, MakeIdentity(0), a));
    CHECK_OK(Await([&](Done d) { Receive(*group, rank, MakeIdentity(0), a, std::move(d)); }));
    CHECK_EQ(a.num_dropped, want[rank].num_dropped);
    CHECK(std::isnan(a.dx[0]) && std::isnan(a.dx[a.dx.size() - 1]) && std::isnan(a.weights[9]));
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
  for (const auto& [dtype, ranks_per_node] :
       {std::pair{DType::kF32, 4}, {DType::kBF16, 4}, {DType::kF16, 4}, {DType::kF32, 2}}) {
    const GroupConfig config = InNodes(Config(4, 8, 3, dtype), ranks_per_node);
    World world = MakeWorld(config, 50, Routing::kSomeMissing, 11);
    ReferenceDispatch(config, world);  // of x and topk_weights; the cached dispatch sends the same
    const auto group = MakeLocalGroup(config);
    RunRanks(4, [&](int32_t rank) {
      Arrays& a = world[rank];
      for (const bool with_slots : {true, false}) {
        const Identity identity = MakeIdentity(with_slots, 0, 2);
        const Call call = MakeCall(rank, identity, a);
        CHECK_OK(DispatchSendCached(*group, call,
                                    {a.x.data(), with_slots ? a.topk_weights.data() : nullptr,
                                     a.places.data(), a.send_counts.data()}));
        Array x(dtype, a.dx.size());
        std::vector<float> values(a.capacity, -7);
        const DispatchRecvCachedArrays recv{
            a.capacity,     a.rows.data(),  a.recv_counts.data(),
            a.relay.data(), /*y=*/nullptr,  /*w=*/nullptr,
            x.data(),       with_slots ? values.data() : nullptr};
        CHECK_OK(Await([&](Done d) { DispatchRecvCached(*group, call, recv, std::move(d)); }));
        CHECK(x == a.dx);
        if (with_slots) CHECK(SameBits(values, a.weights));
      }

      const Call call = MakeCall(rank, MakeIdentity(2, 0, 2), a);
      CHECK_OK(DispatchSendCached(
          *group, call, {a.x.data(), /*slots=*/nullptr, a.places.data(), a.send_counts.data()}));
      std::mt19937 random(rank);
      std::normal_distribution<float> normal;
      Array y(dtype, a.dx.size()), x(dtype, a.dx.size());
      std::vector<float> w(a.capacity), values(a.capacity, -7);
      for (int64_t i = 0; i < y.size(); ++i) y.Set(i, normal(random));
      for (float& weight : w) weight = normal(random);
      const DispatchRecvCachedArrays recv{
          a.capacity, a.rows.data(), a.recv_counts.data(), a.relay.data(),
          y.data(),   w.data(),      x.data(),             values.data()};
      CHECK_OK(Await([&](Done d) { DispatchRecvCached(*group, call, recv, std::move(d)); }));
      int64_t wrong = 0;
      for (int64_t n = 0; n < a.capacity; ++n) {
        double product = 0;
        for (int64_t h = 0; h < config.hidden; ++h) {
          const int64_t i = n * config.hidden + h;
          wrong += x[i] != RoundTo(dtype, w[n] * a.dx[i]);  // dx is 0 where no row is
          product += static_cast<double>(y[i]) * a.dx[i];
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
