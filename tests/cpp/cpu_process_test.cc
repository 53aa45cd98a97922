// SPDX-License-Identifier: Apache-2.0
//
// A group across processes: exchange, a killed process, orderly ends, faults told to others,
// refused connections, strangers, too few file descriptors; and nothing left behind.
#include <signal.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "tests/cpp/check.h"
#include "tests/cpp/cpu_processes.h"
#include "tests/cpp/cpu_ranks.h"
#include "tests/cpp/cpu_reference.h"

namespace smfree::cpu::test {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

GroupConfig Config(int32_t num_ranks, int32_t ranks_per_node = 0) {
  GroupConfig config = SmallConfig(num_ranks);
  config.ranks_per_node = ranks_per_node;
  config.hierarchical = ranks_per_node > 0;
  config.row_bytes = 24 * 4;
  config.max_tokens = 40;
  config.timeout_s = 20;
  return config;
}

void CheckAllSucceeded(const std::vector<int>& statuses) {
  for (const int status : statuses) CHECK_EQ(status, 0);
}

// Rows as long as they may be, or shorter ones that are quantised.
RowFormat Format(const GroupConfig& config, unsigned seed) {
  if (seed % 2 == 0) return LongestRows(config);
  RowFormat format;
  format.quantisation = {DType::kE4M3, /*block=*/32, /*power_of_two=*/false};
  format.Add(DType::kBF16, 2, 32);
  format.Add(DType::kE5M2, 1, 3);
  return format;
}

// The same in every process.
World MakeWorld(const GroupConfig& config, unsigned seed) {
  std::mt19937 random(seed);
  World world;
  for (int32_t rank = 0; rank < config.num_ranks; ++rank) {
    world.emplace_back(config, config.max_tokens, Format(config, seed));
    FillInputs(config, world.back(), Routing(seed % 5), random, rank);
  }
  return world;
}

// Dispatch and combine on all local ranks, all values checked.
void RoundTrip(Member& member, unsigned seed) {
  const GroupConfig& config = member.group->config();
  World got = MakeWorld(config, seed);
  World want = got;
  ReferenceDispatch(config, want);
  ReferenceCombine(config, want, /*weighted=*/true);
  const std::vector<int32_t> ranks = member.LocalRanks();
  RunRanks(static_cast<int32_t>(ranks.size()), [&](int32_t index) {
    const int32_t rank = ranks[index];
    Arrays& a = got[rank];
    Group& group = *member.group;
    const Identity first = MakeIdentity(2 * seed), second = MakeIdentity(2 * seed + 1);
    CHECK_OK(Send(group, rank, first, a));
    CHECK_OK(Await([&](Done d) { Receive(group, rank, first, a, std::move(d)); }));
    CHECK(a.dx == want[rank].dx && a.rows == want[rank].rows && a.weights == want[rank].weights);
    CHECK_OK(SendBack(group, rank, second, a, a.weights.data(), a.weights.data()));
    CHECK_OK(Await([&](Done d) { ReceiveBack(group, rank, second, a, true, std::move(d)); }));
    CHECK(a.slots == want[rank].slots);
    for (int64_t i = 0; i < a.out[0].size(); ++i) CHECK_EQ(a.out[0][i], want[rank].out[0][i]);
  });
}

Status ReceiveFirst(Member& member, int32_t rank, int64_t number) {
  Arrays a(member.group->config(), 40);
  return Await(
      [&](Done d) { Receive(*member.group, rank, MakeIdentity(number), a, std::move(d)); });
}

void Exchange(const std::vector<std::vector<int32_t>>& processes_of_ranks,
              int32_t ranks_per_node = 0) {
  for (const std::vector<int32_t>& process_of_rank : processes_of_ranks) {
    for (const bool chaotic : {false, true}) {
      CheckAllSucceeded(RunProcesses(process_of_rank, [&](Member& member) {
        const auto num_ranks = static_cast<int32_t>(process_of_rank.size());
        CHECK_OK(member.Join(Config(num_ranks, ranks_per_node)));
        if (chaotic) member.group->SetChaos(Chaos{7, 500, true, 0.01, 2});
        const unsigned steps = kSanitized ? 20 : 100;
        for (unsigned seed = 0; seed < steps; ++seed) RoundTrip(member, seed);
        CHECK_OK(member.group->Check());
        // Every block came back over the socket and was used again.
        CHECK(WaitFor([&] { return member.group->stats().arena_bytes_in_use == 0; }));
        CHECK(member.group->memory_bytes() <= 4 << 20);
        member.group->Close();
      }));
    }
  }
}

TEST(ExchangeAmongProcesses) { Exchange({{0, 1}, {0, 0, 1, 1}, {0, 1, 0, 1}, {0, 1, 1, 2}}); }

// Nodes are processes, parts of them, or made of several.
TEST(ExchangeAmongNodes) {
  Exchange({{0, 0, 1, 1}, {0, 1, 0, 1}, {0, 1, 1, 2}, {0, 0, 0, 0, 1, 1, 2, 2}}, 2);
}

TEST(ManyLargeOperationsInFlightGrowTheArena) {
  CheckAllSucceeded(RunProcesses({0, 1}, [](Member& member) {
    // Rows of 1 MiB, lanes of 80 MiB each: more than one segment.
    constexpr int64_t kHidden = kSanitized ? 1 << 12 : 1 << 18;
    constexpr int32_t kLanes = 4;
    GroupConfig config = Config(2);
    config.row_bytes = kHidden * 4;
    config.num_lanes = kLanes;
    config.recv_capacity = 80;
    config.timeout_s = 60;
    CHECK_OK(member.Join(config));
    Arrays a(config, 40);
    for (int64_t t = 0; t < 40; ++t) {
      a.topk_idx[t * 2] = 0;
      a.topk_idx[t * 2 + 1] = 2;
    }
    for (int32_t lane = 0; lane < kLanes; ++lane) {
      for (int64_t t = 0; t < 40; ++t) {
        a.x[0].Set(t * kHidden, static_cast<float>(1000 * lane + 100 * member.process + t));
      }
      CHECK_OK(Send(*member.group, member.process, MakeIdentity(0, lane), a));
    }
    for (int32_t lane = 0; lane < kLanes; ++lane) {
      CHECK_OK(Await([&](Done d) {
        Receive(*member.group, member.process, MakeIdentity(0, lane), a, std::move(d));
      }));
      for (int64_t n = 0; n < 80; ++n) {
        CHECK_EQ(a.dx[0][n * kHidden], static_cast<float>(1000 * lane + (n < 40 ? n : 60 + n)));
      }
    }
    CHECK(kSanitized || member.group->memory_bytes() > 256 << 20);
    member.group->Close();
    CHECK_EQ(member.group->memory_bytes(), 0);
  }));
}

// Kills process 1 of {0, 0, 1, 2}.
void KillOne(const GroupConfig& config) {
  const auto statuses = RunProcesses({0, 0, 1, 2}, [&](Member& member) {
    CHECK_OK(member.Join(config));
    RoundTrip(member, 0);
    member.Reach(member.shared.reached[0]);
    if (member.process == 1) {
      Arrays a(config, 40);
      std::fill(a.topk_idx.begin(), a.topk_idx.end(), -1);
      CHECK_OK(Send(*member.group, 2, MakeIdentity(5, 1), a));
      kill(getpid(), SIGKILL);
    }
    const auto start = steady_clock::now();
    for (const int32_t rank : member.LocalRanks()) {
      CheckFault(ReceiveFirst(member, rank, 9), FaultKind::kPeerDied,
                 {"rank(s) 2 (process 1) died"});
    }
    CHECK(steady_clock::now() - start < milliseconds(5000));
    CheckFault(member.group->Check(), FaultKind::kPeerDied, {"rank(s) 2 (process 1) died"});
    member.group->Close();
  });
  CHECK_EQ(statuses[0], 0);
  CHECK(WIFSIGNALED(statuses[1]) && WTERMSIG(statuses[1]) == SIGKILL);
  CHECK_EQ(statuses[2], 0);
}

TEST(AKilledProcessIsNamedAtOnce) { KillOne(Config(4)); }
TEST(AKilledProcessIsNamedAtOnceInNodes) { KillOne(Config(4, 2)); }

TEST(APeerThatClosesIsNamed) {
  CheckAllSucceeded(RunProcesses({0, 1}, [](Member& member) {
    CHECK_OK(member.Join(Config(2)));
    RoundTrip(member, 0);
    if (member.process == 1) return member.group->Close();
    CheckFault(ReceiveFirst(member, 0, 9), FaultKind::kPeerClosed,
               {"rank(s) 1 (process 1) closed its group", "rank 0 in dispatch_recv"});
  }));
}

// What was sent before closing is still received, however late; and a process that just exits says
// goodbye as well.
TEST(ClosingLosesNothing) {
  for (const auto& [chaotic, nodes] : {std::pair{false, false}, {true, false}, {true, true}}) {
    const std::vector<int32_t> process_of_rank =
        nodes ? std::vector<int32_t>{0, 0, 1, 1} : std::vector<int32_t>{0, 1};
    CheckAllSucceeded(RunProcesses(process_of_rank, [&](Member& member) {
      CHECK_OK(member.Join(nodes ? Config(4, 2) : Config(2)));
      if (chaotic) member.group->SetChaos(Chaos{1, 50'000, true, 0, 0});
      if (member.process == 1) std::this_thread::sleep_for(milliseconds(100));
      RoundTrip(member, 1);
      CHECK_OK(member.group->Check());
      if (member.process == 1) member.group->Close();
    }));
  }
}

TEST(AFaultIsToldToOtherProcesses) {
  CheckAllSucceeded(RunProcesses({0, 1}, [](Member& member) {
    CHECK_OK(member.Join(Config(2)));
    const std::string words = "rank 1 in dispatch_send";
    if (member.process == 1) {
      Arrays a(Config(2), 40);
      std::fill(a.topk_idx.begin(), a.topk_idx.end(), 3);
      CheckFault(Send(*member.group, 1, MakeIdentity(0), a), FaultKind::kInvalidRouting, {words});
    } else {
      CheckFault(ReceiveFirst(member, 0, 0), FaultKind::kInvalidRouting,
                 {words, "row 0 names expert 3 twice", "rank 0 in dispatch_recv"});
    }
    member.Reach(member.shared.reached[0]);
    member.group->Close();
  }));
}

TEST(AReceiveThatIsPendingAtExitIsEnded) {
  const auto start = steady_clock::now();
  CheckAllSucceeded(RunProcesses({0, 1}, [](Member& member) {
    CHECK_OK(member.Join(Config(2)));
    static Arrays a(Config(2), 40);
    static Shared& shared = member.shared;
    Receive(*member.group, member.process, MakeIdentity(0), a, [](Status status) {
      if (!status.ok()) ++shared.reached[1];
    });
    member.Reach(shared.reached[0]);
    if (member.process == 0) return;  // exits; its receive is ended then
    CHECK(WaitFor([] { return shared.reached[1] == 2; }));
  }));
  CHECK(steady_clock::now() - start < milliseconds(10'000));
}

TEST(AnotherGroupIsRefused) {
  CheckAllSucceeded(RunProcesses({0, 1}, [](Member& member) {
    GroupConfig config = Config(2);
    config.timeout_s = 2;
    CheckFault(member.Join(config, "secret", 7 + member.process), FaultKind::kInvalidArgument,
               {"has made another group: the group's id is",
                member.process == 0 ? "7 here" : "8 here"});
  }));
}

TEST(AnotherJobIsRefused) {
  CheckAllSucceeded(RunProcesses({0, 1}, [](Member& member) {
    GroupConfig config = Config(2);
    config.timeout_s = 0.3;
    const Status status = member.Join(config, member.process == 0 ? "mine" : "yours");
    CHECK(!status.ok());
    if (member.process == 0) {
      CheckFault(status, FaultKind::kDeadline, {"process(es) 1 did not connect in time"});
    }
    member.Reach(member.shared.reached[0]);
  }));
}

// A connection to `address` by a process of this user that does not belong to the group.
int ConnectAsStranger(const std::string& address) {
  const int fd = socket(AF_UNIX, SOCK_SEQPACKET, 0);
  sockaddr_un name{};
  name.sun_family = AF_UNIX;
  std::memcpy(name.sun_path + 1, address.data(), address.size());
  const size_t size = offsetof(sockaddr_un, sun_path) + 1 + address.size();
  CHECK_EQ(connect(fd, reinterpret_cast<sockaddr*>(&name), static_cast<socklen_t>(size)), 0);
  return fd;
}

// It says nothing, or not what it should, or leaves.
TEST(AStrangerHoldsNobodyUp) {
  CheckAllSucceeded(RunProcesses({0, 1, 2}, [](Member& member) {
    const auto start = steady_clock::now();
    std::vector<int> strangers;
    CHECK_OK(member.Join(Config(3), "secret", 1, [&] {
      const std::string lowest = member.shared.address[0];
      for (int i = 0; i < 20; ++i) strangers.push_back(ConnectAsStranger(lowest));
      CHECK_EQ(write(strangers[0], "who is there?", 13), 13);
      close(strangers.back());
      strangers.pop_back();
      member.Reach(member.shared.reached[0]);
    }));
    CHECK(steady_clock::now() - start < milliseconds(8'000));
    for (const int fd : strangers) close(fd);
    RoundTrip(member, 0);
    member.Reach(member.shared.reached[1]);
    member.group->Close();
  }));
}

// As if the program had opened as many files as it may. The lowest free number counts.
void UseUpDescriptors() {
  const int lowest = dup(0);
  close(lowest);
  rlimit limit{};
  CHECK_EQ(getrlimit(RLIMIT_NOFILE, &limit), 0);
  limit.rlim_cur = static_cast<rlim_t>(lowest);
  CHECK_EQ(setrlimit(RLIMIT_NOFILE, &limit), 0);
}

TEST(NoDescriptorForAnotherProcess) {
  if (kSanitized) return;  // UBSan looks at objects through a pipe, for which no descriptor is left
  CheckAllSucceeded(RunProcesses({0, 1}, [](Member& member) {
    GroupConfig config = Config(2);
    config.timeout_s = 2;
    const Status status = member.Join(config, "secret", 1, [&] {
      if (member.process == 0) UseUpDescriptors();
    });
    if (member.process == 0) {
      CheckFault(status, FaultKind::kSystem,
                 {"accepting a connection", "Too many open files", "ulimit -n"});
    }
    member.Reach(member.shared.reached[0]);
  }));
}

// Process 1 can take no memory of process 0, or has none for its own rows.
TEST(NoDescriptorForMemory) {
  if (kSanitized) return;  // UBSan looks at objects through a pipe, for which no descriptor is left
  for (const bool own : {false, true}) {
    CheckAllSucceeded(RunProcesses({0, 1}, [&](Member& member) {
      CHECK_OK(member.Join(Config(2)));
      if (member.process == 1) UseUpDescriptors();
      member.Reach(member.shared.reached[0]);
      Arrays a(Config(2), 40);
      std::fill(a.topk_idx.begin(), a.topk_idx.end(), -1);
      const char* const what = own ? "memfd of 256 MiB" : "receiving the memory of a peer process";
      if (member.process == (own ? 1 : 0)) {
        const Status status = Send(*member.group, member.process, MakeIdentity(0), a);
        if (own) CheckFault(status, FaultKind::kSystem, {what, "ulimit -n"});
      }
      CHECK(WaitFor([&] { return !member.group->Fault().ok(); }));
      CheckFault(member.group->Check(), FaultKind::kSystem,
                 {"rank(s) 1 (process 1)", what, "Too many open files", "ulimit -n"});
      member.Reach(member.shared.reached[1]);
      member.group->Close();
    }));
  }
}

TEST(AnUnreachableProcessIsNamed) {
  CheckAllSucceeded(RunProcesses({0, 1}, [](Member& member) {
    if (member.process == 0) return;
    auto group = Group::Create(1, 0, Config(2), {0, 1}, 1, "");
    CheckFault(group.value()->Connect({"smfree-nobody", group.value()->address()}),
               FaultKind::kSystem, {"process 0 cannot be reached at 'smfree-nobody'"});
    Arrays a(Config(2), 40);
    CheckFault(Send(*group.value(), 1, MakeIdentity(0), a), FaultKind::kClosed, {"not connected"});
  }));
}

}  // namespace
}  // namespace smfree::cpu::test

TEST_MAIN()
