// SPDX-License-Identifier: Apache-2.0
//
// The backend's threads. They are detached and the objects they use are leaked: a namespace-scope
// condition variable that is destroyed while a thread waits on it hangs the exit of the process.
#ifndef SMFREE_CSRC_CPU_RUNTIME_THREADS_H_
#define SMFREE_CSRC_CPU_RUNTIME_THREADS_H_

#include <pthread.h>
#include <signal.h>

#include <chrono>
#include <functional>
#include <thread>
#include <utility>

namespace smfree::cpu {

using Clock = std::chrono::steady_clock;

inline int64_t NanosecondsSince(Clock::time_point start) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - start).count();
}

inline double Seconds(Clock::duration duration) {
  return std::chrono::duration<double>(duration).count();
}

inline Clock::duration SecondsToDuration(double seconds) {
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

// Signals stay with the threads of the host program: Ctrl-C must reach Python's main thread.
inline void StartDetached(const char* name, std::function<void()> body) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);  // inherited by the new thread
  try {
    std::thread([name, body = std::move(body)] {
      pthread_setname_np(pthread_self(), name);
      body();
    }).detach();
  } catch (...) {
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    throw;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

}  // namespace smfree::cpu

#endif  // SMFREE_CSRC_CPU_RUNTIME_THREADS_H_
