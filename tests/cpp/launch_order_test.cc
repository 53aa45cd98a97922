// SPDX-License-Identifier: Apache-2.0
#include "csrc/cuda/host/launch_order.h"

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

#include "tests/cpp/check.h"

using smfree::kNode;
using smfree::kWire;
using smfree::cuda::LaunchOrder;
using std::chrono::milliseconds;
using std::chrono::seconds;

TEST(ARecvIsLaunchedAfterAllSends) {
  constexpr int32_t kRanks = 4, kOperations = 200;
  LaunchOrder order(kRanks);
  std::atomic<int64_t> sent[kRanks] = {};
  std::atomic<int> early{0}, gave_up{0};
  std::vector<std::thread> threads;
  for (int32_t rank = 0; rank < kRanks; ++rank) {
    threads.emplace_back([&, rank] {
      for (int64_t operation = 1; operation <= kOperations; ++operation) {
        ++sent[rank];
        order.NoteSend(rank, kWire);
        if (!order.AwaitSends(rank, kWire, seconds(60))) ++gave_up;
        for (const auto& count : sent) early += count < sent[rank];
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK_EQ(early.load(), 0);
  CHECK_EQ(gave_up.load(), 0);
}

TEST(OneVainWaitIsTheLast) {
  LaunchOrder order(2);
  order.NoteSend(0, kWire);
  CHECK(!order.AwaitSends(0, kWire, milliseconds(20)));
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < 100; ++i) {
    order.NoteSend(0, kWire);
    CHECK(order.AwaitSends(0, kWire, seconds(60)));
  }
  CHECK(std::chrono::steady_clock::now() - begin < seconds(30));
}

TEST(AFaultEndsTheWaits) {
  LaunchOrder order(2);
  order.NoteSend(0, kWire);
  std::thread fault([&] { order.SwitchOff(); });
  CHECK(order.AwaitSends(0, kWire, seconds(60)));
  fault.join();
}

TEST(ARecvIsLaunchedAfterItsOwnPuts) {
  constexpr int32_t kMessages = 3, kOperations = 200;
  LaunchOrder order(1);
  std::atomic<int64_t> sends{0}, puts{0};
  std::thread mover([&] {
    for (int64_t operation = 1; operation <= kOperations; ++operation) {
      while (sends < operation) std::this_thread::yield();
      for (int32_t message = 0; message < kMessages; ++message) {
        ++puts;
        order.NotePut(0);
      }
    }
  });
  int early = 0, gave_up = 0;
  for (int64_t operation = 1; operation <= kOperations; ++operation) {
    order.NoteSend(0, kWire);
    ++sends;
    gave_up += !order.AwaitPuts(0, kMessages, seconds(60));
    early += puts < operation * kMessages;
  }
  mover.join();
  CHECK_EQ(early, 0);
  CHECK_EQ(gave_up, 0);
  CHECK(order.AwaitPuts(0, 0, seconds(0)));
}

TEST(LegsDoNotWaitForOneAnother) {
  LaunchOrder order(2);
  order.NoteSend(0, kNode);  // rank 1 is late on that leg
  for (int32_t rank : {0, 1}) order.NoteSend(rank, kWire);
  CHECK(order.AwaitSends(0, kWire, seconds(60)));
  CHECK(!order.AwaitSends(0, kNode, milliseconds(20)));
}

TEST_MAIN()
