// SPDX-License-Identifier: Apache-2.0
//
// What goes wrong among the ranks of one process: each fault by its kind and the names in its text,
// on the rank that found it and on the others; and the threads that receives complete on.
#include <sys/resource.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "csrc/protocol/describe.h"
#include "tests/cpp/check.h"
#include "tests/cpp/cpu_ranks.h"

namespace smfree::cpu::test {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

GroupConfig Config(int32_t num_ranks) {
  GroupConfig config;
  config.num_ranks = num_ranks;
  config.num_experts = num_ranks * 2;
  config.top_k = 2;
  config.num_lanes = 2;
  config.hidden = 8;
  config.max_tokens = 10;
  config.timeout_s = 30;
  return config;
}

// A group with one set of arrays per rank.
struct Setup {
  explicit Setup(const GroupConfig& config, int64_t tokens = 10)
      : id(++last_id), group(MakeLocalGroup(config, id)) {
    std::mt19937 random(1);
    for (int32_t rank = 0; rank < config.num_ranks; ++rank) {
      arrays.emplace_back(config, tokens);
      FillInputs(config, arrays.back(), Routing::kUniform, random, rank);
    }
  }
  ~Setup() { group->Close(); }

  Status SendOn(int32_t rank, const Identity& identity) {
    return Send(*group, rank, identity, arrays[rank]);
  }
  std::future<Status> ReceiveOn(int32_t rank, const Identity& identity) {
    auto promise = std::make_shared<std::promise<Status>>();
    std::future<Status> future = promise->get_future();
    Receive(*group, rank, identity, arrays[rank],
            [promise](Status status) { promise->set_value(std::move(status)); });
    return future;
  }

  static inline int64_t last_id = 0;
  const int64_t id;
  std::shared_ptr<Group> group;
  std::vector<Arrays> arrays;
};

Identity At(int64_t number, uint32_t call_site, int32_t lane = 0) {
  Identity identity = MakeIdentity(number, lane);
  identity.call_site = call_site;
  return identity;
}

TEST(TwoInFlightOnOneLane) {
  RegisterCallSite(1, "model.py:31 in moe");
  RegisterCallSite(2, "model.py:44 in moe");
  Setup setup(Config(2));
  CHECK_OK(setup.SendOn(1, At(7, 1)));
  auto waiting = setup.ReceiveOn(1, At(7, 1));
  CHECK_OK(setup.SendOn(0, At(7, 1, 1)));  // another lane is fine
  CHECK_OK(setup.SendOn(0, At(6, 1)));
  const std::vector<std::string> words = {"two operations in flight on one lane",
                                          "rank 0 in dispatch_send (model.py:44 in moe; lane 0, "
                                          "forward, number 8)",
                                          "dispatch number 6 (model.py:31 in moe"};
  // The message of number 6 reached rank 1, which waits for 7: whichever is found first.
  CHECK(!setup.SendOn(0, At(8, 2)).ok());
  CHECK_EQ(waiting.get().kind(), FaultKind::kScheduleMismatch);

  Setup other(Config(2));
  CHECK_OK(other.SendOn(0, At(6, 1)));
  CheckFault(other.SendOn(0, At(8, 2)), FaultKind::kTwoInFlight, words);
  CheckFault(other.ReceiveOn(0, At(6, 1)).get(), FaultKind::kTwoInFlight, words);
  CheckFault(other.group->Check(), FaultKind::kTwoInFlight, words);
  CheckFault(other.group->Check(), FaultKind::kTwoInFlight, words);  // stays
}

TEST(ReplaysMayBeInFlightTogetherButNotTheSameTwice) {
  Setup setup(Config(1));
  CHECK_OK(setup.SendOn(0, MakeIdentity(1, 0, 3)));
  CHECK_OK(setup.SendOn(0, MakeIdentity(2, 0, 3)));
  CHECK_EQ(setup.SendOn(0, MakeIdentity(1, 0, 3)).kind(), FaultKind::kTwoInFlight);
}

TEST(ScheduleMismatchNamesBothSides) {
  RegisterCallSite(1, "model.py:31 in moe");
  RegisterCallSite(2, "other.py:5 in main");
  Setup setup(Config(2));
  CHECK_OK(setup.SendOn(0, At(3, 1)));
  CHECK_OK(setup.SendOn(1, At(3, 2)));
  const std::vector<std::string> words = {
      "schedule mismatch: rank 1 in dispatch_recv (other.py:5 in main; lane 0, forward, number 3)",
      "expected dispatch number 3 (other.py:5 in main",
      "got dispatch number 3 (model.py:31 in moe; lane 0, forward) from rank 0"};
  CheckFault(setup.ReceiveOn(1, At(3, 2)).get(), FaultKind::kScheduleMismatch, words);
  CheckFault(setup.ReceiveOn(0, At(3, 1)).get(), FaultKind::kScheduleMismatch, words);
}

// The same line of the program compiled twice: in two branches, say.
TEST(AnotherInstanceOfTheSameCall) {
  Setup setup(Config(2));
  setup.arrays[1] = Arrays(Config(2), 9);
  std::mt19937 random(2);
  FillInputs(Config(2), setup.arrays[1], Routing::kUniform, random, 1);
  Identity here = MakeIdentity(0), there = MakeIdentity(0);
  here.instance = 4;
  there.instance = 5;
  auto waiting = setup.ReceiveOn(0, here);
  CHECK_OK(setup.SendOn(1, there));
  CheckFault(waiting.get(), FaultKind::kScheduleMismatch,
             {"another call of that line", "of 9 rows per rank instead of 10"});
}

TEST(OtherShapesAreAScheduleMismatch) {
  Setup setup(Config(2));
  setup.arrays[1] = Arrays(Config(2), 9);
  std::mt19937 random(2);
  FillInputs(Config(2), setup.arrays[1], Routing::kUniform, random, 1);
  auto waiting = setup.ReceiveOn(0, MakeIdentity(0));
  CHECK_OK(setup.SendOn(1, MakeIdentity(0)));
  CheckFault(waiting.get(), FaultKind::kScheduleMismatch,
             {"expected an operation of 10 rows per rank and got one of 9 from rank 1"});
}

TEST(AHandleOfAnotherDispatch) {
  Setup setup(Config(2));
  RunRanks(2, [&](int32_t rank) {
    CHECK_OK(setup.SendOn(rank, MakeIdentity(0)));
    CHECK_OK(setup.ReceiveOn(rank, MakeIdentity(0)).get());
    Arrays& a = setup.arrays[rank];
    CHECK_OK(SendBack(*setup.group, rank, MakeIdentity(1), a, nullptr, nullptr));
  });
  Arrays& a = setup.arrays[0];
  a.places.assign(a.places.size(), -1);  // consistent, but not what was sent
  a.send_counts.assign(a.send_counts.size(), 0);
  CheckFault(
      Await([&](Done d) { ReceiveBack(*setup.group, 0, MakeIdentity(1), a, false, std::move(d)); }),
      FaultKind::kScheduleMismatch, {"rank 0 in combine_recv", "expected 0 rows by its handle"});
}

TEST(BrokenHandlesAreRefused) {
  const auto broken = [](void (*spoil)(Arrays&), const char* words) {
    Setup setup(Config(1));
    Arrays& a = setup.arrays[0];
    CHECK_OK(setup.SendOn(0, MakeIdentity(0)));
    CHECK_OK(setup.ReceiveOn(0, MakeIdentity(0)).get());
    spoil(a);
    Status status = SendBack(*setup.group, 0, MakeIdentity(1), a, nullptr, nullptr);
    if (status.ok()) {
      status = Await(
          [&](Done d) { ReceiveBack(*setup.group, 0, MakeIdentity(1), a, false, std::move(d)); });
    }
    CheckFault(status, FaultKind::kInvalidArgument, {words, "rank 0 in combine_"});
  };
  broken([](Arrays& a) { a.rows[3] = 1000; }, "at 1000 of 20");
  broken([](Arrays& a) { a.rows[3] = -2; }, "at -2 of 20");
  broken([](Arrays& a) { a.recv_counts[0] = 11; }, "receives 11 rows from rank 0 of at most 10");
  broken([](Arrays& a) { a.places[4] = 5; }, "row 4 has place 5");
  broken([](Arrays& a) { a.places[4] = 1 << 30; }, "row 4 has place");
  broken([](Arrays& a) { a.send_counts[0] = 3; }, "10 rows to rank 0 by its places and 3");
}

TEST(InvalidRoutingNamesTheRow) {
  const auto refused = [](int32_t first, int32_t second, const char* words) {
    Setup setup(Config(2));
    auto waiting = setup.ReceiveOn(0, MakeIdentity(0));
    setup.arrays[1].topk_idx[6] = first;
    setup.arrays[1].topk_idx[7] = second;
    CheckFault(setup.SendOn(1, MakeIdentity(0)), FaultKind::kInvalidRouting,
               {"rank 1 in dispatch_send", words});
    CheckFault(waiting.get(), FaultKind::kInvalidRouting, {"rank 0 in dispatch_recv", words});
  };
  refused(2, 2, "row 3 names expert 2 twice: topk_idx = [2, 2]");
  refused(1, 4, "row 3 names expert 4 of 4: topk_idx = [1, 4]");
  refused(-2, 0, "row 3 names expert -2 of 4: topk_idx = [-2, 0]");
}

TEST(InvalidCalls) {
  const auto refused = [](int32_t rank, int32_t lane, int64_t tokens, const char* words) {
    Setup setup(Config(2), tokens);
    Arrays& a = setup.arrays[0];
    CheckFault(Send(*setup.group, rank, MakeIdentity(0, lane), a), FaultKind::kInvalidArgument,
               {words});
  };
  refused(2, 0, 10, "has no rank 2 of 2");
  refused(0, 2, 10, "got lane 2, the group has 2");
  refused(0, 0, 11, "got 11 rows, the group's max_tokens is 10");
  GroupConfig config = Config(2);
  config.num_experts = 3;
  CHECK(MakeLocalGroup(config, 99) == nullptr);
}

TEST(DeadlineNamesWhoWaitsForWhom) {
  RegisterCallSite(1, "model.py:31 in moe");
  GroupConfig config = Config(3);
  config.timeout_s = 0.2;
  Setup setup(config);
  RunRanks(3, [&](int32_t rank) {
    CHECK_OK(setup.SendOn(rank, At(11, 1)));
    CHECK_OK(setup.ReceiveOn(rank, At(11, 1)).get());
  });
  CHECK_OK(setup.SendOn(2, At(4, 1, 1)));  // rank 2 does something else
  const auto start = steady_clock::now();
  std::vector<std::future<Status>> waiting;
  for (int32_t rank = 0; rank < 2; ++rank) {
    CHECK_OK(setup.SendOn(rank, At(12, 1)));
    waiting.push_back(setup.ReceiveOn(rank, At(12, 1)));
  }
  const std::vector<std::string> words = {
      "waited 0.2 s in dispatch_recv (model.py:31 in moe; lane 0, forward, number 12) for rank 2: "
      "nothing arrived; last from rank 2: dispatch number 4 (model.py:31 in moe; lane 1, forward)",
      "unread from it: dispatch number 4", "timeout_s"};
  for (auto& status : waiting) CheckFault(status.get(), FaultKind::kDeadline, words);
  CHECK(steady_clock::now() - start < milliseconds(2000));
  CheckFault(setup.SendOn(2, At(12, 1)), FaultKind::kDeadline, words);
}

TEST(CloseEndsWaitingReceivesAndRefusesMore) {
  Setup setup(Config(2));
  CHECK(FindGroup(setup.id, 0) == setup.group);
  CHECK(FindGroup(setup.id, 1) == nullptr);
  CHECK(MakeLocalGroup(Config(2), setup.id) == nullptr);  // the name is taken
  auto waiting = setup.ReceiveOn(0, MakeIdentity(0));
  CHECK_EQ(setup.group->stats().pending_receives, 1);
  setup.group->Close();
  CheckFault(waiting.get(), FaultKind::kClosed, {"rank 0 in dispatch_recv", "closed"});
  CheckFault(setup.SendOn(0, MakeIdentity(0)), FaultKind::kClosed, {"closed"});
  CheckFault(setup.ReceiveOn(0, MakeIdentity(0)).get(), FaultKind::kClosed, {"closed"});
  CHECK(FindGroup(setup.id, 0) == nullptr);
  CHECK_EQ(setup.group->memory_bytes(), 0);
  setup.group->Close();
}

TEST(CloseReleasesMemoryOfUnreadMessages) {
  Setup setup(Config(2));
  CHECK_OK(setup.SendOn(0, MakeIdentity(0)));
  CHECK_EQ(setup.group->stats().messages_in_flight, 2);
  CHECK(setup.group->memory_bytes() > 0);
  setup.group->Close();
  CHECK_EQ(setup.group->memory_bytes(), 0);
}

TEST(ReceivesCompleteInlineIfAllIsThere) {
  Setup setup(Config(1));
  CHECK_OK(setup.SendOn(0, MakeIdentity(0)));
  std::thread::id thread;
  Receive(*setup.group, 0, MakeIdentity(0), setup.arrays[0],
          [&](Status) { thread = std::this_thread::get_id(); });
  CHECK(thread == std::this_thread::get_id());
}

// A program that XLA resumes in a Done may block until other receives complete, with chaos even
// those that the mover delivers: no Done may wait for a thread that is busy.
TEST(ReceivesThatBlockDoNotHoldUpOthers) {
  for (const bool chaotic : {false, true}) {
    constexpr int32_t kRanks = 12;
    Setup setup(Config(kRanks));
    if (chaotic) setup.group->SetChaos(Chaos{1, 2000, true, 0, 0});
    std::mutex mutex;
    std::condition_variable changed;
    int32_t completed = 0;
    std::atomic<int32_t> left{0};
    for (int32_t rank = 0; rank < kRanks; ++rank) {
      Receive(*setup.group, rank, MakeIdentity(0), setup.arrays[rank], [&](Status status) {
        CHECK_OK(status);
        std::unique_lock<std::mutex> lock(mutex);
        ++completed;
        changed.notify_all();
        changed.wait(lock, [&] { return completed == kRanks; });
        ++left;
        changed.notify_all();
      });
    }
    for (int32_t rank = 0; rank < kRanks; ++rank) CHECK_OK(setup.SendOn(rank, MakeIdentity(0)));
    std::unique_lock<std::mutex> lock(mutex);
    CHECK(changed.wait_for(lock, milliseconds(10000), [&] { return left == kRanks; }));
  }
}

TEST(WaitingCostsNoProcessorTime) {
  Setup setup(Config(2));
  auto waiting = setup.ReceiveOn(0, MakeIdentity(0));
  const auto processor_ms = [] {
    rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
    return (usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) * 1000 +
           (usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1000;
  };
  std::this_thread::sleep_for(milliseconds(50));
  const long before = processor_ms();
  std::this_thread::sleep_for(milliseconds(500));
  CHECK(processor_ms() - before < 25);
  setup.group->Close();
  CHECK_EQ(waiting.get().kind(), FaultKind::kClosed);
}

}  // namespace
}  // namespace smfree::cpu::test

TEST_MAIN()
