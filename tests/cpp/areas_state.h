// SPDX-License-Identifier: Apache-2.0
//
// What the model of areas_model.h consists of: its state, the shapes of its operations, and the
// ways to change it.
#ifndef SMFREE_TESTS_CPP_AREAS_STATE_H_
#define SMFREE_TESTS_CPP_AREAS_STATE_H_

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "csrc/protocol/lanes.h"
#include "tests/cpp/model_program.h"

namespace smfree::model {

// What a mover waits for before it copies rows of a large operation.
enum class Waits : uint8_t {
  kForAll,     // the words of all ranks
  kForCounts,  // the words that the offset at the receiver follows from
  kForNone,    // and takes the counts that happen to stand there
};

// Ways to change the protocol. The search must find the harm of each that does any.
struct AreasMutations {
  Waits waits = Waits::kForAll;
  bool headers_at_once = false;      // only rows wait for announcements
  bool release_next_too = false;     // with an operation, what is there of the next one
  bool stale_counts = false;         // a mover takes the counts of the operation before
  bool one_slot = false;             // of announcements
  bool announce_early = false;       // a rank announces k + 1 before it has received k
  bool fixed_areas = false;          // one area is packed always, the other one receives
  bool wait_for_own_mover = false;   // a send begins when what its rank has sent has left
  bool no_lane_check = false;        // a send may begin before the lane's previous recv
};

struct AreasAction {
  Kind kind;
  uint8_t rank;   // who packs, announces, releases or reads; the source of what is copied or raised
  uint8_t peer;   // index of the other end
  uint8_t lane;
  uint8_t where;  // pack, read: stream; copy, raise: parity
};

constexpr int kMostRows = 2;                                     // of a message
constexpr std::array<uint8_t, 3> kRowCounts = {1, kMostRows, 0};  // of messages, in turn
constexpr int kAreaCells = 3;                                    // of three messages, or of two

// How large the operations of each lane are, in turn: L or s, over and over; and the rows of large
// ones.
template <int kRanks>
struct Shapes {
  std::vector<std::string> sizes;

  static constexpr int kOwn = kRanks - 1;  // peer index of the rank itself

  bool Large(int lane, int64_t number) const {
    const std::string& of_lane = sizes[static_cast<size_t>(lane)];
    return of_lane[static_cast<size_t>(number - 1) % of_lane.size()] == 'L';
  }
  // Of the message to the peer at an index.
  int Rows(int64_t number, int i) const {
    return kRowCounts[static_cast<size_t>(number + i + 1) % kRowCounts.size()];
  }
  int ChunkCount(int lane, int64_t number, int i) const {
    return Large(lane, number) ? std::max(1, Rows(number, i)) : 1;
  }
  int PackedAt(int64_t number, int i) const {
    int cell = 0;
    for (int before = 0; before < i; ++before) cell += Rows(number, before);
    return cell;
  }
  // Of the message from the peer at an index.
  int RowsFrom(int64_t number, int i) const { return Rows(number, kRanks - 2 - i); }
  int ChunksFrom(int lane, int64_t number, int i) const {
    return ChunkCount(lane, number, kRanks - 2 - i);
  }
  int ReceivedAt(int64_t number, int i) const {
    int cell = 0;
    for (int before = 0; before < i; ++before) cell += RowsFrom(number, before);
    return cell;
  }
};

// Which row a cell holds; 0: none. Relative to the rank whose memory it is.
using Cell = uint8_t;
constexpr Cell CellOf(int64_t number, bool received, int peer, int row) {
  return static_cast<Cell>(number << 4 | int{received} << 3 | peer << 1 | row);
}

template <int kRanks, int kLanes>
struct AreasState {
  struct Channel {  // one parity, source and destination
    uint8_t send_region, recv_region;        // operation whose header, or message, lies there
    uint8_t number, handed, copied, raised;  // the mover's message, in chunks
    uint8_t arrived_number, arrived_chunks;  // the signal, cut to the bits in use
  };
  struct Lane {
    Channel to_peer[kParities][kRanks - 1];
    Cell areas[kParities][kAreaCells];
    uint8_t announced[kParities];          // number in the words of this rank
    uint8_t released;                      // last large operation that the mover has released
    uint8_t sent, received;                // LaneState
    uint8_t packed;                        // chunks of the send that runs now
    std::array<uint8_t, kRanks - 1> read;  // chunks of the recv that runs now, by peer index
  };
  struct Rank {
    Lane lanes[kLanes];
    uint8_t next_call[kLanes];  // by stream
  };
  std::array<Rank, kRanks> ranks;
};

// Whether what the rank has sent on a lane has left.
template <typename Lane>
bool Drained(const Lane& lane) {
  for (const auto& channels : lane.to_peer) {
    for (const auto& channel : channels) {
      if (channel.raised != channel.handed) return false;
    }
  }
  return true;
}

// What is wrong with writing a row of `number` into a cell of a rank's area, or nullptr.
template <typename Lane>
const char* Overwrites(const Lane& lane, int32_t area, int at, int64_t number) {
  if (at >= kAreaCells) return "a payload ends outside the area";
  const Cell cell = lane.areas[area][at];
  const int64_t there = cell >> 4;
  const bool received = (cell >> 3 & 1) != 0;
  const int i = cell >> 1 & 3, row = cell & 1;
  const bool own = i == static_cast<int>(lane.read.size());
  if (there == 0) return nullptr;
  if (there == number) return "overlap: two payloads of one operation";
  if (!received && own) {
    return there > lane.received ? "own rows overwritten before they were read" : nullptr;
  }
  if (!received) {
    const auto& channel = lane.to_peer[ParityOf(there)][i];
    const bool left = channel.number != there || channel.copied > row;
    return left ? nullptr : "rows overwritten before they left";
  }
  const bool read = there <= lane.received || (there == lane.received + 1 && lane.read[i] > row);
  return read ? nullptr : "rows overwritten before they were read";
}

}  // namespace smfree::model

#endif  // SMFREE_TESTS_CPP_AREAS_STATE_H_
