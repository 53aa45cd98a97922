// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/exchange/unreceived.h"

#include <cstdio>

#include "csrc/core/describe.h"

namespace smfree::cpu {
namespace {

constexpr size_t kMaxDescribed = 4;  // calls

}  // namespace

void Unreceived::Add(const Identity& sent, int64_t bytes) {
  ++times_[std::string(Name(sent.operation)) + " (" + DescribePoint(sent) + ")"];
  ++count_;
  bytes_ += bytes;
}

std::string Unreceived::Describe() const {
  char megabytes[32];
  std::snprintf(megabytes, sizeof(megabytes), "%.1f MB", static_cast<double>(bytes_) / 1e6);
  std::string text = std::to_string(count_) + " operation(s), of which " + megabytes +
                     " lie unread here: ";
  size_t described = 0;
  for (const auto& [call, times] : times_) {
    if (++described > kMaxDescribed) break;
    text += (described == 1 ? "" : ", ") + std::to_string(times) + " times " + call;
  }
  if (times_.size() > kMaxDescribed) {
    text += " and " + std::to_string(times_.size() - kMaxDescribed) + " other calls";
  }
  return text;
}

}  // namespace smfree::cpu
