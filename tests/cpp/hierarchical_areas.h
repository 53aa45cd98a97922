// SPDX-License-Identifier: Apache-2.0
//
// A model of large operations in hierarchical mode (csrc/protocol/PROTOCOL.md), for two nodes of
// two ranks: hierarchical_model.h, from which it takes its steps and what it abstracts, with the
// rows in areas. Every operation is large: a dispatch, a combine, a dispatch … One step is new:
//
//   announce  S2, R2   the words of a rank for a leg become visible, at any time after it has
//                      packed that leg
//
// On each leg a rank has one peer, and packs two payloads: for the peer and for itself. A payload
// is one cell of an area, and which of the two comes first changes from operation to operation, so
// that what is received lands where either has stood. A mover that finds the words late is one that
// copies late. What counts and offsets are is left to areas_model.h, where they are the same.
#ifndef SMFREE_TESTS_CPP_HIERARCHICAL_AREAS_H_
#define SMFREE_TESTS_CPP_HIERARCHICAL_AREAS_H_

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "csrc/protocol/lanes.h"
#include "csrc/protocol/nodes.h"
#include "tests/cpp/hierarchical_model.h"
#include "tests/cpp/model_program.h"

namespace smfree::model {

// Whose words a mover waits for before it copies a payload of a leg.
enum class LegWaits : uint8_t { kForMembers, kForItself, kForNobody };

// Ways to change the protocol. The search must find the harm of each that does any.
struct LegMutations {
  LegWaits waits[kLegs] = {LegWaits::kForMembers, LegWaits::kForMembers};
  bool announce_early = false;        // the first leg of k + 1 when k has been sent
  bool one_slot = false;              // of announcements
  bool fixed_areas = false;           // of each leg one area is packed always
  bool legs_share_areas = false;      // one pair of areas for both legs
  bool relay_at_once = false;         // a relay does not wait for the first leg
  bool first_leg_tells_all = false;   // the words of the first leg release the second one, too
};

struct HierarchicalAreasState {
  struct Cell {
    uint8_t number;  // 0: empty
    uint8_t kind;    // what stands there: packed for the peer, packed for itself, received
  };
  struct Leg {
    Cell areas[kParities][2];
    uint8_t announced[kParities];  // number in the words of this rank
    uint8_t handed, copied;        // the last operation whose message the mover has, has copied
    uint8_t raised[kParities];     // number of the signal at the peer
  };
  struct Rank {
    Leg legs[kLegs];
    uint8_t sent, received;  // LaneState
    uint8_t relayed;         // number of the last operation relayed
    uint8_t next_call[1];
  };
  std::array<Rank, 4> ranks;
};

class HierarchicalAreas {
 public:
  using StateT = HierarchicalAreasState;
  struct ActionT {
    Kind kind;
    uint8_t rank;
    uint8_t leg;  // announce, copy, raise
  };

  HierarchicalAreas(Stream calls, LegMutations mutations)
      : programs_(4, Program{std::move(calls)}), mutations_(mutations) {}

  static int Peer(int leg, int rank) {
    return HierarchicalModel<1>::Peer(static_cast<Leg>(leg), rank);
  }
  static StateT Renumbered(const StateT& state, int by) { return WithRanksSwapped(state, by); }

  void Enabled(const StateT& state, std::vector<ActionT>& actions) const {
    actions.clear();
    for (uint8_t rank = 0; rank < 4; ++rank) {
      const Rank& own = state.ranks[rank];
      if (const Call* call = NextCall(programs_, state, rank, 0)) {
        AddCallStep(state, rank, *call, actions);
      }
      for (uint8_t leg = 0; leg < kLegs; ++leg) {
        if (ToAnnounce(state, rank, leg) != 0) actions.push_back({Kind::kAnnounce, rank, leg});
        const LegState& mine = own.legs[leg];
        if (mine.raised[ParityOf(mine.copied)] != mine.copied) {
          actions.push_back({Kind::kRaise, rank, leg});
        } else if (mine.copied < mine.handed && MayCopy(state, rank, leg, mine.copied + 1)) {
          actions.push_back({Kind::kCopy, rank, leg});
        }
      }
    }
  }

  const char* Apply(StateT& state, const ActionT& action) const {
    Rank& own = state.ranks[action.rank];
    switch (action.kind) {
      case Kind::kPack: return Send(own);
      case Kind::kRelay: return Relay(state, action.rank);
      case Kind::kRead: return Read(state, action.rank);
      case Kind::kAnnounce: return Announce(state, action);
      case Kind::kCopy: return Copy(state, action);
      case Kind::kRaise:
        own.legs[action.leg].raised[ParityOf(own.legs[action.leg].copied)] =
            own.legs[action.leg].copied;
        return nullptr;
      default: return nullptr;
    }
  }

  bool Finished(const StateT& state) const { return AllCallsMade(programs_, state); }

  std::string Describe(const StateT& state, const ActionT& action) const {
    static constexpr const char* kNames[] = {"pack", "copy", "raise", "relay", "read", "announce"};
    const Rank& own = state.ranks[action.rank];
    const LegState& leg = own.legs[action.leg];
    const int number = action.kind == Kind::kPack       ? own.sent + 1
                       : action.kind == Kind::kRelay    ? own.relayed + 1
                       : action.kind == Kind::kRead     ? own.received + 1
                       : action.kind == Kind::kAnnounce ? ToAnnounce(state, action.rank, action.leg)
                       : action.kind == Kind::kCopy     ? leg.copied + 1
                                                        : leg.copied;
    std::string text = "rank " + std::to_string(action.rank) + "  " +
                       kNames[static_cast<int>(action.kind)] + " ";
    text.resize(17, ' ');
    text += (IsCombine(number) ? "combine " : "dispatch ") + std::to_string(number);
    const bool of_leg = action.kind == Kind::kAnnounce || action.kind == Kind::kCopy ||
                        action.kind == Kind::kRaise;
    return of_leg ? text + (action.leg == kWire ? ", wire" : ", node") : text;
  }

 private:
  using Rank = StateT::Rank;
  using LegState = StateT::Leg;
  using Cell = StateT::Cell;
  enum Kinds : uint8_t { kForPeer = 1, kForItself = 2, kReceived = 3 };

  static bool IsCombine(int number) { return number % 2 == 0; }
  static Operation OperationOf(int number) {
    return IsCombine(number) ? Operation::kCombine : Operation::kDispatch;
  }
  static int FirstLeg(int number) { return kTwoByTwo.FirstLeg(OperationOf(number)); }
  static int LastLeg(int number) { return kTwoByTwo.LastLeg(OperationOf(number)); }
  int Slot(int number) const { return mutations_.one_slot ? 0 : ParityOf(number); }

  // The area that `number` packs on a leg, or the one that it receives in.
  template <typename AnyRank>
  auto& Area(AnyRank& rank, int leg, int number, bool packed) const {
    const int parity = mutations_.fixed_areas ? 0 : ParityOf(number);
    return rank.legs[mutations_.legs_share_areas ? 0 : leg].areas[packed ? parity : 1 - parity];
  }
  static int CellFor(int number, Kinds kind) {
    if (kind == kReceived) return 0;
    return (number / 2 + int{kind == kForItself}) % 2;
  }

  // ---- what may happen

  bool Arrived(const StateT& state, int leg, int rank, int number) const {
    return state.ranks[Peer(leg, rank)].legs[leg].raised[ParityOf(number)] == number;
  }
  void AddCallStep(const StateT& state, uint8_t rank, const Call& call,
                   std::vector<ActionT>& actions) const {
    const Rank& own = state.ranks[rank];
    const bool sending = call.phase == Phase::kSend;
    const int number = own.received + 1;
    const bool relays_here = IsCombine(number) == sending;
    if (sending && !(relays_here && own.sent == number)) {
      actions.push_back({Kind::kPack, rank, 0});
    } else if (relays_here && own.relayed < number) {
      if (mutations_.relay_at_once || Arrived(state, FirstLeg(number), rank, number)) {
        actions.push_back({Kind::kRelay, rank, 0});
      }
    } else if (Arrived(state, LastLeg(number), rank, number)) {
      actions.push_back({Kind::kRead, rank, 0});
    }
  }

  // The operation whose words the rank announces next for a leg, or 0.
  int ToAnnounce(const StateT& state, int rank, int leg) const {
    const Rank& own = state.ranks[rank];
    const auto& words = own.legs[leg].announced;
    const int due = std::max(words[0], words[1]) + 1;
    if (due <= own.legs[leg].handed) return due;
    const bool early = mutations_.announce_early && own.sent > own.received &&
                       due == own.sent + 1 && FirstLeg(due) == leg &&
                       due <= static_cast<int>(programs_[rank][0].size()) / 2;
    return early ? due : 0;
  }

  bool MayCopy(const StateT& state, int rank, int leg, int number) const {
    const auto has_announced = [&](int member, int of_leg) {
      return state.ranks[member].legs[of_leg].announced[Slot(number)] == number;
    };
    const bool by_first = mutations_.first_leg_tells_all && leg == LastLeg(number);
    const int words = by_first ? FirstLeg(number) : leg;
    switch (mutations_.waits[leg]) {
      case LegWaits::kForNobody: return true;
      case LegWaits::kForItself: return has_announced(rank, words);
      default: return has_announced(rank, words) && has_announced(Peer(leg, rank), words);
    }
  }

  // ---- what then happens

  const char* Send(Rank& own) const {
    LaneState shipping{own.sent, own.received};
    int64_t number = 0;
    if (BeginSend(shipping, number) != FaultKind::kNone) return "lanes.h: two operations in flight";
    own.sent = static_cast<uint8_t>(shipping.sent);
    if (!IsCombine(own.sent)) ++own.next_call[0];
    return PackLeg(own, FirstLeg(own.sent), own.sent);
  }

  const char* PackLeg(Rank& own, int leg, int number) const {
    for (const Kinds kind : {kForPeer, kForItself}) {
      Cell& cell = Area(own, leg, number, /*packed=*/true)[CellFor(number, kind)];
      if (const char* wrong = Overwrites(own, leg, cell, number)) return wrong;
      cell = {static_cast<uint8_t>(number), kind};
    }
    own.legs[leg].handed = static_cast<uint8_t>(number);
    return nullptr;
  }

  // What is wrong with writing a payload of `number` over what stands in a rank's cell of a leg.
  const char* Overwrites(const Rank& rank, int leg, const Cell& cell, int number) const {
    const int there = cell.number;
    if (there == 0) return nullptr;
    if (there == number) return "overlap: two payloads of one operation";
    if (cell.kind == kForPeer) {
      return rank.legs[leg].copied < there ? "overwritten before it left" : nullptr;
    }
    const int read = leg == FirstLeg(there) ? rank.relayed : rank.received;
    return read < there ? "overwritten before it was read" : nullptr;
  }

  // What a rank finds of a leg when it reads it.
  const char* TakeLeg(const StateT& state, int rank, int leg, int number) const {
    const Rank& own = state.ranks[rank];
    const Cell& received = Area(own, leg, number, /*packed=*/false)[CellFor(number, kReceived)];
    if (received.number != number || received.kind != kReceived) return "stale read: other rows";
    const Cell& packed = Area(own, leg, number, /*packed=*/true)[CellFor(number, kForItself)];
    if (packed.number != number || packed.kind != kForItself) {
      return "stale read: other rows where the own ones were packed";
    }
    return nullptr;
  }

  const char* Relay(StateT& state, int rank) const {
    Rank& own = state.ranks[rank];
    const int number = own.relayed + 1;
    if (const char* wrong = TakeLeg(state, rank, FirstLeg(number), number)) return wrong;
    own.relayed = static_cast<uint8_t>(number);
    if (IsCombine(number)) ++own.next_call[0];
    return PackLeg(own, LastLeg(number), number);
  }

  const char* Read(StateT& state, int rank) const {
    Rank& own = state.ranks[rank];
    const int number = own.received + 1;
    LaneState shipping{own.sent, own.received};
    if (!MayReceive(shipping, number)) return "lanes.h: recv of what is not in flight";
    if (const char* wrong = TakeLeg(state, rank, LastLeg(number), number)) return wrong;
    own.received = static_cast<uint8_t>(number);
    ++own.next_call[0];
    return nullptr;
  }

  const char* Announce(StateT& state, const ActionT& action) const {
    const int number = ToAnnounce(state, action.rank, action.leg);
    uint8_t& word = state.ranks[action.rank].legs[action.leg].announced[Slot(number)];
    const bool seen = state.ranks[action.rank].legs[action.leg].copied >= word &&
                      state.ranks[Peer(action.leg, action.rank)].legs[action.leg].copied >= word;
    if (!seen) return "an announcement is replaced before a mover has seen it";
    word = static_cast<uint8_t>(number);
    return nullptr;
  }

  const char* Copy(StateT& state, const ActionT& action) const {
    Rank& own = state.ranks[action.rank];
    Rank& receiver = state.ranks[Peer(action.leg, action.rank)];
    const int number = own.legs[action.leg].copied + 1;
    const Cell& from = Area(own, action.leg, number, true)[CellFor(number, kForPeer)];
    if (from.number != number || from.kind != kForPeer) return "stale copy: other rows";
    Cell& to = Area(receiver, action.leg, number, false)[CellFor(number, kReceived)];
    if (const char* wrong = Overwrites(receiver, action.leg, to, number)) return wrong;
    to = {static_cast<uint8_t>(number), kReceived};
    own.legs[action.leg].copied = static_cast<uint8_t>(number);
    return nullptr;
  }

  std::vector<Program> programs_;  // by rank
  LegMutations mutations_;
};

}  // namespace smfree::model

#endif  // SMFREE_TESTS_CPP_HIERARCHICAL_AREAS_H_
