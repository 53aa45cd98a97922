// SPDX-License-Identifier: Apache-2.0
//
// How receives wait: what ends them when the group closes, the threads they complete on, and what
// waiting costs.
#include <sys/resource.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "tests/cpp/check.h"
#include "tests/cpp/cpu_ranks.h"

namespace smfree::cpu::test {
namespace {

using std::chrono::milliseconds;

TEST(CloseEndsWaitingReceivesAndRefusesMore) {
  Setup setup(SmallConfig(2));
  CHECK(FindGroup(setup.id, 0) == setup.group);
  CHECK(FindGroup(setup.id, 1) == nullptr);
  CHECK(MakeLocalGroup(SmallConfig(2), setup.id) == nullptr);  // the name is taken
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
  Setup setup(SmallConfig(2));
  CHECK_OK(setup.SendOn(0, MakeIdentity(0)));
  CHECK_EQ(setup.group->stats().messages_in_flight, 2);
  CHECK(setup.group->memory_bytes() > 0);
  setup.group->Close();
  CHECK_EQ(setup.group->memory_bytes(), 0);
}

TEST(ReceivesCompleteInlineIfAllIsThere) {
  Setup setup(SmallConfig(1));
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
    Setup setup(SmallConfig(kRanks));
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
  Setup setup(SmallConfig(2));
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
