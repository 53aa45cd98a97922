// SPDX-License-Identifier: Apache-2.0
//
// When a chaotic mover delivers a message.
#ifndef SMFREE_CSRC_CPU_EXCHANGE_CHAOS_H_
#define SMFREE_CSRC_CPU_EXCHANGE_CHAOS_H_

#include <algorithm>
#include <map>
#include <random>
#include <tuple>

#include "csrc/cpu/backend.h"
#include "csrc/cpu/runtime/threads.h"
#include "csrc/cpu/exchange/message_header.h"

namespace smfree::cpu {

class ChaoticSchedule {
 public:
  void Set(const Chaos& chaos) {
    chaos_ = chaos;
    random_.seed(chaos.seed);
  }
  bool enabled() const { return chaos_.enabled(); }

  // Not before the times returned for earlier messages of the same point from the same source to
  // the same destination; without reordering, not before any earlier time.
  Clock::time_point DueTime(const MessageHeader& header) {
    const Clock::time_point now = Clock::now();
    if (std::uniform_real_distribution<double>(0, 1)(random_) < chaos_.stall_probability) {
      stalled_until_ = std::max(stalled_until_, now + std::chrono::milliseconds(chaos_.stall_ms));
    }
    const auto delay = std::chrono::microseconds(
        std::uniform_int_distribution<int64_t>(0, chaos_.max_delay_us)(random_));
    const FifoKey key(header.source, header.destination, Point(header.identity));
    Clock::time_point& last = chaos_.reorder ? last_due_[key] : last_due_of_all_;
    last = std::max({last, now + delay, stalled_until_});
    return last;
  }

  // Nothing is held back any more: the order of what went before no longer matters.
  void Forget() { last_due_.clear(); }

 private:
  using FifoKey = std::tuple<int32_t, int32_t, Point>;  // source, destination, point

  Chaos chaos_;
  std::mt19937_64 random_;
  std::map<FifoKey, Clock::time_point> last_due_;
  Clock::time_point last_due_of_all_{};
  Clock::time_point stalled_until_{};
};

}  // namespace smfree::cpu

#endif  // SMFREE_CSRC_CPU_EXCHANGE_CHAOS_H_
