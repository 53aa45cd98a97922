// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/processes/link.h"

#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "csrc/cpu/processes/system_error.h"
#include "csrc/cpu/runtime/event_loop.h"

namespace smfree::cpu {
namespace {

constexpr size_t kMaxPacketBytes = sizeof(packets::FaultPacket) + packets::kMaxTextBytes;
static_assert(sizeof(packets::MessagePacket) <= kMaxPacketBytes);

template <typename Packet>
bool Decode(const char* bytes, size_t size, Packet* packet) {
  if (size != sizeof(Packet)) return false;
  std::memcpy(packet, bytes, sizeof(Packet));
  return true;
}

}  // namespace

int SendPacket(int socket, const char* bytes, size_t size, int fd, int flags) {
  iovec data{const_cast<char*>(bytes), size};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  if (fd >= 0) {
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
    cmsghdr* const header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(header), &fd, sizeof(fd));
  }
  ssize_t sent;
  do {
    sent = sendmsg(socket, &message, flags | MSG_NOSIGNAL);
  } while (sent < 0 && errno == EINTR);
  return sent < 0 ? errno : 0;
}

Link::~Link() {
  EventLoop::Get().Unwatch(fd_);
  close(fd_);
}

void Link::Start(std::weak_ptr<LinkEvents> events) {
  events_ = std::move(events);
  const std::weak_ptr<Link> weak = weak_from_this();
  EventLoop::Get().Watch(
      fd_,
      [weak] {
        if (const auto self = weak.lock()) self->Receive();
      },
      [weak] {
        if (const auto self = weak.lock()) self->Flush();
      });
}

Link::Sent Link::TrySend(const std::string& bytes, int fd) {
  const int error = SendPacket(fd_, bytes.data(), bytes.size(), fd, MSG_DONTWAIT);
  if (error == 0) return Sent::kYes;
  if (error == EAGAIN || error == EWOULDBLOCK || error == ENOBUFS || error == ENOMEM ||
      error == ETOOMANYREFS) {
    return Sent::kLater;
  }
  return Sent::kNever;  // the peer is gone; what it left is reported by the receiving side
}

void Link::SendBytes(std::string bytes, int fd) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (ended_) return;
  if (queue_.empty()) {
    const Sent sent = TrySend(bytes, fd);
    if (sent == Sent::kNever) ended_ = true;
    if (sent != Sent::kLater) return;
  }
  queue_.push_back(Queued{std::move(bytes), fd});
  EventLoop::Get().WantWrite(fd_, true);
}

void Link::SendFault(const Status& fault) {
  const packets::FaultPacket packet{packets::PacketKind::kFault, fault.kind()};
  std::string bytes(reinterpret_cast<const char*>(&packet), sizeof(packet));
  bytes += fault.message().substr(0, packets::kMaxTextBytes);
  SendBytes(std::move(bytes), -1);
}

void Link::Flush() {
  const std::lock_guard<std::mutex> lock(mutex_);
  while (!ended_ && !queue_.empty()) {
    const Sent sent = TrySend(queue_.front().bytes, queue_.front().fd);
    if (sent == Sent::kLater) return;
    if (sent == Sent::kNever) ended_ = true;
    queue_.pop_front();
  }
  queue_.clear();
  EventLoop::Get().WantWrite(fd_, false);
  flushed_.notify_all();
}

void Link::Close(Clock::time_point deadline) {
  Send(packets::GoodbyePacket{packets::PacketKind::kGoodbye});
  {
    std::unique_lock<std::mutex> lock(mutex_);
    flushed_.wait_until(lock, deadline, [this] { return queue_.empty() || ended_; });
    ended_ = true;
    queue_.clear();
  }
  EventLoop::Get().Unwatch(fd_);
  shutdown(fd_, SHUT_RDWR);  // what was sent still reaches the peer
}

void Link::Receive() {
  const auto events = events_.lock();
  if (!events) return;
  // A bounded number: one peer cannot keep the event loop from the others and from its timers.
  for (int i = 0; i < 64; ++i) {
    if (!ReceiveOne(*events)) return;
  }
}

// False if there is nothing more to receive now, or ever.
bool Link::ReceiveOne(LinkEvents& events) {
  char bytes[kMaxPacketBytes];
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))];
  iovec data{bytes, sizeof(bytes)};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof(control);
  const ssize_t size = recvmsg(fd_, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  if (size < 0) {
    if (errno == EAGAIN || errno == EWOULDBLOCK) return false;
    // A peer that closes with packets of ours unread makes the kernel report ECONNRESET, once,
    // ahead of what the peer had sent before: go on reading.
    if (errno == EINTR || errno == ECONNRESET) return true;
    End(events, std::strerror(errno));
    return false;
  }
  if (size == 0) {
    End(events, "");
    return false;
  }
  // The kernel drops a descriptor that does not fit into this process, and says no more than this.
  if (message.msg_flags & MSG_CTRUNC) {
    events.OnLoss(process_, SystemError("receiving the memory of a peer process", EMFILE));
    return true;
  }
  int fd = -1;
  for (cmsghdr* header = CMSG_FIRSTHDR(&message); header; header = CMSG_NXTHDR(&message, header)) {
    if (header->cmsg_level == SOL_SOCKET && header->cmsg_type == SCM_RIGHTS) {
      std::memcpy(&fd, CMSG_DATA(header), sizeof(fd));
    }
  }
  if (Dispatch(events, bytes, static_cast<size_t>(size), fd)) return true;
  if (fd >= 0) close(fd);
  End(events, "it sent a malformed packet");
  return false;
}

bool Link::Dispatch(LinkEvents& events, const char* bytes, size_t size, int fd) {
  packets::PacketKind kind{};
  if (size < sizeof(kind)) return false;
  std::memcpy(&kind, bytes, sizeof(kind));
  if ((fd >= 0) != (kind == packets::PacketKind::kSegment)) return false;
  switch (kind) {
    case packets::PacketKind::kSegment: {
      packets::SegmentPacket packet;
      if (!Decode(bytes, size, &packet)) return false;
      events.OnSegment(process_, packet, fd);
      return true;
    }
    case packets::PacketKind::kMessage: {
      packets::MessagePacket packet;
      if (!Decode(bytes, size, &packet)) return false;
      events.OnMessage(process_, packet);
      return true;
    }
    case packets::PacketKind::kRelease: {
      packets::ReleasePacket packet;
      if (!Decode(bytes, size, &packet)) return false;
      events.OnRelease(process_, packet.ticket);
      return true;
    }
    case packets::PacketKind::kFault: {
      packets::FaultPacket packet;
      if (size < sizeof(packet)) return false;
      std::memcpy(&packet, bytes, sizeof(packet));
      events.OnFault(process_, Status(packet.fault,
                                      std::string(bytes + sizeof(packet), size - sizeof(packet))));
      return true;
    }
    case packets::PacketKind::kGoodbye:
      goodbye_received_ = true;
      events.OnGoodbye(process_);
      return true;
    case packets::PacketKind::kHello: break;
  }
  return false;
}

void Link::End(LinkEvents& events, const std::string& why) {
  EventLoop::Get().Unwatch(fd_);
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    ended_ = true;
    queue_.clear();
    flushed_.notify_all();
  }
  if (!goodbye_received_) events.OnDeath(process_, why);
}

}  // namespace smfree::cpu
