// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/processes/network.h"

#include <unistd.h>

#include <utility>

namespace smfree::cpu {

// A reader's hold on a message in another process: keeps the mapping, and tells the sender when the
// last reader here is done. The rows have been read before that packet is sent, so the sender may
// overwrite them as soon as it gets it.
struct Network::Hold {
  std::shared_ptr<Mapping> mapping;
  std::shared_ptr<Link> link;
  int64_t ticket;

  ~Hold() { link->Send(packets::ReleasePacket{packets::PacketKind::kRelease, 0, ticket}); }
};

void Network::Start(std::vector<Socket> sockets, std::weak_ptr<NetworkEvents> events) {
  events_ = std::move(events);
  gone_.assign(sockets.size(), false);
  // All links exist before the first packet can come in.
  for (size_t p = 0; p < sockets.size(); ++p) {
    if (!sockets[p].open()) continue;
    peers_[p].link = std::make_shared<Link>(sockets[p].Release(), static_cast<int32_t>(p));
  }
  for (Peer& peer : peers_) {
    if (peer.link) peer.link->Start(weak_from_this());
  }
}

void Network::ShowSegment(int32_t segment, const Mapping& mapping) {
  for (Peer& peer : peers_) {
    if (!peer.link) continue;
    peer.link->Send(packets::SegmentPacket{packets::PacketKind::kSegment, segment, mapping.bytes()},
                    mapping.fd());
  }
}

void Network::Send(int32_t process, const MessageHeader& header,
                   std::shared_ptr<const Arena::Block> block, int64_t offset) {
  packets::MessagePacket packet{};
  packet.kind = packets::PacketKind::kMessage;
  packet.segment = block->segment();
  packet.offset = block->offset() + offset;
  packet.header = header;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (gone_[static_cast<size_t>(process)]) return;
    packet.ticket = next_ticket_++;
    peer(process).read_by_peer.emplace(packet.ticket, std::move(block));
  }
  peer(process).link->Send(packet);
}

void Network::SendFault(const Status& fault) {
  for (Peer& peer : peers_) {
    if (peer.link) peer.link->SendFault(fault);
  }
}

void Network::Close(Clock::time_point deadline) {
  for (Peer& peer : peers_) {
    if (peer.link) peer.link->Close(deadline);
  }
  // Peers read on from their own mappings, and a retired arena writes to no page again.
  for (size_t p = 0; p < peers_.size(); ++p) ForgetReads(static_cast<int32_t>(p));
}

void Network::OnSegment(int32_t process, const packets::SegmentPacket& packet, int fd) {
  auto& segments = peer(process).segments;
  if (packet.segment != static_cast<int32_t>(segments.size())) {
    close(fd);
    return OnDeath(process, "it numbered its memory wrongly");
  }
  auto mapping = MapForeignSegment(fd, packet.bytes);
  if (!mapping.ok()) return OnLoss(process, mapping.status());
  segments.push_back(std::move(mapping.value()));
}

void Network::OnMessage(int32_t process, const packets::MessagePacket& packet) {
  const auto& segments = peer(process).segments;
  const auto index = static_cast<size_t>(packet.segment);
  const int64_t bytes = packet.header.bytes;
  if (packet.segment < 0 || index >= segments.size() || packet.offset < 0 || bytes < 0 ||
      bytes > segments[index]->bytes() || packet.offset > segments[index]->bytes() - bytes) {
    return OnDeath(process, "it sent a message outside its memory");
  }
  Message message;
  message.header = packet.header;
  message.data = segments[index]->data() + packet.offset;
  message.hold =
      std::shared_ptr<Hold>(new Hold{segments[index], peer(process).link, packet.ticket});
  if (const auto events = events_.lock()) events->OnArrival(std::move(message));
}

void Network::OnRelease(int32_t process, int64_t ticket) {
  std::shared_ptr<const Arena::Block> block;  // freed after the lock is gone
  const std::lock_guard<std::mutex> lock(mutex_);
  auto& reads = peer(process).read_by_peer;
  const auto it = reads.find(ticket);
  if (it == reads.end()) return;
  block = std::move(it->second);
  reads.erase(it);
}

void Network::OnFault(int32_t, const Status& fault) {
  if (const auto events = events_.lock()) events->OnPeerFault(fault);
}

void Network::OnLoss(int32_t, const Status& why) {
  if (const auto events = events_.lock()) events->OnLoss(why);
}

void Network::OnGoodbye(int32_t process) {
  ForgetReads(process);
  if (const auto events = events_.lock()) events->OnPeerClosed(process);
}

void Network::OnDeath(int32_t process, const std::string& why) {
  ForgetReads(process);
  if (const auto events = events_.lock()) events->OnPeerDied(process, why);
}

void Network::ForgetReads(int32_t process) {
  std::unordered_map<int64_t, std::shared_ptr<const Arena::Block>> forgotten;
  const std::lock_guard<std::mutex> lock(mutex_);
  if (gone_.empty()) return;  // never connected
  gone_[static_cast<size_t>(process)] = true;
  forgotten.swap(peer(process).read_by_peer);
}

}  // namespace smfree::cpu
