// SPDX-License-Identifier: Apache-2.0
#include "csrc/cuda/host/runs.h"

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "tests/cpp/check.h"

using smfree::cuda::Runs;

TEST(ARunThatHasBegunGoesOnAfterAFault) {
  Runs runs;
  bool failed = false;
  const auto has_failed = [&] { return failed; };
  CHECK(runs.Admit(7, has_failed));
  failed = true;
  CHECK(runs.Admit(7, has_failed));
  CHECK(!runs.Admit(8, has_failed));
  CHECK(!runs.Admit(8, has_failed));  // to every rank
  CHECK(runs.Admit(7, has_failed));
}

TEST(AllRanksGetOneAnswer) {
  constexpr int kRanks = 4;
  constexpr int64_t kRuns = 200;
  for (int64_t at_fault = 1; at_fault < kRuns; at_fault += 40) {
    Runs runs;
    std::atomic<bool> failed{false};
    std::vector<std::vector<bool>> admitted(kRanks);
    std::vector<std::thread> threads;
    for (int rank = 0; rank < kRanks; ++rank) {
      threads.emplace_back([&, rank] {
        for (int64_t run = 1; run <= kRuns; ++run) {
          if (rank == 0 && run == at_fault) failed = true;
          admitted[rank].push_back(runs.Admit(run, [&] { return failed.load(); }));
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    for (int rank = 1; rank < kRanks; ++rank) CHECK(admitted[rank] == admitted[0]);
  }
}

TEST_MAIN()
