// SPDX-License-Identifier: Apache-2.0
//
// The hierarchical mode among the ranks of one process: results, bytes between nodes, faults. Under
// chaos: cpu_chaos_test.cc; among processes: cpu_process_test.cc.
#include <chrono>
#include <string>
#include <utility>
#include <vector>

#include "tests/cpp/check.h"
#include "tests/cpp/cpu_round_trip.h"

namespace smfree::cpu::test {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

TEST(RoundTripsInNodes) {
  unsigned seed = 0;
  for (const auto& [num_ranks, ranks_per_node] :
       {std::pair{4, 2}, {6, 2}, {6, 3}, {8, 2}, {8, 4}}) {
    for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
      for (const Routing routing : {Routing::kUniform, Routing::kSomeMissing, Routing::kNoRows,
                                    Routing::kOneExpert, Routing::kOneRankSilent}) {
        GroupConfig config = InNodes(Config(num_ranks, num_ranks * 3, 4), ranks_per_node);
        config.expert_alignment = seed % 3 == 0 ? 8 : 1;
        RoundTrip(config, 1 + seed % 50, routing, seed, Plain(dtype, 37), Plain(dtype, 37));
        ++seed;
      }
    }
  }
  RoundTrip(InNodes(Config(4, 16, 16), 2), 20, Routing::kUniform, 1);
  RoundTrip(InNodes(Config(8, 8, 2), 4), 50, Routing::kUniform, 2);
  RoundTrip(InNodes(Config(4, 8, 2), 2), 0, Routing::kUniform, 4);
  GroupConfig config = InNodes(Config(4, 8, 3), 2);
  config.recv_capacity = 42;
  config.overflow = Overflow::kDrop;
  RoundTrip(config, 40, Routing::kUniform, 7);
  for (const int32_t wire_capacity : {1, 20, 33}) {  // also in the middle of a node
    config.wire_capacity = wire_capacity;
    RoundTrip(config, 20, Routing::kUniform, 8);
    RoundTrip(config, 20, Routing::kOneExpert, 9);
  }
}

// Every row names all experts: in direct mode it crosses to each rank of the other nodes, in
// hierarchical mode to each of these nodes once; and so do the sums on their way back.
TEST(BytesBetweenNodes) {
  constexpr int32_t kRanks = 8, kRanksPerNode = 4, kTokens = 16;  // whole lines of slots
  const auto bytes = [&](bool hierarchical) {
    GroupConfig config = InNodes(Config(kRanks, kRanks, kRanks), kRanksPerNode);
    config.row_bytes = 32 * 4;
    config.hierarchical = hierarchical;
    World world = MakeWorld(config, kTokens, Routing::kUniform, 1);
    const auto group = MakeLocalGroup(config);
    RunRanks(kRanks, [&](int32_t rank) {
      Arrays& a = world[rank];
      CHECK_OK(Send(*group, rank, MakeIdentity(0), a));
      CHECK_OK(Await([&](Done d) { Receive(*group, rank, MakeIdentity(0), a, std::move(d)); }));
      CHECK_OK(SendBack(*group, rank, MakeIdentity(1), a, nullptr, nullptr));
      CHECK_OK(Await(
          [&](Done d) { ReceiveBack(*group, rank, MakeIdentity(1), a, false, std::move(d)); }));
    });
    const GroupStats stats = group->stats();
    CHECK_EQ(stats.rows_relayed, hierarchical ? kRanks * kTokens * (kRanks + 2) : 0);
    group->Close();
    return std::pair{stats.internode_bytes[0], stats.internode_bytes[1]};
  };
  constexpr int64_t kRow = 32 * 4, kExpertsAndSlots = 2 * kRanks * 4;
  const auto [direct_dispatch, direct_combine] = bytes(false);
  CHECK_EQ(direct_dispatch, kRanks * kTokens * kRanksPerNode * (kRow + kExpertsAndSlots));
  CHECK_EQ(direct_combine, kRanks * kTokens * kRanksPerNode * kRow);
  const auto [dispatch, combine] = bytes(true);
  CHECK_EQ(dispatch * kRanksPerNode, direct_dispatch);
  CHECK_EQ(combine * kRanksPerNode, direct_combine);
}

// Rank 3 of two nodes of two stays away from a dispatch, or from its combine. A relay misses it on
// the wire, or inside the node, and others miss the relay: the fault names rank 3 and the relay.
TEST(ADeadlineNamesTheSilentRank) {
  for (const bool combine : {false, true}) {
    GroupConfig config = InNodes(Config(4, 8, 2), 2);
    config.timeout_s = 0.4;
    World world = MakeWorld(config, 10, Routing::kUniform, 1);
    const auto group = MakeLocalGroup(config);
    const Identity first = MakeIdentity(7), second = MakeIdentity(8);
    const auto start = steady_clock::now();
    std::vector<Status> ended(4);
    RunRanks(4, [&](int32_t rank) {
      Arrays& a = world[rank];
      if (rank == 3 && !combine) return;
      CHECK_OK(Send(*group, rank, first, a));
      ended[rank] = Await([&](Done d) { Receive(*group, rank, first, a, std::move(d)); });
      if (rank == 3 || !combine) return;
      CHECK_OK(ended[rank]);
      CHECK_OK(SendBack(*group, rank, second, a, nullptr, nullptr));
      ended[rank] =
          Await([&](Done d) { ReceiveBack(*group, rank, second, a, false, std::move(d)); });
    });
    const std::string waits = combine ? "rank 2 in combine_send" : "rank 1 in dispatch_recv";
    for (int32_t rank = 0; rank < 3; ++rank) {
      CheckFault(ended[rank], FaultKind::kDeadline, {waits, "waited 0.4 s", "for rank 3: nothing arrived"});
    }
    CHECK(steady_clock::now() - start < milliseconds(2000));
    group->Close();
  }
}

// A rank that sends and never receives does not forward either.
TEST(ADeadlineNamesTheRelayThatDoesNotForward) {
  GroupConfig config = InNodes(Config(4, 8, 2), 2);
  config.timeout_s = 0.4;
  World world = MakeWorld(config, 10, Routing::kUniform, 1);
  const auto group = MakeLocalGroup(config);
  RunRanks(4, [&](int32_t rank) {
    Arrays& a = world[rank];
    CHECK_OK(Send(*group, rank, MakeIdentity(0), a));
    if (rank == 3) return;
    const Status status =
        Await([&](Done d) { Receive(*group, rank, MakeIdentity(0), a, std::move(d)); });
    if (rank < 2) return CHECK_OK(status);
    CheckFault(status, FaultKind::kDeadline,
               {"rank 2 in dispatch_recv", "waited 0.5 s inside its node for rank 3: nothing"});
  });
  group->Close();
}

TEST(BrokenRoutingOfARelayIsRefused) {
  const auto broken = [](size_t index, int32_t place, const char* words) {
    const GroupConfig config = InNodes(Config(4, 8, 2), 2);
    const auto group = MakeLocalGroup(config);
    Arrays a(config, 10);
    std::fill(a.rows.begin(), a.rows.end(), -1);
    std::fill(a.recv_counts.begin(), a.recv_counts.end(), 0);
    std::fill(a.relay.begin(), a.relay.end(), -1);
    a.relay[index] = place;
    CheckFault(SendBack(*group, 0, MakeIdentity(1), a, nullptr, nullptr),
               FaultKind::kInvalidArgument, {words, "rank 0 in combine_send"});
    group->Close();
  };
  broken(0, 20, "row 0 has place 20");
  broken(0, 1, "row 0 has place 1");
  broken(2 * 3, 0, "row 0 has place -1");
}

// The program goes on without receiving, and the group is closed while relays wait.
TEST(ClosingEndsRelays) {
  const GroupConfig config = InNodes(Config(4, 8, 2), 2);
  World world = MakeWorld(config, 10, Routing::kUniform, 1);
  const auto group = MakeLocalGroup(config);
  RunRanks(4, [&](int32_t rank) {
    Arrays& a = world[rank];
    CHECK_OK(Send(*group, rank, MakeIdentity(0), a));
    CHECK_OK(Await([&](Done d) { Receive(*group, rank, MakeIdentity(0), a, std::move(d)); }));
    if (rank > 0) CHECK_OK(SendBack(*group, rank, MakeIdentity(1), a, nullptr, nullptr));
  });
  // Nothing comes from rank 0: its node's relays wait, and those of the other node have sent.
  CHECK(WaitFor([&] { return group->stats().pending_receives == 1; }));
  CHECK_OK(group->Check());
  group->Close();
  CHECK_EQ(group->memory_bytes(), 0);
}

TEST(NodesThatAreNone) {
  for (const auto& [num_ranks, ranks_per_node] : {std::pair{4, 4}, {4, 1}, {6, 4}}) {
    GroupConfig config = Config(num_ranks, num_ranks, 1);
    config.ranks_per_node = ranks_per_node;
    config.hierarchical = true;
    CHECK(MakeLocalGroup(config) == nullptr);
  }
}

}  // namespace
}  // namespace smfree::cpu::test

TEST_MAIN()
