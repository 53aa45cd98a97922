// SPDX-License-Identifier: Apache-2.0
//
// What goes wrong among the ranks of one process: each fault by its kind and the names in its text,
// on the rank that found it and on the others.
#include <chrono>
#include <future>
#include <random>
#include <string>
#include <vector>

#include "csrc/core/describe.h"
#include "tests/cpp/check.h"
#include "tests/cpp/cpu_ranks.h"

namespace smfree::cpu::test {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

Identity At(int64_t number, uint32_t call_site, int32_t lane = 0) {
  Identity identity = MakeIdentity(number, lane);
  identity.call_site = call_site;
  return identity;
}

TEST(TwoInFlightOnOneLane) {
  RegisterCallSite(1, "model.py:31 in moe");
  RegisterCallSite(2, "model.py:44 in moe");
  Setup setup(SmallConfig(2));
  CHECK_OK(setup.SendOn(0, At(6, 1)));
  CHECK_OK(setup.SendOn(0, At(6, 2, 1)));  // another lane is fine
  Identity elsewhere = At(6, 2);
  elsewhere.sequence = 5;
  CHECK_OK(setup.SendOn(0, elsewhere));  // and so is another token
  const std::vector<std::string> words = {"two operations in flight on one lane",
                                          "rank 0 in dispatch_send (model.py:44 in moe; lane 0, "
                                          "forward, number 6)",
                                          "dispatch number 6 (model.py:31 in moe"};
  CheckFault(setup.SendOn(0, At(6, 2)), FaultKind::kTwoInFlight, words);
  CheckFault(setup.ReceiveOn(0, At(6, 1)).get(), FaultKind::kTwoInFlight, words);
  CheckFault(setup.group->Check(), FaultKind::kTwoInFlight, words);
  CheckFault(setup.group->Check(), FaultKind::kTwoInFlight, words);  // stays
}

TEST(TheSameOperationTwiceInFlight) {
  Setup setup(SmallConfig(1));
  CHECK_OK(setup.SendOn(0, At(1, 1)));
  CHECK_OK(setup.SendOn(0, At(2, 1)));
  CHECK_OK(setup.ReceiveOn(0, At(1, 1)).get());
  CHECK_OK(setup.SendOn(0, At(1, 1)));  // a loop that comes by again
  CheckFault(setup.SendOn(0, At(1, 1)), FaultKind::kTwoInFlight,
             {"two operations in flight on one lane", "number 1) begins"});
}

TEST(ScheduleMismatchNamesBothSides) {
  RegisterCallSite(1, "model.py:31 in moe");
  RegisterCallSite(2, "other.py:5 in main");
  Setup setup(SmallConfig(2));
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
  Setup setup(SmallConfig(2));
  setup.arrays[1] = Arrays(SmallConfig(2), 9);
  std::mt19937 random(2);
  FillInputs(SmallConfig(2), setup.arrays[1], Routing::kUniform, random, 1);
  Identity here = MakeIdentity(0), there = MakeIdentity(0);
  here.instance.ordinal = 4;
  there.instance.ordinal = 5;
  auto waiting = setup.ReceiveOn(0, here);
  CHECK_OK(setup.SendOn(1, there));
  CheckFault(waiting.get(), FaultKind::kScheduleMismatch,
             {"another call of that line", "of 9 rows per rank instead of 10"});
}

// Processes that have grouped the calls of their programs differently.
TEST(AnotherProgram) {
  Setup setup(SmallConfig(2));
  Identity here = MakeIdentity(0), there = MakeIdentity(0);
  here.instance = {1, 77};
  there.instance = {1, 78};
  auto waiting = setup.ReceiveOn(0, here);
  CHECK_OK(setup.SendOn(1, there));
  CheckFault(waiting.get(), FaultKind::kScheduleMismatch, {"a call of that line in another program"});
}

TEST(OtherShapesAreAScheduleMismatch) {
  Setup setup(SmallConfig(2));
  setup.arrays[1] = Arrays(SmallConfig(2), 9);
  std::mt19937 random(2);
  FillInputs(SmallConfig(2), setup.arrays[1], Routing::kUniform, random, 1);
  auto waiting = setup.ReceiveOn(0, MakeIdentity(0));
  CHECK_OK(setup.SendOn(1, MakeIdentity(0)));
  CheckFault(waiting.get(), FaultKind::kScheduleMismatch,
             {"expected an operation of 10 rows per rank and got one of 9 from rank 1"});
}

TEST(RowsOfAnotherLengthAreAScheduleMismatch) {
  for (const bool same_instance : {true, false}) {
    Setup setup(SmallConfig(2));  // rows of 32 bytes
    setup.arrays[1] = Arrays(SmallConfig(2), 10, Plain(DType::kBF16, 5));
    std::mt19937 random(2);
    FillInputs(SmallConfig(2), setup.arrays[1], Routing::kUniform, random, 1);
    Identity here = MakeIdentity(0), there = here;
    if (!same_instance) there.instance.ordinal = 5;
    auto waiting = setup.ReceiveOn(0, here);
    CHECK_OK(setup.SendOn(1, there));
    CheckFault(waiting.get(), FaultKind::kScheduleMismatch,
               same_instance
                   ? std::vector<std::string>{"expected rows of 32 bytes on the wire and got rows "
                                              "of 16 from rank 1"}
                   : std::vector<std::string>{"another call of that line",
                                              "of rows of 16 bytes on the wire instead of 32"});
  }
}

// A config of two ranks whose receivers cut rows, or do not.
GroupConfig SmallWire(bool cuts) {
  GroupConfig config = SmallConfig(2);
  config.wire_capacity = cuts ? 12 : 20;
  config.overflow = Overflow::kDrop;
  return config;
}

void HandleOfAnotherDispatch(bool cuts) {
  Setup setup(SmallWire(cuts));
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
      FaultKind::kScheduleMismatch,
      {"rank 0 in combine_recv",
       cuts ? "expected at most 0 rows by its handle" : "expected 0 rows by its handle"});
}

TEST(AHandleOfAnotherDispatch) {
  HandleOfAnotherDispatch(/*cuts=*/false);
  HandleOfAnotherDispatch(/*cuts=*/true);
}

void GradientsHandleOfAnotherDispatch(bool cuts) {
  Setup setup(SmallWire(cuts));
  const auto call = [&](int32_t rank) {
    return MakeCall(rank, MakeIdentity(1, 0, 2), setup.arrays[rank]);
  };
  RunRanks(2, [&](int32_t rank) {
    CHECK_OK(setup.SendOn(rank, MakeIdentity(0)));
    CHECK_OK(setup.ReceiveOn(rank, MakeIdentity(0)).get());
    Arrays& a = setup.arrays[rank];
    CHECK_OK(DispatchSendCached(*setup.group, call(rank),
                                {a.x.in(), nullptr, a.places.data(), a.send_counts.data()}));
  });
  Arrays& a = setup.arrays[0];
  CHECK_EQ(a.recv_counts[0] + a.recv_counts[1] == 12, cuts);
  const std::string kept = std::to_string(a.recv_counts[1]--);
  const auto recv = CachedArrays(a, a.dx, /*values=*/nullptr);
  CheckFault(
      Await([&](Done d) { DispatchRecvCached(*setup.group, call(0), recv, std::move(d)); }),
      FaultKind::kScheduleMismatch,
      {"rank 0 in dispatch_recv_cached",
       "expected " + std::to_string(a.recv_counts[1]) + " rows by its handle and got " + kept +
           " from rank 1"});
}

TEST(AReceiverWithTheHandleOfAnotherDispatch) {
  GradientsHandleOfAnotherDispatch(/*cuts=*/false);
  GradientsHandleOfAnotherDispatch(/*cuts=*/true);
}

TEST(BrokenHandlesAreRefused) {
  const auto broken = [](void (*spoil)(Arrays&), const char* words) {
    Setup setup(SmallConfig(1));
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
  broken([](Arrays& a) { a.rows[3] = 1000; }, "rank 0 is 1000, out of the range up to 19");
  broken([](Arrays& a) { a.rows[3] = -2; }, "rank 0 is -2, out of the range up to 19");
  broken([](Arrays& a) { a.recv_counts[0] = 11; }, "rank 0 is 11, out of the range up to 10");
  broken([](Arrays& a) { a.places[4] = 5; }, "row 4 has place 5");
  broken([](Arrays& a) { a.places[4] = 1 << 30; }, "row 4 has place");
  broken([](Arrays& a) { a.send_counts[0] = 3; }, "10 rows to rank 0 by its places and 3");
}

TEST(MoreReceivedRowsThanFitAreRefused) {
  Setup setup(SmallWire(/*cuts=*/true));
  Arrays& a = setup.arrays[0];
  a.rows.assign(a.rows.size(), -1);
  a.recv_counts = {10, 3};
  CheckFault(SendBack(*setup.group, 0, MakeIdentity(1), a, nullptr, nullptr),
             FaultKind::kInvalidArgument, {"rank 1 is 3, out of the range up to 2"});
}

TEST(InvalidRoutingNamesTheRow) {
  const auto refused = [](int32_t first, int32_t second, const char* words) {
    Setup setup(SmallConfig(2));
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
    Setup setup(SmallConfig(2), tokens);
    Arrays& a = setup.arrays[0];
    CheckFault(Send(*setup.group, rank, MakeIdentity(0, lane), a), FaultKind::kInvalidArgument,
               {words});
  };
  refused(2, 0, 10, "has no rank 2 of 2");
  refused(0, 2, 10, "on lane 2, expected");
  refused(0, 0, 11, "got 11 rows on lane 0, expected up to max_tokens 10");
  GroupConfig config = SmallConfig(2);
  config.num_experts = 3;
  CHECK(MakeLocalGroup(config, 99) == nullptr);
}

TEST(DeadlineNamesWhoWaitsForWhom) {
  RegisterCallSite(1, "model.py:31 in moe");
  GroupConfig config = SmallConfig(3);
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
      "in dispatch_recv (model.py:31 in moe; lane 0, forward, number 12): waited 0.2 s for rank 2: "
      "nothing arrived; last from rank 2: dispatch number 4 (model.py:31 in moe; lane 1, forward)",
      "unread from it: dispatch number 4", "which nothing here waits for (schedule mismatch)",
      "timeout_s"};
  for (auto& status : waiting) CheckFault(status.get(), FaultKind::kDeadline, words);
  CHECK(steady_clock::now() - start < milliseconds(2000));
  CheckFault(setup.SendOn(2, At(12, 1)), FaultKind::kDeadline, words);
}

}  // namespace
}  // namespace smfree::cpu::test

TEST_MAIN()
