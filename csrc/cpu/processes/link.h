// SPDX-License-Identifier: Apache-2.0
//
// A link: the socket to one other process of the group. Packets (packets.h) go out in the
// order of Send, from any thread, without ever blocking it: what the socket does not take at once
// waits in a queue that the event loop empties. Packets come in on the event loop's thread.
//
// A message's rows are written to the arena before its packet is sent, and read after the packet
// was received. That the reader then sees the rows is the kernel's doing: the send releases, and
// the receive acquires, the lock of the socket's queue, which orders the memory of both processes.
#ifndef SMFREE_CSRC_CPU_PROCESSES_LINK_H_
#define SMFREE_CSRC_CPU_PROCESSES_LINK_H_

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>

#include "csrc/cpu/runtime/threads.h"
#include "csrc/core/status.h"
#include "csrc/cpu/processes/packets.h"

namespace smfree::cpu {

class Link;

// What comes in, by process. All calls are made on the event loop's thread and must not block.
class LinkEvents {
 public:
  virtual ~LinkEvents() = default;
  virtual void OnSegment(int32_t process, const packets::SegmentPacket& packet, int fd) = 0;
  virtual void OnMessage(int32_t process, const packets::MessagePacket& packet) = 0;
  virtual void OnRelease(int32_t process, int64_t ticket) = 0;
  virtual void OnFault(int32_t process, const Status& fault) = 0;
  virtual void OnGoodbye(int32_t process) = 0;
  // Something of the process was lost on this side; it is alive.
  virtual void OnLoss(int32_t process, const Status& why) = 0;
  // The stream ended, without a goodbye: the process is dead. `why` is empty or tells more.
  virtual void OnDeath(int32_t process, const std::string& why) = 0;
};

class Link : public std::enable_shared_from_this<Link> {
 public:
  // Takes the socket, which both sides have greeted each other on.
  Link(int fd, int32_t process) : fd_(fd), process_(process) {}
  ~Link();
  Link(const Link&) = delete;
  Link& operator=(const Link&) = delete;

  // Begins to receive. Events go to whoever is alive then.
  void Start(std::weak_ptr<LinkEvents> events);

  // `fd` is handed to the other side along with the packet; it must stay open until Close.
  template <typename Packet>
  void Send(const Packet& packet, int fd = -1) {
    SendBytes(std::string(reinterpret_cast<const char*>(&packet), sizeof(packet)), fd);
  }
  void SendFault(const Status& fault);

  // Sends what is queued and a goodbye, at the latest until the deadline, then ends the link.
  void Close(Clock::time_point deadline);

 private:
  struct Queued {
    std::string bytes;
    int fd;
  };
  enum class Sent { kYes, kLater, kNever };

  void SendBytes(std::string bytes, int fd);
  Sent TrySend(const std::string& bytes, int fd);
  void Flush();
  void Receive();
  bool ReceiveOne(LinkEvents& events);
  bool Dispatch(LinkEvents& events, const char* bytes, size_t size, int fd);
  void End(LinkEvents& events, const std::string& why);

  const int fd_;
  const int32_t process_;
  std::weak_ptr<LinkEvents> events_;  // set by Start, then only read
  bool goodbye_received_ = false;     // the event loop's thread only

  std::mutex mutex_;
  std::condition_variable flushed_;
  std::deque<Queued> queue_;
  bool ended_ = false;  // nothing can be sent any more
};

// Sends one packet with an optional descriptor; returns 0 or an errno.
int SendPacket(int socket, const char* bytes, size_t size, int fd, int flags);

}  // namespace smfree::cpu

#endif  // SMFREE_CSRC_CPU_PROCESSES_LINK_H_
