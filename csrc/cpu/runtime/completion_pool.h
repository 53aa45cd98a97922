// SPDX-License-Identifier: Apache-2.0
//
// The elastic pool that unpacks and completes receives. XLA resumes the rest of a program on the
// thread that completes a receive, and that rest may block in a collective until other receives
// complete. So a job is never queued behind a busy thread: if no thread is idle, one is started.
#ifndef SMFREE_CSRC_CPU_RUNTIME_COMPLETION_POOL_H_
#define SMFREE_CSRC_CPU_RUNTIME_COMPLETION_POOL_H_

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>

#include "csrc/cpu/runtime/threads.h"

namespace smfree::cpu {

class CompletionPool {
 public:
  static CompletionPool& Get();

  void Post(std::function<void()> job);

  // Waits until no job is queued or running, or until the deadline. Only for process exit.
  void Drain(Clock::time_point deadline);

 private:
  void Run();

  std::mutex mutex_;
  std::condition_variable work_, quiet_;
  std::deque<std::function<void()>> jobs_;  // never more than idle_ plus threads being started
  int64_t idle_ = 0;
  int64_t running_ = 0;
};

// Calls body(begin, end) for disjoint ranges that cover [0, count), on up to `threads` threads, and
// returns when all are done. The calling thread takes part, so this cannot deadlock. Bodies run in
// IEEE floating-point mode: XLA's threads flush denormals, the pool's do not, and the bits of a
// result must not depend on the thread.
void ParallelFor(int64_t count, int threads, const std::function<void(int64_t, int64_t)>& body);

}  // namespace smfree::cpu

#endif  // SMFREE_CSRC_CPU_RUNTIME_COMPLETION_POOL_H_
