// SPDX-License-Identifier: Apache-2.0
//
// The event loop: the one background thread of a process, shared by all groups. It watches the
// sockets to other processes and keeps the deadlines of receives; with chaos it also holds messages back.
// It never runs a Done, nor anything else that could block, and uses no processor time while idle.
#ifndef SMFREE_CSRC_CPU_RUNTIME_EVENT_LOOP_H_
#define SMFREE_CSRC_CPU_RUNTIME_EVENT_LOOP_H_

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

#include "csrc/cpu/runtime/threads.h"

namespace smfree::cpu {

class EventLoop {
 public:
  using Callback = std::function<void()>;
  using TimerId = std::pair<Clock::time_point, uint64_t>;

  static EventLoop& Get();  // starts the thread on first use

  // Calls back once, not before `when`. Equal times keep the order of the calls.
  TimerId At(Clock::time_point when, Callback callback);
  // A callback that has begun is not waited for.
  void Cancel(TimerId id);

  // Calls back whenever `fd` is readable or at its end, and, between WantWrite(fd, true) and
  // WantWrite(fd, false), whenever it is writable.
  void Watch(int fd, Callback readable, Callback writable);
  void WantWrite(int fd, bool want);
  // When this returns, callbacks of `fd` neither run nor will run; on the loop's own thread: will
  // not be called again.
  void Unwatch(int fd);

 private:
  struct Socket {
    Callback readable, writable;
    bool want_write = false;
  };

  EventLoop();
  void Run();
  void Wake();

  std::mutex mutex_;
  std::condition_variable callback_ended_;
  const int wake_fd_;
  std::thread::id thread_;
  // When the thread will look at its timers without being woken. A later timer need not wake it:
  // so a stream of receives, each with its deadline, costs no wake-up each.
  Clock::time_point sleeps_until_ = Clock::time_point::max();
  uint64_t next_timer_ = 0;
  std::map<TimerId, Callback> timers_;
  std::map<int, std::shared_ptr<Socket>> sockets_;
  int running_fd_ = -1;  // whose callback runs now
};

}  // namespace smfree::cpu

#endif  // SMFREE_CSRC_CPU_RUNTIME_EVENT_LOOP_H_
