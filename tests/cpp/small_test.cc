// SPDX-License-Identifier: Apache-2.0
#include "csrc/cuda/host/small.h"

#include <cstdint>

#include "tests/cpp/check.h"

using namespace smfree;
using namespace smfree::cuda;

namespace {

constexpr int64_t kStride = 7168 * 2;

// A decode of DeepSeek-V3 on a node.
GroupConfig Decode(int32_t ranks) {
  GroupConfig config;
  config.num_ranks = ranks;
  config.num_experts = 256;
  config.top_k = 8;
  config.row_bytes = kStride;
  config.max_tokens = 8192;
  config.sm_push_bytes = int64_t{2} << 20;
  return config;
}

bool Pushed(const GroupConfig& config, int64_t tokens, int64_t stride = kStride) {
  return IsPushed(config, Layout::Make(config), tokens, stride);
}
bool Fused(const GroupConfig& config, int64_t tokens, int64_t stride = kStride) {
  return IsFused(config, Layout::Make(config), tokens, stride);
}

}  // namespace

TEST(WhatFitsIntoSmPushBytesIsPushed) {
  GroupConfig config = Decode(2);
  const int64_t most = config.sm_push_bytes / kStride;
  CHECK(Pushed(config, 0) && Pushed(config, most) && !Pushed(config, most + 1));
  CHECK(Pushed(config, most, kStride / 2));
  CHECK(!Pushed(config, most + 1, kStride / 2));  // its rows stand in areas
  config.sm_push_bytes = 0;
  CHECK(Pushed(config, 0) && !Pushed(config, 1));
}

TEST(ADecodeIsFused) {
  for (int32_t ranks : {1, 2, 4, 8}) {
    for (int64_t tokens : {0, 1, 8, 32, 128}) CHECK(Fused(Decode(ranks), tokens));
  }
}

TEST(NothingIsFusedThatIsNotPushed) {
  GroupConfig config = Decode(2);
  CHECK(!Fused(config, config.sm_push_bytes / kStride + 1));
  config.sm_push_bytes = 0;
  CHECK(!Fused(config, 1));
}

TEST(EveryBlockCanRouteAllRowsOfAFusedOperation) {
  GroupConfig config = Decode(2);
  config.sm_push_bytes = int64_t{1} << 30;  // everything is pushed
  CHECK(Fused(config, 512) && !Fused(config, 513));  // slots
  config.top_k = 4;
  config.num_experts = 246;
  CHECK(Fused(config, 1024) && !Fused(config, 1025));  // slots
  config.num_experts = 248;
  CHECK(Fused(config, 992) && !Fused(config, 993));  // bits
}

TEST(NothingIsFusedThatGoesToAnotherNode) {
  GroupConfig config = Decode(8);
  config.ranks_per_node = 4;
  CHECK(Pushed(config, 8) && !Fused(config, 8));
  config.hierarchical = true;
  CHECK(!Fused(config, 8));
  config.ranks_per_node = 8;
  CHECK(!Fused(config, 8));  // a relay stands between, though in one node
}

TEST_MAIN()
