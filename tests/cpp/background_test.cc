// SPDX-License-Identifier: Apache-2.0
#include "csrc/cuda/host/background.h"

#include <atomic>
#include <chrono>
#include <memory>
#include <thread>

#include "tests/cpp/check.h"

using smfree::cuda::Background;
using smfree::cuda::ResultWithin;
using std::chrono::milliseconds;
using std::chrono::seconds;

TEST(WorkThatEndsIsWaitedFor) {
  std::atomic<bool> done{false};
  const Background work([&] {
    std::this_thread::sleep_for(milliseconds(20));
    done = true;
  });
  CHECK(work.EndsWithin(seconds(60)));
  CHECK(done.load() && work.Ended());
}

TEST(WorkThatDoesNotEndIsLeft) {
  const auto go_on = std::make_shared<std::atomic<bool>>(false);
  const auto ended = std::make_shared<std::atomic<bool>>(false);
  {
    const Background work([go_on, ended] {
      while (!*go_on) std::this_thread::sleep_for(milliseconds(1));
      *ended = true;
    });
    CHECK(!work.EndsWithin(milliseconds(20)));
    CHECK(!work.Ended());
  }
  *go_on = true;  // it is still there
  const auto deadline = std::chrono::steady_clock::now() + seconds(60);
  while (!*ended && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
  CHECK(ended->load());
}

TEST(WhatWorkOwnsIsGoneWhenItHasEnded) {
  auto owned = std::make_shared<int>(0);
  const std::weak_ptr<int> seen = owned;
  const Background work(
      [owned = std::move(owned)] { std::this_thread::sleep_for(milliseconds(5)); });
  CHECK(work.EndsWithin(seconds(60)));
  CHECK(seen.expired());
}

TEST(AResultComesInTimeOrNotAtAll) {
  CHECK_EQ(ResultWithin(seconds(60), [] { return 7; }).value(), 7);
  const auto go_on = std::make_shared<std::atomic<bool>>(false);
  const auto late = ResultWithin(milliseconds(20), [go_on] {
    while (!*go_on) std::this_thread::sleep_for(milliseconds(1));
    return 7;
  });
  CHECK(!late.has_value());
  *go_on = true;
}

TEST_MAIN()
