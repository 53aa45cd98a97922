// SPDX-License-Identifier: Apache-2.0
//
// The movers of many virtual ranks carry out one leg of a large operation, byte by byte, with the
// shipping code of release.cc; where each receiver expects which row is written down here once
// more.
#ifndef SMFREE_TESTS_CPP_RELEASE_RANKS_H_
#define SMFREE_TESTS_CPP_RELEASE_RANKS_H_

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "csrc/cuda/host/release.h"
#include "csrc/protocol/message.h"
#include "csrc/protocol/signals.h"
#include "tests/cpp/check.h"

namespace smfree::cuda::test {

using Random = std::mt19937;
using Counts = std::vector<std::vector<int32_t>>;  // rows [rank][region]

constexpr uint32_t kMark = 7;
constexpr int32_t kTokens = 40;

struct Shape {
  Operation operation;
  Leg leg;
  int32_t set;
  int64_t number;
  int32_t stride;          // of rows
  int16_t experts, slots;  // per row
  int32_t chunks;          // asked for
};

class Ranks {
 public:
  explicit Ranks(const GroupConfig& config)
      : config_(config),
        nodes_(NodesOf(config)),
        layout_(Layout::Make(config)),
        announced_(layout_.AnnouncementsBytes() / sizeof(uint64_t)),
        memories_(config.num_ranks, std::vector<uint8_t>(layout_.TotalBytes())) {}

  // All ranks send the message of each region with `counts` rows, which become `in_node` rows where
  // the leg is a wire to relays. `taken` of those that arrive in a region are to move.
  void Run(const Shape& shape, const Counts& counts, const Counts& in_node, const Counts& taken,
           Random& random) {
    written_.assign(memories_.size(), std::vector<bool>(layout_.area_bytes[shape.leg]));
    std::vector<Release> releases(memories_.size());
    for (int32_t rank = 0; rank < config_.num_ranks; ++rank) {
      Pack(shape, counts[rank], rank, releases[rank]);
    }
    Announce(shape, counts, in_node, releases, random);
    for (int32_t rank = 0; rank < config_.num_ranks; ++rank) {
      if (releases[rank].waits()) MoveReleased(rank, releases[rank]);
      CHECK(!releases[rank].waits());
    }
    for (int32_t rank = 0; rank < config_.num_ranks; ++rank) Receive(shape, taken[rank], rank);
  }

 private:
  // What byte `at` of an array of a message is.
  static uint8_t Byte(int32_t source, int32_t region, int array, int64_t at) {
    const auto hash = static_cast<uint64_t>(((source * 1000 + region) * 4 + array)) << 32 | at;
    return static_cast<uint8_t>((hash * 0x9E3779B97F4A7C15u) >> 56);
  }

  struct Array {
    int64_t offset, row_bytes;
  };
  std::vector<Array> Arrays(const Shape& shape, int64_t rows) const {
    const MessageLayout message(rows, shape.experts, shape.slots, shape.stride);
    return {{message.experts_offset, shape.experts * kExpertIdBytes},
            {message.slots_offset, shape.slots * kSlotBytes},
            {message.rows_offset, shape.stride}};
  }
  int64_t PayloadBytes(const Shape& shape, int64_t rows) const {
    return MessageLayout(rows, shape.experts, shape.slots, shape.stride).bytes;
  }

  void Pack(const Shape& shape, const std::vector<int32_t>& rows, int32_t rank,
            Release& release) {
    const int64_t area = layout_.SendAreaOffset(shape.leg, shape.set, shape.number);
    int64_t payload = area;
    for (int32_t region = 0; region < nodes_.Regions(shape.leg); ++region) {
      CHECK(payload + PayloadBytes(shape, rows[region]) <= area + layout_.area_bytes[shape.leg]);
      const std::vector<Array> arrays = Arrays(shape, rows[region]);
      for (int array = 0; array < 3; ++array) {
        for (int64_t at = 0; at < rows[region] * arrays[array].row_bytes; ++at) {
          memories_[rank][payload + arrays[array].offset + at] = Byte(rank, region, array, at);
        }
      }
      const bool own = nodes_.Peer(shape.leg, rank, region) == rank;
      const Chunks chunks(rows[region], shape.chunks);
      for (int32_t chunk = 0; !own && chunk < chunks.count; ++chunk) {
        Descriptor descriptor{};
        descriptor.signal = SignalAfterChunk(shape.number, chunk, chunks.count);
        descriptor.payload = payload;
        descriptor.set = shape.set;
        descriptor.leg = shape.leg;
        descriptor.region = region;
        descriptor.rows = rows[region];
        descriptor.chunk = chunk;
        descriptor.chunks = shape.chunks;
        descriptor.experts = shape.experts;
        descriptor.slots = shape.slots;
        descriptor.tokens = kTokens;
        descriptor.stride = shape.stride;
        descriptor.operation = shape.operation;
        release.Add(descriptor);
      }
      payload += PayloadBytes(shape, rows[region]);
    }
  }

  // Word by word, in any order; nothing leaves a rank before the last one of its leg's members.
  void Announce(const Shape& shape, const Counts& counts, const Counts& in_node,
                std::vector<Release>& releases, Random& random) {
    const AnnouncementTable table = layout_.Announcements(shape.leg);
    const int32_t regions = nodes_.Regions(shape.leg);
    std::vector<int32_t> missing(memories_.size(), nodes_.Members(shape.leg) * table.words);
    std::vector<int32_t> words(memories_.size() * table.words);
    std::iota(words.begin(), words.end(), 0);
    std::shuffle(words.begin(), words.end(), random);
    for (const int32_t at : words) {
      const int32_t rank = at / table.words, word = at % table.words;
      const int32_t rows = word < regions ? counts[rank][word] : in_node[rank][word - regions];
      announced_[table.At(shape.set, shape.number, rank, word)] =
          Announcement::Of(shape.number, kMark, rows).word;
      for (int32_t i = 0; i < nodes_.Members(shape.leg); ++i) {
        --missing[nodes_.Peer(shape.leg, rank, i)];
      }
      const auto any = static_cast<int32_t>(random() % releases.size());
      if (!releases[any].waits()) continue;
      CHECK_EQ(MoveReleased(any, releases[any]), missing[any] == 0);
    }
  }

  bool MoveReleased(int32_t rank, Release& release) {
    const std::vector<Descriptor> chunks =
        release.Take(config_, layout_, rank, announced_.data());
    CHECK(chunks.empty() || release.plan().agreed);
    for (const Descriptor& chunk : chunks) Move(chunk, rank, release.plan());
    return !chunks.empty();
  }

  void Move(const Descriptor& chunk, int32_t rank, const Release::Plan& plan) {
    const int32_t peer = nodes_.Peer(chunk.leg, rank, chunk.region);
    const int64_t area = layout_.RecvAreaOffset(chunk.leg, chunk.set, NumberOf(chunk.signal));
    for (const Transfer& transfer :
         TransfersOf(chunk, plan.payload_at[chunk.region], plan.kept[chunk.region])) {
      const bool inside = transfer.bytes > 0 && transfer.to >= area &&
                          transfer.to + transfer.bytes <= area + layout_.area_bytes[chunk.leg];
      CHECK(inside);
      if (!inside) continue;
      int64_t overlap = 0;
      for (int64_t at = transfer.to - area; at < transfer.to - area + transfer.bytes; ++at) {
        overlap += written_[peer][at];
        written_[peer][at] = true;
      }
      CHECK_EQ(overlap, 0);
      std::memcpy(&memories_[peer][transfer.to], &memories_[rank][transfer.from], transfer.bytes);
    }
  }

  void Receive(const Shape& shape, const std::vector<int32_t>& taken, int32_t rank) {
    int64_t payload = layout_.RecvAreaOffset(shape.leg, shape.set, shape.number);
    for (int32_t region = 0; region < nodes_.Regions(shape.leg); ++region) {
      const int32_t source = nodes_.Peer(shape.leg, rank, region);
      if (source == rank) continue;  // read where it was packed
      const int32_t there = nodes_.RegionAtPeer(shape.leg, rank, region);
      const std::vector<Array> arrays = Arrays(shape, taken[region]);
      int64_t wrong = 0;
      for (int array = 0; array < 3; ++array) {
        for (int64_t at = 0; at < taken[region] * arrays[array].row_bytes; ++at) {
          wrong += memories_[rank][payload + arrays[array].offset + at] !=
                   Byte(source, there, array, at);
        }
      }
      CHECK_EQ(wrong, 0);
      payload += PayloadBytes(shape, taken[region]);
    }
    const std::vector<bool>& written = written_[rank];
    const auto end = written.begin() + (payload - layout_.RecvAreaOffset(shape.leg, shape.set,
                                                                         shape.number));
    CHECK(std::find(end, written.end(), true) == written.end());  // nothing else has moved
  }

  GroupConfig config_;
  Nodes nodes_;
  Layout layout_;
  std::vector<uint64_t> announced_;
  std::vector<std::vector<uint8_t>> memories_;
  std::vector<std::vector<bool>> written_;  // of the area that receives, by rank
};

}  // namespace smfree::cuda::test

#endif  // SMFREE_TESTS_CPP_RELEASE_RANKS_H_
