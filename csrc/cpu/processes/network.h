// SPDX-License-Identifier: Apache-2.0
//
// The network: the links to all other processes of a group, the memory that each side shows the
// other, and which of our blocks they still read.
#ifndef SMFREE_CSRC_CPU_PROCESSES_NETWORK_H_
#define SMFREE_CSRC_CPU_PROCESSES_NETWORK_H_

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "csrc/cpu/processes/arena.h"
#include "csrc/cpu/processes/handshake.h"
#include "csrc/cpu/processes/link.h"
#include "csrc/cpu/exchange/message.h"

namespace smfree::cpu {

// What the other processes do, told on the event loop's thread.
class NetworkEvents {
 public:
  virtual ~NetworkEvents() = default;
  virtual void OnArrival(Message message) = 0;
  virtual void OnPeerFault(const Status& fault) = 0;
  // Something of the process was lost on this side.
  virtual void OnLoss(const Status& why) = 0;
  virtual void OnPeerClosed(int32_t process) = 0;
  virtual void OnPeerDied(int32_t process, const std::string& why) = 0;
};

class Network : public LinkEvents, public std::enable_shared_from_this<Network> {
 public:
  explicit Network(int32_t num_processes) : peers_(static_cast<size_t>(num_processes)) {}

  // Takes the sockets by process, none for this one, and begins to receive.
  void Start(std::vector<Socket> sockets, std::weak_ptr<NetworkEvents> events);

  // Shows a new segment to every peer, ahead of all messages in it.
  void ShowSegment(int32_t segment, const Mapping& mapping);
  // Tells `process` of a message that lies `offset` bytes into `block`, and keeps the block until
  // that process has read it, or is gone.
  void Send(int32_t process, const MessageHeader& header,
            std::shared_ptr<const Arena::Block> block, int64_t offset);
  void SendFault(const Status& fault);
  // Hands over what is still queued, until the deadline, and says goodbye. The arena is retired.
  void Close(Clock::time_point deadline);

 private:
  struct Peer {
    std::shared_ptr<Link> link;
    // The peer's arena; only the event loop's thread uses it.
    std::vector<std::shared_ptr<Mapping>> segments;
    std::unordered_map<int64_t, std::shared_ptr<const Arena::Block>> read_by_peer;  // by ticket
  };
  struct Hold;

  void OnSegment(int32_t process, const packets::SegmentPacket& packet, int fd) override;
  void OnMessage(int32_t process, const packets::MessagePacket& packet) override;
  void OnRelease(int32_t process, int64_t ticket) override;
  void OnFault(int32_t process, const Status& fault) override;
  void OnLoss(int32_t process, const Status& why) override;
  void OnGoodbye(int32_t process) override;
  void OnDeath(int32_t process, const std::string& why) override;
  // The process will read nothing more.
  void ForgetReads(int32_t process);
  Peer& peer(int32_t process) { return peers_[static_cast<size_t>(process)]; }

  std::vector<Peer> peers_;  // by process; the links are set by Start, then only read
  std::weak_ptr<NetworkEvents> events_;
  std::mutex mutex_;  // guards every Peer::read_by_peer, gone_ and next_ticket_
  std::vector<bool> gone_;
  int64_t next_ticket_ = 0;
};

}  // namespace smfree::cpu

#endif  // SMFREE_CSRC_CPU_PROCESSES_NETWORK_H_
