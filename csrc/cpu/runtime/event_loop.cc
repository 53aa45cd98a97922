// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/runtime/event_loop.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>
#include <vector>

namespace smfree::cpu {

EventLoop& EventLoop::Get() {
  static EventLoop& loop = *new EventLoop;  // leaked: see threads.h
  return loop;
}

EventLoop::EventLoop() : wake_fd_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  if (wake_fd_ < 0) throw std::system_error(errno, std::generic_category(), "eventfd");
  StartDetached("smfree-events", [this] { Run(); });
}

void EventLoop::Wake() {
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = write(wake_fd_, &one, sizeof(one));
}

EventLoop::TimerId EventLoop::At(Clock::time_point when, Callback callback) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const TimerId id(when, next_timer_++);
  timers_.emplace(id, std::move(callback));
  if (when < sleeps_until_) {
    sleeps_until_ = when;
    Wake();
  }
  return id;
}

void EventLoop::Cancel(TimerId id) {
  Callback dropped;  // destroyed after the lock is gone
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto it = timers_.find(id);
  if (it == timers_.end()) return;
  dropped = std::move(it->second);
  timers_.erase(it);
}

void EventLoop::Watch(int fd, Callback readable, Callback writable) {
  auto socket = std::make_shared<Socket>();
  socket->readable = std::move(readable);
  socket->writable = std::move(writable);
  const std::lock_guard<std::mutex> lock(mutex_);
  sockets_[fd] = std::move(socket);
  Wake();
}

void EventLoop::WantWrite(int fd, bool want) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto it = sockets_.find(fd);
  if (it == sockets_.end() || it->second->want_write == want) return;
  it->second->want_write = want;
  if (want) Wake();
}

void EventLoop::Unwatch(int fd) {
  std::shared_ptr<Socket> dropped;
  std::unique_lock<std::mutex> lock(mutex_);
  const auto it = sockets_.find(fd);
  if (it != sockets_.end()) {
    dropped = std::move(it->second);
    sockets_.erase(it);
    Wake();  // so that poll lets go of an fd that its owner is about to close
  }
  if (std::this_thread::get_id() == thread_) return;
  callback_ended_.wait(lock, [&] { return running_fd_ != fd; });
}

void EventLoop::Run() {
  std::vector<pollfd> polled;
  std::unique_lock<std::mutex> lock(mutex_);
  thread_ = std::this_thread::get_id();
  for (;;) {
    // Timers first, in the order of their times.
    while (!timers_.empty() && timers_.begin()->first.first <= Clock::now()) {
      Callback callback = std::move(timers_.begin()->second);
      timers_.erase(timers_.begin());
      lock.unlock();
      callback();
      callback = nullptr;
      lock.lock();
    }
    polled.assign(1, pollfd{wake_fd_, POLLIN, 0});
    for (const auto& [fd, socket] : sockets_) {
      const int events = POLLIN | (socket->want_write ? POLLOUT : 0);
      polled.push_back(pollfd{fd, static_cast<short>(events), 0});
    }
    // A time that was set is kept, though its timer be cancelled: to wake once in vain costs less
    // than to be woken for the next timer, which will most often be later.
    const auto first = timers_.empty() ? Clock::time_point::max() : timers_.begin()->first.first;
    const Clock::time_point now = Clock::now();
    sleeps_until_ = sleeps_until_ > now ? std::min(sleeps_until_, first) : first;
    timespec timeout{};
    const bool forever = sleeps_until_ == Clock::time_point::max();
    if (!forever) {
      const auto left = std::max(sleeps_until_ - now, Clock::duration::zero());
      const int64_t ns = std::chrono::duration_cast<std::chrono::nanoseconds>(left).count();
      timeout.tv_sec = ns / 1'000'000'000;
      timeout.tv_nsec = ns % 1'000'000'000;
    }
    lock.unlock();
    ppoll(polled.data(), polled.size(), forever ? nullptr : &timeout, nullptr);
    lock.lock();
    if (polled[0].revents != 0) {
      uint64_t count;
      [[maybe_unused]] const ssize_t drained = read(wake_fd_, &count, sizeof(count));
    }
    for (size_t i = 1; i < polled.size(); ++i) {
      const auto it = sockets_.find(polled[i].fd);
      if (polled[i].revents == 0 || it == sockets_.end()) continue;
      std::shared_ptr<Socket> socket = it->second;
      running_fd_ = polled[i].fd;
      lock.unlock();
      if (polled[i].revents & POLLOUT) socket->writable();
      if (polled[i].revents & (POLLIN | POLLHUP | POLLERR)) socket->readable();
      socket = nullptr;
      lock.lock();
      running_fd_ = -1;
      callback_ended_.notify_all();
    }
  }
}

}  // namespace smfree::cpu
