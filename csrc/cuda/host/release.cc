// SPDX-License-Identifier: Apache-2.0
#include "csrc/cuda/host/release.h"

#include <algorithm>

#include "csrc/protocol/message.h"
#include "csrc/protocol/signals.h"

namespace smfree::cuda {
namespace {

// What the members of a leg have announced.
struct Words {
  const Nodes& nodes;
  Leg leg;
  const std::vector<Announcement>& words;  // [member, word]
  int32_t of_member;                       // so many

  const Announcement& At(int32_t member, int32_t word) const {
    return words[static_cast<size_t>(member) * static_cast<size_t>(of_member) +
                 static_cast<size_t>(word)];
  }
  // The word for what arrives in a region of `peer`: the message's, or that of what it becomes in
  // its node.
  const Announcement& Arriving(int32_t peer, int32_t region, bool in_node = false) const {
    return At(region % nodes.Members(leg), nodes.RegionAtPeer(leg, peer, region) +
                                               (in_node ? nodes.Regions(leg) : 0));
  }
};

// Lays the payloads out in the areas of all members, as their receivers do (Received::Plan and
// relay_plan.cuh).
Release::Plan MakePlan(const GroupConfig& config, const Layout& layout, const Descriptor& chunk,
                       int32_t rank, const Words& words) {
  const Nodes& nodes = words.nodes;
  const Leg leg = chunk.leg;
  const int64_t area = layout.RecvAreaOffset(leg, chunk.set, NumberOf(chunk.signal));
  const uint32_t mark = words.At(0, 0).operation();
  const auto regions = static_cast<size_t>(nodes.Regions(leg));
  Release::Plan plan{true, std::vector<int64_t>(regions), std::vector<int32_t>(regions)};
  for (int32_t member = 0; member < nodes.Members(leg); ++member) {
    const int32_t peer = nodes.Peer(leg, rank, member);
    Taking taking(nodes, leg, chunk.operation, WireRows(config, chunk.tokens));
    int64_t bytes = 0;
    for (size_t i = 0; i < regions; ++i) {
      const auto region = static_cast<int32_t>(i);
      const Announcement message = words.Arriving(peer, region);
      plan.agreed = plan.agreed && message.operation() == mark;
      const int64_t in_node =
          taking.by_relay ? words.Arriving(peer, region, /*in_node=*/true).rows() : 0;
      const int64_t taken = taking.Next(message.rows(), in_node);
      const int32_t source = nodes.Peer(leg, peer, region);
      if (source == rank) {
        const auto here = static_cast<size_t>(nodes.RegionAtPeer(leg, peer, region));
        plan.payload_at[here] = area + bytes;
        plan.kept[here] = static_cast<int32_t>(taken);
      }
      if (source != peer) {
        bytes += MessageLayout(taken, chunk.experts, chunk.slots, chunk.stride).bytes;
      }
    }
    plan.agreed = plan.agreed && bytes <= layout.area_bytes[leg];
  }
  return plan;
}

}  // namespace

std::vector<Descriptor> Release::Take(const GroupConfig& config, const Layout& layout,
                                      int32_t rank, const uint64_t* announced) {
  const Descriptor& chunk = waiting_.front();
  const int64_t number = NumberOf(chunk.signal);
  const Nodes nodes = NodesOf(config);
  const int32_t members = nodes.Members(chunk.leg);
  const AnnouncementTable table = layout.Announcements(chunk.leg);
  if (number != number_) {
    number_ = number;
    heard_ = 0;
    words_.resize(static_cast<size_t>(members) * static_cast<size_t>(table.words));
  }
  const auto has_announced = [&](int32_t member) {
    const int64_t first = table.At(chunk.set, number, nodes.Peer(chunk.leg, rank, member), 0);
    for (int32_t i = 0; i < table.words; ++i) {
      const Announcement word{load_acquire_system(announced + first + i)};
      if (!word.IsOf(number)) return false;
      words_[static_cast<size_t>(member) * static_cast<size_t>(table.words) +
             static_cast<size_t>(i)] = word;
    }
    return true;
  };
  const bool had_all = heard_ == members;
  while (heard_ < members && has_announced(heard_)) ++heard_;
  if (heard_ < members) return {};
  if (!had_all) {
    plan_ = MakePlan(config, layout, chunk, rank, {nodes, chunk.leg, words_, table.words});
  }
  // Behind them there may be chunks of the next operation: this rank can receive without them.
  const auto next = std::find_if(waiting_.begin(), waiting_.end(), [&](const Descriptor& other) {
    return NumberOf(other.signal) != number;
  });
  const std::vector<Descriptor> leaving(waiting_.begin(), next);
  waiting_.erase(waiting_.begin(), next);
  return leaving;
}

std::vector<Transfer> TransfersOf(const Descriptor& chunk, int64_t to, int32_t kept) {
  const int64_t stride = chunk.stride;
  const MessageLayout packed(chunk.rows, chunk.experts, chunk.slots, stride);
  const MessageLayout there(kept, chunk.experts, chunk.slots, stride);
  const Chunks chunks(chunk.rows, chunk.chunks);
  const int64_t first = std::min(chunks.Begin(chunk.chunk), kept);
  const int64_t end = std::min(chunks.End(chunk.chunk), kept);
  std::vector<Transfer> transfers;
  const auto move = [&](int64_t from_offset, int64_t to_offset, int64_t bytes) {
    if (bytes > 0) transfers.push_back({chunk.payload + from_offset, to + to_offset, bytes});
  };
  if (chunk.chunk == 0 && kept == chunk.rows) {
    move(0, 0, packed.rows_offset + end * stride);
    return transfers;
  }
  if (chunk.chunk == 0) {
    move(packed.experts_offset, there.experts_offset, kept * chunk.experts * kExpertIdBytes);
    move(packed.slots_offset, there.slots_offset, kept * chunk.slots * kSlotBytes);
  }
  move(packed.rows_offset + first * stride, there.rows_offset + first * stride,
       (end - first) * stride);
  return transfers;
}

}  // namespace smfree::cuda
