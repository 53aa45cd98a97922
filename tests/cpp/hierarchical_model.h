// SPDX-License-Identifier: Apache-2.0
//
// A model of the hierarchical mode (csrc/protocol/PROTOCOL.md) for two nodes of two ranks, to be
// searched exhaustively: what protocol_model.h is for the direct mode, with the same abstractions.
// Operations are a dispatch, a combine, a dispatch, … on each lane. Steps:
//
//   pack   S1–S4   a rank packs its first leg, hands it to the mover
//   relay  R1, R2  a rank takes what has come on the first leg, packs its second leg
//   read   S7–S10  a rank reads what has come on the second leg
//   copy, raise    the mover, on either leg
//
// What is abstracted beyond that: on each leg a rank has one peer here, and the two messages that
// it exchanges with the peer of its node are one, since they are packed in one step and waited for
// in one. Messages are one chunk. A rank's messages to itself show as the order of its own steps.
#ifndef SMFREE_TESTS_CPP_HIERARCHICAL_MODEL_H_
#define SMFREE_TESTS_CPP_HIERARCHICAL_MODEL_H_

#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "csrc/protocol/lanes.h"
#include "csrc/protocol/nodes.h"
#include "csrc/protocol/signals.h"
#include "tests/cpp/model_program.h"

namespace smfree::model {

// Where the relay of a combine runs: in its send phase, which it holds up (a GPU's stream), or
// beside the calls of its rank (the CPU).
enum class Relays { kInTheCall, kBeside };

// Ways to break the protocol. The search must find the harm of each.
struct HierarchicalMutations {
  bool one_parity = false;           // every operation uses the same buffer set
  bool skip_empty_messages = false;  // rank 1 has no rows for node 1 in dispatches: no message
  bool relay_at_once = false;        // a relay does not wait for the first leg
};

constexpr Nodes kTwoByTwo{4, 2, true};

// A state with its nodes swapped, the indices in them, or both.
template <typename State>
State WithRanksSwapped(const State& state, int by) {
  State other = state;
  for (int rank = 0; rank < 4; ++rank) other.ranks[rank] = state.ranks[rank ^ by];
  return other;
}

template <int kLanes>
struct HierarchicalState {
  struct Channel {  // one lane, leg, parity and source
    uint8_t send_cell, recv_cell;  // operation whose rows lie there
    uint8_t handed, copied;        // the mover's message: to copy, to raise
    uint8_t arrived;               // number of the signal
  };
  struct Lane {
    uint8_t sent, received;  // LaneState
    uint8_t relayed;         // number of the last operation relayed
  };
  struct Rank {
    Channel to_peer[kLanes][kLegs][kParities];
    Lane lanes[kLanes];
    uint8_t next_call[kLanes];  // by stream
  };
  std::array<Rank, 4> ranks;
};

template <int kLanes>
class HierarchicalModel {
 public:
  using StateT = HierarchicalState<kLanes>;
  struct ActionT {
    Kind kind;
    uint8_t rank;   // who packs, relays or reads; the source of what is copied or raised
    uint8_t lane;
    uint8_t where;  // pack, relay, read: stream; copy, raise: leg * kParities + parity
  };

  HierarchicalModel(std::vector<Program> programs, Relays relays, HierarchicalMutations mutations)
      : programs_(std::move(programs)), relays_(relays), mutations_(mutations) {}

  // The other node's rank of the same index, or the other rank of the node.
  static int Peer(Leg leg, int rank) {
    return kTwoByTwo.Peer(leg, rank, leg == kWire ? 1 - kTwoByTwo.NodeOf(rank)
                                                  : 1 - kTwoByTwo.IndexOf(rank));
  }

  static StateT Renumbered(const StateT& state, int by) { return WithRanksSwapped(state, by); }

  void Enabled(const StateT& state, std::vector<ActionT>& actions) const {
    actions.clear();
    for (uint8_t rank = 0; rank < 4; ++rank) {
      for (uint8_t s = 0; s < programs_[rank].size(); ++s) {
        if (const Call* call = CallOf(state, rank, s)) AddCallStep(state, rank, s, *call, actions);
      }
      for (uint8_t lane = 0; lane < kLanes; ++lane) {
        const auto& own = state.ranks[rank];
        const int64_t number = own.lanes[lane].relayed + 1;
        const bool beside = relays_ == Relays::kBeside && IsCombine(number);
        if (beside && own.lanes[lane].sent >= number &&
            FirstLegArrived(state, rank, lane, number)) {
          actions.push_back({Kind::kRelay, rank, lane, kNoStream});
        }
        for (uint8_t set = 0; set < kLegs * kParities; ++set) {
          const Channel& channel = own.to_peer[lane][set / kParities][set % kParities];
          if (channel.handed) actions.push_back({Kind::kCopy, rank, lane, set});
          if (channel.copied) actions.push_back({Kind::kRaise, rank, lane, set});
        }
      }
    }
  }

  const char* Apply(StateT& state, const ActionT& action) const {
    switch (action.kind) {
      case Kind::kPack: return Pack(state, action);
      case Kind::kRelay: return Relay(state, action);
      case Kind::kRead: return Read(state, action);
      case Kind::kCopy: return Copy(state, action);
      case Kind::kRaise: return Raise(state, action);
      default: return nullptr;
    }
  }

  bool Finished(const StateT& state) const {
    return AllCallsMade(programs_, state);
  }

  std::string Describe(const StateT& state, const ActionT& action) const {
    static constexpr const char* kNames[] = {"pack ", "copy ", "raise", "relay", "read "};
    const auto& own = state.ranks[action.rank];
    const Lane& lane = own.lanes[action.lane];
    const bool by_mover = action.kind == Kind::kCopy || action.kind == Kind::kRaise;
    const int64_t number = action.kind == Kind::kPack    ? lane.sent + 1
                           : action.kind == Kind::kRelay ? lane.relayed + 1
                           : action.kind == Kind::kRead  ? lane.received + 1
                                                         : ChannelOf(own, action).send_cell;
    std::string text = (by_mover ? "mover of " : "rank ") + std::to_string(action.rank);
    text.resize(12, ' ');
    text += std::string(kNames[static_cast<int>(action.kind)]) + "  lane " +
            std::to_string(action.lane) + ", " + (IsCombine(number) ? "combine " : "dispatch ") +
            std::to_string(number);
    if (!by_mover) return text;
    const Leg leg = static_cast<Leg>(action.where / kParities);
    return text + (leg == kWire ? ", wire to " : ", node to ") +
           std::to_string(Peer(leg, action.rank));
  }

 private:
  using Rank = typename StateT::Rank;
  using Channel = typename StateT::Channel;
  using Lane = typename StateT::Lane;
  static constexpr uint8_t kNoStream = 255;

  static bool IsCombine(int64_t number) { return number % 2 == 0; }
  static Leg FirstLeg(int64_t number) { return kTwoByTwo.FirstLeg(OperationOf(number)); }
  static Leg LastLeg(int64_t number) { return kTwoByTwo.LastLeg(OperationOf(number)); }
  static Operation OperationOf(int64_t number) {
    return IsCombine(number) ? Operation::kCombine : Operation::kDispatch;
  }

  int32_t Parity(int64_t number) const { return mutations_.one_parity ? 0 : ParityOf(number); }

  // Whether there is one on the first leg from `source`.
  bool HasMessage(int source, int64_t number) const {
    return !(mutations_.skip_empty_messages && source == 1 && !IsCombine(number));
  }

  template <typename AnyRank>
  static auto& ChannelOf(AnyRank& rank, const ActionT& action) {
    return rank.to_peer[action.lane][action.where / kParities][action.where % kParities];
  }

  // What comes to `rank`.
  const Channel& From(const StateT& state, Leg leg, int rank, int lane, int64_t number) const {
    return state.ranks[Peer(leg, rank)].to_peer[lane][leg][Parity(number)];
  }

  const Call* CallOf(const StateT& state, int rank, size_t stream) const {
    return NextCall(programs_, state, rank, stream);
  }

  static bool Arrived(const Channel& channel, int64_t number) {
    return AllArrived(SignalValue(channel.arrived, kAllChunks), number);
  }

  bool FirstLegArrived(const StateT& state, int rank, int lane, int64_t number) const {
    const Leg leg = FirstLeg(number);
    return mutations_.relay_at_once || !HasMessage(Peer(leg, rank), number) ||
           Arrived(From(state, leg, rank, lane, number), number);
  }

  void AddCallStep(const StateT& state, uint8_t rank, uint8_t s, const Call& call,
                   std::vector<ActionT>& actions) const {
    const Lane& lane = state.ranks[rank].lanes[call.lane];
    const bool sending = call.phase == Phase::kSend;
    const int64_t number = lane.received + 1;
    const bool relays_here =
        IsCombine(number) ? sending && relays_ == Relays::kInTheCall : !sending;
    if (sending && !(relays_here && lane.sent == number)) {
      actions.push_back({Kind::kPack, rank, call.lane, s});
    } else if (relays_here && lane.relayed < number) {
      if (!FirstLegArrived(state, rank, call.lane, number)) return;
      actions.push_back({Kind::kRelay, rank, call.lane, s});
    } else if (Arrived(From(state, LastLeg(number), rank, call.lane, number), number) &&
               lane.relayed == number) {
      actions.push_back({Kind::kRead, rank, call.lane, s});
    }
  }

  const char* Pack(StateT& state, const ActionT& action) const {
    Rank& own = state.ranks[action.rank];
    Lane& lane = own.lanes[action.lane];
    LaneState shipping{lane.sent, lane.received};
    int64_t number = 0;
    if (BeginSend(shipping, number) != FaultKind::kNone) {
      return "lanes.h: two operations in flight on one lane";
    }
    lane.sent = static_cast<uint8_t>(shipping.sent);
    if (!IsCombine(number) || relays_ == Relays::kBeside) ++own.next_call[action.where];
    if (!HasMessage(action.rank, number)) return nullptr;
    return HandOver(own.to_peer[action.lane][FirstLeg(number)][Parity(number)], number);
  }

  const char* Relay(StateT& state, const ActionT& action) const {
    Rank& own = state.ranks[action.rank];
    Lane& lane = own.lanes[action.lane];
    const int64_t number = lane.relayed + 1;
    const Leg leg = FirstLeg(number);
    if (HasMessage(Peer(leg, action.rank), number) &&
        From(state, leg, action.rank, action.lane, number).recv_cell != number) {
      return "stale relay: rows of another operation";
    }
    lane.relayed = static_cast<uint8_t>(number);
    if (IsCombine(number) && action.where != kNoStream) ++own.next_call[action.where];
    return HandOver(own.to_peer[action.lane][LastLeg(number)][Parity(number)], number);
  }

  const char* Read(StateT& state, const ActionT& action) const {
    Rank& own = state.ranks[action.rank];
    Lane& lane = own.lanes[action.lane];
    const int64_t number = lane.received + 1;
    LaneState shipping{lane.sent, lane.received};
    if (!MayReceive(shipping, number)) return "lanes.h: recv of what is not in flight";
    if (From(state, LastLeg(number), action.rank, action.lane, number).recv_cell != number) {
      return "stale read: rows of another operation";
    }
    FinishRecv(shipping, number);
    lane.received = static_cast<uint8_t>(shipping.received);
    ++own.next_call[action.where];
    return nullptr;
  }

  static const char* HandOver(Channel& channel, int64_t number) {
    if (channel.handed) return "send region overwritten before it was drained";
    if (channel.copied) return "message replaced before its signal was raised";
    channel.send_cell = static_cast<uint8_t>(number);
    channel.handed = 1;
    return nullptr;
  }

  const char* Copy(StateT& state, const ActionT& action) const {
    Channel& channel = ChannelOf(state.ranks[action.rank], action);
    const Leg leg = static_cast<Leg>(action.where / kParities);
    const Lane& receiver = state.ranks[Peer(leg, action.rank)].lanes[action.lane];
    const int64_t there = channel.recv_cell;
    const int64_t read = leg == FirstLeg(there) ? receiver.relayed : receiver.received;
    if (there > read) return "recv region overwritten before it was read";
    channel.recv_cell = channel.send_cell;
    channel.handed = 0;
    channel.copied = 1;
    return nullptr;
  }

  static const char* Raise(StateT& state, const ActionT& action) {
    Channel& channel = ChannelOf(state.ranks[action.rank], action);
    channel.copied = 0;
    channel.arrived = channel.recv_cell;
    return nullptr;
  }

  std::vector<Program> programs_;  // by rank
  Relays relays_;
  HierarchicalMutations mutations_;
};

}  // namespace smfree::model

#endif  // SMFREE_TESTS_CPP_HIERARCHICAL_MODEL_H_
