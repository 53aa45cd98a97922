// SPDX-License-Identifier: Apache-2.0
//
// A model of the protocol (csrc/protocol/PROTOCOL.md, direct mode) that can be searched
// exhaustively: all states of a few ranks that run a few operations, whatever the mover delays or
// lets overtake. Numbers, parities, the two-in-flight check and the signals are the shipping code
// of lanes.h and signals.h; the rest of a rank and the mover are modelled in steps:
//
//   pack   S1–S4   a rank packs the next chunk of its send for all peers, hands it to the mover
//   copy   S5      the mover copies the next chunk of one message
//   raise  S6      the mover raises `arrived` for it
//   read   S7–S10  a rank reads the next chunk of one source, once its signal vouches for it
//
// What is abstracted, and why that hides nothing:
//  - A chunk's rows are one cell that holds the number of the operation they belong to: mixing rows
//    of two operations in a region shows as a wrong number, or as an overwrite.
//  - A step is atomic. A copy that is slow, or reads while somebody writes, is caught as well: a
//    write is checked against everything that is not finished yet, so if two accesses could overlap
//    there is an order of the steps in which the later one finds the earlier one unfinished.
//  - A rank's message to itself is left out: program order alone protects it.
//  - Memory is sequentially consistent; PROTOCOL.md names the release and acquire behind each step.
//  - Between any two messages the mover keeps no order at all, also not between two messages of one
//    pair and lane: that is weaker than what any real mover does.
#ifndef SMFREE_TESTS_CPP_PROTOCOL_MODEL_H_
#define SMFREE_TESTS_CPP_PROTOCOL_MODEL_H_

#include <algorithm>
#include <array>
#include <cstdint>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "csrc/protocol/lanes.h"
#include "csrc/protocol/signals.h"
#include "tests/cpp/model_program.h"

namespace smfree::model {

// Ways to break the protocol. The search must find the harm of each.
struct Mutations {
  bool one_parity = false;            // every operation uses the same buffer set
  bool wait_for_mover = false;        // a send waits until its own mover has drained the set
  bool signal_first = false;          // the mover raises before it copies
  bool no_lane_check = false;         // a send may begin before the lane's previous recv
  bool one_signal_per_lane = false;   // both parities share a signal
  bool skip_empty_messages = false;   // rank 1 has no rows for rank 0 in odd operations: no message
};

struct Action {
  Kind kind;
  uint8_t rank;   // who packs or reads; the source of what is copied or raised
  uint8_t peer;   // index of the other end (see Model::Peer)
  uint8_t lane;
  uint8_t where;  // pack, read: stream; copy, raise: parity
};

template <int kRanks, int kLanes, int kChunks>
struct State {
  struct Channel {  // one lane, parity, source and destination
    std::array<uint8_t, kChunks> send_cells, recv_cells;  // operation whose rows lie there
    uint8_t number, handed, copied, raised;               // the mover's message, in chunks
    uint8_t arrived_number, arrived_chunks;               // the signal, cut to the bits in use
  };
  struct Lane {
    uint8_t sent, received;                // LaneState
    uint8_t packed;                        // chunks of the send that runs now
    std::array<uint8_t, kRanks - 1> read;  // chunks of the recv that runs now, by peer index
  };
  struct Rank {
    Channel to_peer[kLanes][kParities][kRanks - 1];
    Lane lanes[kLanes];
    uint8_t next_call[kLanes];  // by stream
  };
  // Peer indices are relative to the rank, so that renumbering the ranks in a circle rotates this.
  std::array<Rank, kRanks> ranks;
};

template <int kRanks, int kLanes, int kChunks>
class Model {
 public:
  using StateT = State<kRanks, kLanes, kChunks>;
  using ActionT = Action;

  Model(std::vector<Program> programs, Mutations mutations)
      : programs_(std::move(programs)), mutations_(mutations) {}

  // The rank at peer index i of a rank, and back.
  static int Peer(int rank, int i) { return (rank + 1 + i) % kRanks; }
  static int IndexOf(int rank, int peer) { return (peer - rank - 1 + kRanks) % kRanks; }

  static StateT Renumbered(StateT state, int by) {
    std::rotate(state.ranks.begin(), state.ranks.begin() + by, state.ranks.end());
    return state;
  }

  void Enabled(const StateT& state, std::vector<Action>& actions) const {
    actions.clear();
    for (uint8_t rank = 0; rank < kRanks; ++rank) {
      for (uint8_t s = 0; s < programs_[rank].size(); ++s) {
        if (const Call* call = CallOf(state, rank, s)) AddRankSteps(state, rank, s, *call, actions);
      }
    }
    for (uint8_t lane = 0; lane < kLanes; ++lane) {
      for (uint8_t parity = 0; parity < kParities; ++parity) {
        for (uint8_t source = 0; source < kRanks; ++source) {
          for (uint8_t i = 0; i < kRanks - 1; ++i) {
            const Channel& channel = state.ranks[source].to_peer[lane][parity][i];
            const bool turn_of_copy = (channel.copied == channel.raised) != mutations_.signal_first;
            const int done = turn_of_copy ? channel.copied : channel.raised;
            if (done == channel.handed) continue;
            actions.push_back({turn_of_copy ? Kind::kCopy : Kind::kRaise, source, i, lane, parity});
          }
        }
      }
    }
  }

  const char* Apply(StateT& state, const Action& action) const {
    switch (action.kind) {
      case Kind::kPack: return Pack(state, action);
      case Kind::kCopy: return Copy(state, action);
      case Kind::kRaise: return Raise(state, action);
      case Kind::kRead: return Read(state, action);
      default: return nullptr;
    }
  }

  bool Finished(const StateT& state) const {
    return AllCallsMade(programs_, state);
  }

  std::string Describe(const StateT& state, const Action& action) const {
    const bool by_mover = action.kind == Kind::kCopy || action.kind == Kind::kRaise;
    const auto& self = state.ranks[action.rank];
    const Lane& lane = self.lanes[action.lane];
    const Channel& channel = self.to_peer[action.lane][by_mover ? action.where : 0][action.peer];
    const std::string rank = std::to_string(action.rank);
    const std::string peer = std::to_string(Peer(action.rank, action.peer));
    std::string text;
    int64_t number = channel.number;
    int chunk = action.kind == Kind::kCopy ? channel.copied : channel.raised;
    if (by_mover) {
      text = "mover   " + std::string(action.kind == Kind::kCopy ? "copy  " : "raise ");
      text += rank + " -> " + peer;
    } else if (action.kind == Kind::kPack) {
      number = lane.packed == 0 ? lane.sent + 1 : lane.sent;
      chunk = lane.packed;
      text = "rank " + rank + "  pack  for all";
    } else {
      number = NumberToRead(lane, *CallOf(state, action.rank, action.where));
      chunk = lane.read[action.peer];
      text = "rank " + rank + "  read  from " + peer;
    }
    text.resize(24, ' ');
    return text + "lane " + std::to_string(action.lane) + ", operation " + std::to_string(number) +
           ", chunk " + std::to_string(chunk);
  }

 private:
  using Channel = typename StateT::Channel;
  using Lane = typename StateT::Lane;

  const Call* CallOf(const StateT& state, int rank, size_t stream) const {
    return NextCall(programs_, state, rank, stream);
  }

  static int64_t NumberToRead(const Lane& lane, const Call& call) {
    return call.phase == Phase::kRecvAgain ? lane.received : lane.received + 1;
  }

  int32_t Parity(int64_t number) const { return mutations_.one_parity ? 0 : ParityOf(number); }

  bool HasMessage(int source, int destination, int64_t number) const {
    return !(mutations_.skip_empty_messages && source == 1 && destination == 0 && number % 2 == 1);
  }

  int32_t SignalParity(int32_t parity) const { return mutations_.one_signal_per_lane ? 0 : parity; }

  void AddRankSteps(const StateT& state, uint8_t rank, uint8_t s, const Call& call,
                    std::vector<Action>& actions) const {
    const Lane& lane = state.ranks[rank].lanes[call.lane];
    if (call.phase == Phase::kSend) {
      const auto& channels = state.ranks[rank].to_peer[call.lane][Parity(lane.sent + 1)];
      const bool drained = std::all_of(std::begin(channels), std::end(channels),
                                       [](const Channel& c) { return c.raised == c.handed; });
      if (mutations_.wait_for_mover && lane.packed == 0 && !drained) return;
      actions.push_back({Kind::kPack, rank, 0, call.lane, s});
      return;
    }
    const int64_t number = NumberToRead(lane, call);
    for (uint8_t i = 0; i < kRanks - 1; ++i) {
      const int source = Peer(rank, i);
      const Channel& signal = state.ranks[source].to_peer[call.lane][SignalParity(Parity(number))]
                                                         [IndexOf(source, rank)];
      const uint64_t arrived = SignalValue(signal.arrived_number, signal.arrived_chunks);
      if (lane.read[i] < kChunks && ChunksArrived(arrived, number) > lane.read[i]) {
        actions.push_back({Kind::kRead, rank, i, call.lane, s});
      }
    }
  }

  const char* Pack(StateT& state, const Action& action) const {
    Lane& lane = state.ranks[action.rank].lanes[action.lane];
    int64_t number = lane.sent;
    if (lane.packed == 0) {
      LaneState shipping{lane.sent, mutations_.no_lane_check ? lane.sent : lane.received};
      if (BeginSend(shipping, number) != FaultKind::kNone) {
        return "lanes.h: two operations in flight on one lane";
      }
      lane.sent = static_cast<uint8_t>(shipping.sent);
    }
    const int chunk = lane.packed++;
    for (int i = 0; i < kRanks - 1; ++i) {
      if (!HasMessage(action.rank, Peer(action.rank, i), number)) continue;
      Channel& channel = state.ranks[action.rank].to_peer[action.lane][Parity(number)][i];
      if (chunk == 0) {
        if (channel.copied < channel.handed) return "send region overwritten before it was drained";
        if (channel.raised < channel.handed) return "message replaced before its signal was raised";
        channel.number = static_cast<uint8_t>(number);
        channel.handed = channel.copied = channel.raised = 0;
      }
      channel.send_cells[chunk] = static_cast<uint8_t>(number);
      ++channel.handed;
    }
    if (lane.packed == kChunks) {
      lane.packed = 0;
      ++state.ranks[action.rank].next_call[action.where];
    }
    return nullptr;
  }

  const char* Copy(StateT& state, const Action& action) const {
    Channel& channel = state.ranks[action.rank].to_peer[action.lane][action.where][action.peer];
    const int chunk = channel.copied++;
    const int receiver_rank = Peer(action.rank, action.peer);
    const Lane& receiver = state.ranks[receiver_rank].lanes[action.lane];
    const int there = channel.recv_cells[chunk];
    const bool read_by_running_recv = there == receiver.received + 1 &&
                                      receiver.read[IndexOf(receiver_rank, action.rank)] > chunk;
    if (there > receiver.received && !read_by_running_recv) {
      return "recv region overwritten before it was read";
    }
    channel.recv_cells[chunk] = channel.send_cells[chunk];
    return nullptr;
  }

  const char* Raise(StateT& state, const Action& action) const {
    Channel& channel = state.ranks[action.rank].to_peer[action.lane][action.where][action.peer];
    const uint64_t value = SignalAfterChunk(channel.number, channel.raised++, kChunks);
    Channel& signal =
        state.ranks[action.rank].to_peer[action.lane][SignalParity(action.where)][action.peer];
    signal.arrived_number = static_cast<uint8_t>(NumberOf(value));
    signal.arrived_chunks = static_cast<uint8_t>(value);
    return nullptr;
  }

  const char* Read(StateT& state, const Action& action) const {
    const int rank = action.rank;
    Lane& lane = state.ranks[rank].lanes[action.lane];
    const int64_t number = NumberToRead(lane, *CallOf(state, rank, action.where));
    LaneState shipping{lane.sent, lane.received};
    if (!mutations_.no_lane_check && !MayReceive(shipping, number)) {
      return "lanes.h: recv of an operation that is not in flight";
    }
    const int source = Peer(rank, action.peer);
    const int chunk = lane.read[action.peer]++;
    const Channel& channel =
        state.ranks[source].to_peer[action.lane][Parity(number)][IndexOf(source, rank)];
    if (channel.recv_cells[chunk] != number) return "stale read: rows of another operation";

    for (int i = 0; i < kRanks - 1; ++i) {
      if (lane.read[i] < kChunks && HasMessage(Peer(rank, i), rank, number)) return nullptr;
    }
    FinishRecv(shipping, number);
    lane.received = static_cast<uint8_t>(shipping.received);
    lane.read = {};
    ++state.ranks[rank].next_call[action.where];
    return nullptr;
  }

  std::vector<Program> programs_;  // by rank
  Mutations mutations_;
};

}  // namespace smfree::model

#endif  // SMFREE_TESTS_CPP_PROTOCOL_MODEL_H_
