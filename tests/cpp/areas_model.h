// SPDX-License-Identifier: Apache-2.0
//
// A model of large operations (csrc/protocol/PROTOCOL.md, "Large operations"), whose rows stand in
// two areas at offsets that follow from announced counts, mixed with small ones, whose rows stand
// in their messages' regions. It is searched like protocol_model.h, from which it takes its steps,
// what it abstracts and why; a dispatch and a combine are the same here. Two steps are new:
//
//   announce  S2   the words of a rank become visible, at any time after its send has begun
//   release   S5   a mover finds the words of all ranks: the rows of its rank may be copied
//
// A cell of an area is one row, a chunk is one row, and every cell says which row it holds. So a
// wrong offset shows as an overlap, or as a stale copy or read. Announcements that a mover sees
// late, or one by one, are a release that comes late; a word that is replaced before all movers
// have seen it is a violation.
//
// Payloads lie in the order of the ranks as seen from the area's rank, beginning with the next one,
// not from rank 0, and counts depend on the distance of two ranks, not on the ranks. So that ranks
// stay interchangeable, any order would do that all know.
#ifndef SMFREE_TESTS_CPP_AREAS_MODEL_H_
#define SMFREE_TESTS_CPP_AREAS_MODEL_H_

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "csrc/protocol/lanes.h"
#include "csrc/protocol/signals.h"
#include "tests/cpp/areas_state.h"
#include "tests/cpp/model_program.h"

namespace smfree::model {

template <int kRanks, int kLanes>
class AreasModel {
 public:
  using StateT = AreasState<kRanks, kLanes>;
  using ActionT = AreasAction;

  // `sizes`: see Shapes.
  AreasModel(std::vector<Program> programs, std::vector<std::string> sizes,
             AreasMutations mutations)
      : programs_(std::move(programs)), shapes_{std::move(sizes)}, mutations_(mutations) {}

  static int Peer(int rank, int i) { return (rank + 1 + i) % kRanks; }
  static int IndexOf(int rank, int peer) { return (peer - rank - 1 + kRanks) % kRanks; }

  static StateT Renumbered(StateT state, int by) {
    std::rotate(state.ranks.begin(), state.ranks.begin() + by, state.ranks.end());
    return state;
  }

  void Enabled(const StateT& state, std::vector<AreasAction>& actions) const {
    actions.clear();
    for (uint8_t rank = 0; rank < kRanks; ++rank) {
      for (uint8_t s = 0; s < programs_[rank].size(); ++s) {
        if (const Call* call = CallOf(state, rank, s)) AddCall(state, rank, s, *call, actions);
      }
      for (uint8_t lane = 0; lane < kLanes; ++lane) {
        if (ToAnnounce(state, rank, lane) != kNoOperation) {
          actions.push_back({Kind::kAnnounce, rank, 0, lane, 0});
        }
        if (ToRelease(state, rank, lane) != kNoOperation) {
          actions.push_back({Kind::kRelease, rank, 0, lane, 0});
        }
        for (uint8_t parity = 0; parity < kParities; ++parity) {
          for (uint8_t i = 0; i < kRanks - 1; ++i) {
            AddMoves(state, {Kind::kCopy, rank, i, lane, parity}, actions);
          }
        }
      }
    }
  }

  const char* Apply(StateT& state, const AreasAction& action) const {
    switch (action.kind) {
      case Kind::kPack: return Pack(state, action);
      case Kind::kAnnounce: return Announce(state, action);
      case Kind::kRelease: return Release(state, action);
      case Kind::kCopy: return Copy(state, action);
      case Kind::kRaise: return Raise(state, action);
      case Kind::kRead: return Read(state, action);
      default: return nullptr;
    }
  }

  bool Finished(const StateT& state) const {
    return AllCallsMade(programs_, state);
  }

  std::string Describe(const StateT& state, const AreasAction& action) const {
    const Lane& lane = LaneOf(state, action);
    const Channel& channel = lane.to_peer[action.where % kParities][action.peer];
    const std::string rank = std::to_string(action.rank);
    const std::string peer = std::to_string(Peer(action.rank, action.peer));
    std::string text, number;
    switch (action.kind) {
      case Kind::kPack:
        text = "rank " + rank + "  pack  for all";
        number = std::to_string(lane.packed == 0 ? lane.sent + 1 : lane.sent) + ", chunk " +
                 std::to_string(lane.packed);
        break;
      case Kind::kAnnounce:
        text = "rank " + rank + "  announces";
        number = std::to_string(ToAnnounce(state, action.rank, action.lane));
        break;
      case Kind::kRelease:
        text = "mover   releases " + rank;
        number = std::to_string(ToRelease(state, action.rank, action.lane));
        break;
      case Kind::kRead:
        text = "rank " + rank + "  read  from " + peer;
        number = std::to_string(NumberToRead(lane, *CallOf(state, action.rank, action.where))) +
                 ", chunk " + std::to_string(lane.read[action.peer]);
        break;
      default:
        text = std::string("mover   ") + (action.kind == Kind::kCopy ? "copy  " : "raise ") + rank +
               " -> " + peer;
        number = std::to_string(channel.number) + ", chunk " +
                 std::to_string(action.kind == Kind::kCopy ? channel.copied : channel.raised);
    }
    text.resize(24, ' ');
    return text + "lane " + std::to_string(action.lane) + ", operation " + number;
  }

 private:
  using Channel = typename StateT::Channel;
  using Lane = typename StateT::Lane;
  static constexpr int kOwn = Shapes<kRanks>::kOwn;

  static Lane& LaneOf(StateT& state, const AreasAction& action) {
    return state.ranks[action.rank].lanes[action.lane];
  }
  static const Lane& LaneOf(const StateT& state, const AreasAction& action) {
    return state.ranks[action.rank].lanes[action.lane];
  }
  const Call* CallOf(const StateT& state, int rank, size_t stream) const {
    return NextCall(programs_, state, rank, stream);
  }
  static int64_t NumberToRead(const Lane& lane, const Call& call) {
    return call.phase == Phase::kRecvAgain ? lane.received : lane.received + 1;
  }

  int32_t PackedArea(int64_t number) const { return mutations_.fixed_areas ? 0 : ParityOf(number); }
  int32_t ReceivingArea(int64_t number) const { return kParities - 1 - PackedArea(number); }
  int32_t Slot(int64_t number) const { return mutations_.one_slot ? 0 : ParityOf(number); }

  // ---- what may happen

  void AddCall(const StateT& state, uint8_t rank, uint8_t s, const Call& call,
               std::vector<AreasAction>& actions) const {
    const Lane& lane = state.ranks[rank].lanes[call.lane];
    if (call.phase == Phase::kSend) {
      if (mutations_.wait_for_own_mover && lane.packed == 0 && !Drained(lane)) return;
      actions.push_back({Kind::kPack, rank, 0, call.lane, s});
      return;
    }
    const int64_t number = NumberToRead(lane, call);
    int here[kRanks - 1];  // chunks of each source
    bool all_begun = true;
    for (int i = 0; i < kRanks - 1; ++i) {
      const Channel& signal = From(state, rank, i, call.lane, number);
      here[i] = ChunksArrived(SignalValue(signal.arrived_number, signal.arrived_chunks), number);
      all_begun = all_begun && here[i] > 0;
    }
    if (!all_begun) return;  // where rows are follows from the headers of all
    for (uint8_t i = 0; i < kRanks - 1; ++i) {
      const int chunks = shapes_.ChunksFrom(call.lane, number, i);
      if (lane.read[i] < std::min(chunks, here[i])) {
        actions.push_back({Kind::kRead, rank, i, call.lane, s});
      }
    }
  }

  static const Channel& From(const StateT& state, int rank, int i, int lane, int64_t number) {
    const int source = Peer(rank, i);
    return state.ranks[source].lanes[lane].to_peer[ParityOf(number)][IndexOf(source, rank)];
  }

  // The operation whose words the rank has yet to announce, or kNoOperation.
  int64_t ToAnnounce(const StateT& state, int rank, int set) const {
    const Lane& lane = state.ranks[rank].lanes[set];
    const auto is_due = [&](int64_t number) {
      return number > 0 && shapes_.Large(set, number) &&
             lane.announced[Slot(number)] < number;
    };
    if (is_due(lane.sent)) return lane.sent;
    const bool early = mutations_.announce_early && lane.sent > lane.received &&
                       lane.packed == 0 && SendsAgain(state, rank, set);
    return early && is_due(lane.sent + 1) ? lane.sent + 1 : kNoOperation;
  }
  bool SendsAgain(const StateT& state, int rank, int lane) const {
    for (size_t s = 0; s < programs_[rank].size(); ++s) {
      const Stream& calls = programs_[rank][s];
      for (size_t next = state.ranks[rank].next_call[s]; next < calls.size(); ++next) {
        if (calls[next].lane == lane && calls[next].phase == Phase::kSend) return true;
      }
    }
    return false;
  }

  // The operation of which the rank's mover has chunks, and the words of all ranks.
  int64_t ToRelease(const StateT& state, int rank, int set) const {
    const Lane& lane = state.ranks[rank].lanes[set];
    int64_t number = lane.released + 1;
    while (number <= lane.sent && !shapes_.Large(set, number)) ++number;
    if (number > lane.sent || mutations_.waits != Waits::kForAll) return kNoOperation;
    for (const auto& other : state.ranks) {
      if (other.lanes[set].announced[Slot(number)] != number) return kNoOperation;
    }
    return number;
  }

  void AddMoves(const StateT& state, AreasAction move, std::vector<AreasAction>& actions) const {
    const Channel& channel = LaneOf(state, move).to_peer[move.where][move.peer];
    if (channel.copied != channel.raised) {
      move.kind = Kind::kRaise;
      actions.push_back(move);
    } else if (channel.copied < channel.handed && MayCopy(state, move, channel)) {
      actions.push_back(move);
    }
  }
  bool MayCopy(const StateT& state, const AreasAction& move, const Channel& channel) const {
    if (!shapes_.Large(move.lane, channel.number)) return true;
    if (mutations_.headers_at_once && channel.recv_region != channel.number) return true;
    if (mutations_.waits == Waits::kForAll) return channel.number <= LaneOf(state, move).released;
    if (mutations_.waits == Waits::kForNone) return true;
    const int receiver = Peer(move.rank, move.peer);
    for (int i = 0; i < IndexOf(receiver, move.rank); ++i) {
      const int64_t announced = AnnouncedBy(state, receiver, i, move.lane, channel.number);
      if (announced != channel.number) return false;
    }
    return true;
  }
  // Which operation's counts the peer at an index has announced, as a mover finds them.
  int64_t AnnouncedBy(const StateT& state, int rank, int i, int lane, int64_t number) const {
    return state.ranks[Peer(rank, i)].lanes[lane].announced[Slot(number)];
  }

  // ---- what then happens

  const char* Pack(StateT& state, const AreasAction& action) const {
    Lane& lane = LaneOf(state, action);
    int64_t number = lane.sent;
    if (lane.packed == 0) {
      LaneState shipping{lane.sent, mutations_.no_lane_check ? lane.sent : lane.received};
      if (BeginSend(shipping, number) != FaultKind::kNone) {
        return "lanes.h: two operations in flight on one lane";
      }
      lane.sent = static_cast<uint8_t>(shipping.sent);
    }
    const int chunk = lane.packed++;
    bool last = true;
    for (int i = 0; i < kRanks; ++i) {
      const int chunks = shapes_.ChunkCount(action.lane, number, i);
      last = last && chunk + 1 >= chunks;
      if (chunk >= chunks) continue;
      if (shapes_.Large(action.lane, number) && chunk < shapes_.Rows(number, i)) {
        const int at = shapes_.PackedAt(number, i) + chunk;
        if (const char* wrong = Overwrites(lane, PackedArea(number), at, number)) return wrong;
        lane.areas[PackedArea(number)][at] = CellOf(number, false, i, chunk);
      }
      if (i == kOwn) continue;
      Channel& channel = lane.to_peer[ParityOf(number)][i];
      if (chunk == 0) {
        if (channel.copied < channel.handed) return "send region overwritten before it was drained";
        if (channel.raised < channel.handed) return "message replaced before its signal was raised";
        channel.number = channel.send_region = static_cast<uint8_t>(number);
        channel.handed = channel.copied = channel.raised = 0;
      }
      ++channel.handed;
    }
    if (last) {
      lane.packed = 0;
      ++state.ranks[action.rank].next_call[action.where];
    }
    return nullptr;
  }

  const char* Announce(StateT& state, const AreasAction& action) const {
    const int64_t number = ToAnnounce(state, action.rank, action.lane);
    uint8_t& word = LaneOf(state, action).announced[Slot(number)];
    for (const auto& rank : state.ranks) {
      const bool seen = rank.lanes[action.lane].released >= word;
      if (!seen && mutations_.waits == Waits::kForAll) {
        return "an announcement is replaced before a mover has seen it";
      }
    }
    word = static_cast<uint8_t>(number);
    return nullptr;
  }

  const char* Release(StateT& state, const AreasAction& action) const {
    const int64_t number = ToRelease(state, action.rank, action.lane);
    Lane& lane = LaneOf(state, action);
    lane.released = mutations_.release_next_too ? lane.sent : static_cast<uint8_t>(number);
    return nullptr;
  }

  const char* Copy(StateT& state, const AreasAction& action) const {
    Lane& lane = LaneOf(state, action);
    Channel& channel = lane.to_peer[action.where][action.peer];
    const int receiver_rank = Peer(action.rank, action.peer);
    const int from = IndexOf(receiver_rank, action.rank);
    Lane& receiver = state.ranks[receiver_rank].lanes[action.lane];
    const int64_t number = channel.number;
    const int chunk = channel.copied;
    if (chunk == 0 && channel.recv_region != number) {
      const bool read = channel.recv_region <= receiver.received ||
                        (channel.recv_region == receiver.received + 1 && receiver.read[from] > 0);
      if (!read) return "recv region overwritten before it was read";
      if (channel.send_region != number) return "stale copy: header of another operation";
      channel.recv_region = channel.send_region;
      if (mutations_.headers_at_once) return nullptr;  // its rows follow
    }
    ++channel.copied;
    const bool has_row = chunk < shapes_.Rows(number, action.peer);
    if (!shapes_.Large(action.lane, number) || !has_row) return nullptr;

    int to = 0;  // summed as the mover does, from the words
    for (int i = 0; i < from; ++i) {
      const int64_t counts_of = mutations_.waits == Waits::kForNone
                                    ? AnnouncedBy(state, receiver_rank, i, action.lane, number)
                                    : number - int{mutations_.stale_counts};
      if (counts_of != kNoOperation) to += shapes_.RowsFrom(counts_of, i);
    }
    const Cell cell = lane.areas[PackedArea(number)][shapes_.PackedAt(number, action.peer) + chunk];
    const bool is_right = cell == CellOf(number, false, action.peer, chunk);
    if (!is_right) return "stale copy: other rows lie there";
    const int32_t area = ReceivingArea(number);
    if (const char* wrong = Overwrites(receiver, area, to + chunk, number)) return wrong;
    receiver.areas[area][to + chunk] = CellOf(number, true, from, chunk);
    return nullptr;
  }

  const char* Raise(StateT& state, const AreasAction& action) const {
    Channel& channel = LaneOf(state, action).to_peer[action.where][action.peer];
    const uint64_t value =
        SignalAfterChunk(channel.number, channel.raised++,
                         shapes_.ChunkCount(action.lane, channel.number, action.peer));
    channel.arrived_number = static_cast<uint8_t>(NumberOf(value));
    channel.arrived_chunks = static_cast<uint8_t>(value);
    return nullptr;
  }

  const char* Read(StateT& state, const AreasAction& action) const {
    Lane& lane = LaneOf(state, action);
    const int64_t number =
        NumberToRead(lane, *CallOf(state, action.rank, action.where));
    LaneState shipping{lane.sent, lane.received};
    if (!mutations_.no_lane_check && !MayReceive(shipping, number)) {
      return "lanes.h: recv of an operation that is not in flight";
    }
    const bool large = shapes_.Large(action.lane, number);
    const int32_t area = ReceivingArea(number);
    const int chunk = lane.read[action.peer]++;
    const Channel& channel = From(state, action.rank, action.peer, action.lane, number);
    if (channel.recv_region != number) return "stale read: header of another operation";
    if (large && chunk < shapes_.RowsFrom(number, action.peer) &&
        lane.areas[area][shapes_.ReceivedAt(number, action.peer) + chunk] !=
            CellOf(number, true, action.peer, chunk)) {
      return "stale read: other rows lie there";
    }
    for (int i = 0; i < kRanks - 1; ++i) {
      if (lane.read[i] < shapes_.ChunksFrom(action.lane, number, i)) return nullptr;
    }
    // The own rows are read last: what overwrites them is found at whatever time it does.
    for (int row = 0; large && row < shapes_.Rows(number, kOwn); ++row) {
      if (lane.areas[PackedArea(number)][shapes_.PackedAt(number, kOwn) + row] !=
          CellOf(number, false, kOwn, row)) {
        return "stale read: other rows lie where the own rows were packed";
      }
    }
    FinishRecv(shipping, number);
    lane.received = static_cast<uint8_t>(shipping.received);
    lane.read = {};
    ++state.ranks[action.rank].next_call[action.where];
    return nullptr;
  }

  std::vector<Program> programs_;  // by rank
  Shapes<kRanks> shapes_;
  AreasMutations mutations_;
};

}  // namespace smfree::model

#endif  // SMFREE_TESTS_CPP_AREAS_MODEL_H_
