// SPDX-License-Identifier: Apache-2.0
#include "csrc/protocol/signals.h"

#include <algorithm>
#include <thread>
#include <vector>

#include "tests/cpp/check.h"

using namespace smfree;

TEST(FreshMemoryVouchesForNothing) {
  CHECK_EQ(ChunksArrived(0, 1), 0);
  CHECK(!AllArrived(0, 1));
}

TEST(SignalGrowsWithChunksAndNumbers) {
  uint64_t last = 0;
  for (int64_t number = 1; number < 20; ++number) {
    for (int32_t chunk = 0; chunk < 5; ++chunk) {
      const uint64_t signal = SignalAfterChunk(number, chunk, 5);
      CHECK(signal > last);
      CHECK_EQ(NumberOf(signal), number);
      last = signal;
    }
  }
}

TEST(ChunksArrivedCountsThisOperationOnly) {
  for (int64_t number : {int64_t{1}, int64_t{2}, int64_t{1000}, kMaxNumber - 1}) {
    CHECK_EQ(ChunksArrived(SignalValue(number, 0), number), 0);
    CHECK_EQ(ChunksArrived(SignalValue(number, 3), number), 3);
    CHECK_EQ(ChunksArrived(SignalValue(number - 1, kAllChunks), number), 0);
    CHECK_EQ(ChunksArrived(SignalValue(number + 1, 0), number), kAllChunks);
    CHECK_EQ(ChunksArrived(SignalValue(number + 1, 7), number), kAllChunks);
  }
}

TEST(LastChunkMeansAllWhateverTheNumberOfChunks) {
  for (int32_t num_chunks = 1; num_chunks < kAllChunks; ++num_chunks) {
    for (int32_t chunk = 0; chunk < num_chunks; ++chunk) {
      const uint64_t signal = SignalAfterChunk(9, chunk, num_chunks);
      CHECK_EQ(AllArrived(signal, 9), chunk + 1 == num_chunks);
      CHECK(chunk + 1 == num_chunks || ChunksArrived(signal, 9) == chunk + 1);
    }
  }
}

TEST(LargestNumberFits) {
  const uint64_t signal = SignalValue(kMaxNumber, kAllChunks);
  CHECK_EQ(NumberOf(signal), kMaxNumber);
  CHECK(AllArrived(signal, kMaxNumber));
  CHECK(signal <= uint64_t{INT64_MAX});  // stream memory waits may compare signed
}

// The order that the whole protocol rests on, with the real functions: what was written before the
// release is there after the acquire. (ThreadSanitizer sees the pair, too.)
TEST(ReleaseAcquireOrdersTheRows) {
  constexpr int32_t kWords = 1024;
  constexpr int64_t kOperations = 2000;
  std::vector<int64_t> region[kParities] = {std::vector<int64_t>(kWords),
                                            std::vector<int64_t>(kWords)};
  uint64_t arrived[kParities] = {};
  uint64_t read_until = 0;
  std::thread sender([&] {
    for (int64_t number = 1; number <= kOperations; ++number) {
      // Stands for "received operation number - 1 from the peer": it has read number - 2.
      while (NumberOf(load_acquire_system(&read_until)) < number - kParities) {
        std::this_thread::yield();
      }
      std::fill(region[ParityOf(number)].begin(), region[ParityOf(number)].end(), number);
      store_release_system(&arrived[ParityOf(number)], SignalAfterChunk(number, 0, 1));
    }
  });
  int64_t stale = 0;
  for (int64_t number = 1; number <= kOperations; ++number) {
    while (!AllArrived(load_acquire_system(&arrived[ParityOf(number)]), number)) {
      std::this_thread::yield();
    }
    for (int64_t word : region[ParityOf(number)]) stale += word != number;
    store_release_system(&read_until, SignalValue(number, kAllChunks));
  }
  sender.join();
  CHECK_EQ(stale, 0);
}

TEST_MAIN()
