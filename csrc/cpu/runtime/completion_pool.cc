// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/runtime/completion_pool.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <system_error>
#include <utility>

#include "csrc/cpu/rows/float_mode.h"

namespace smfree::cpu {

// Long enough that a training step finds its threads alive, short enough that a burst's threads go.
constexpr std::chrono::seconds kIdleBeforeExit{5};

CompletionPool& CompletionPool::Get() {
  static CompletionPool& pool = *new CompletionPool;  // leaked: see threads.h
  return pool;
}

void CompletionPool::Post(std::function<void()> job) {
  std::unique_lock<std::mutex> lock(mutex_);
  jobs_.push_back(std::move(job));
  if (static_cast<int64_t>(jobs_.size()) <= idle_) {
    work_.notify_one();
    return;
  }
  ++running_;  // counts the new thread, so that Drain waits for it
  lock.unlock();
  try {
    StartDetached("smfree-pool", [this] { Run(); });
  } catch (const std::system_error&) {
    // The process may start no more threads. A thread that becomes idle will take the job; if there
    // is none, nothing can ever run it.
    lock.lock();
    if (--running_ == 0 && idle_ == 0) throw;
  }
}

void CompletionPool::Run() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    while (!jobs_.empty()) {
      std::function<void()> job = std::move(jobs_.front());
      jobs_.pop_front();
      lock.unlock();
      job();
      job = nullptr;  // what it holds goes before the lock is taken
      lock.lock();
    }
    if (--running_ == 0) quiet_.notify_all();
    ++idle_;
    const bool work = work_.wait_for(lock, kIdleBeforeExit, [this] { return !jobs_.empty(); });
    --idle_;
    if (!work) return;
    ++running_;
  }
}

void CompletionPool::Drain(Clock::time_point deadline) {
  std::unique_lock<std::mutex> lock(mutex_);
  quiet_.wait_until(lock, deadline, [this] { return jobs_.empty() && running_ == 0; });
}

namespace {

// Shared with helpers that may start after the loop has ended: they find no chunk left and never
// touch `body`, which belongs to the caller.
struct Loop {
  const std::function<void(int64_t, int64_t)>* body;
  int64_t count, chunk;
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::condition_variable finished;
  int64_t left;  // elements not yet done, guarded by mutex

  void Work() {
    const ScopedIeeeMode ieee;
    int64_t done = 0;
    for (;;) {
      const int64_t begin = next.fetch_add(chunk, std::memory_order_relaxed);
      if (begin >= count) break;
      const int64_t end = std::min(begin + chunk, count);
      (*body)(begin, end);
      done += end - begin;
    }
    if (done == 0) return;
    const std::lock_guard<std::mutex> lock(mutex);  // publishes what the bodies wrote
    left -= done;
    if (left == 0) finished.notify_one();
  }
};

}  // namespace

void ParallelFor(int64_t count, int threads, const std::function<void(int64_t, int64_t)>& body) {
  if (threads <= 1 || count <= 1) {
    const ScopedIeeeMode ieee;
    if (count > 0) body(0, count);
    return;
  }
  constexpr int64_t kChunksPerThread = 4;  // so that a thread that was scheduled late costs little
  auto loop = std::make_shared<Loop>();
  loop->body = &body;
  loop->count = loop->left = count;
  loop->chunk = std::max<int64_t>(1, count / (threads * kChunksPerThread));
  for (int i = 1; i < threads; ++i) {
    CompletionPool::Get().Post([loop] { loop->Work(); });
  }
  loop->Work();
  std::unique_lock<std::mutex> lock(loop->mutex);
  loop->finished.wait(lock, [&] { return loop->left == 0; });
}

}  // namespace smfree::cpu
