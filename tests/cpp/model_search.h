// SPDX-License-Identifier: Apache-2.0
//
// Searches every state that a model can reach, breadth first, so that the first violation found has
// a shortest trace. A state without a possible step is one where every rank has finished, or a
// deadlock. The states form no cycles, since every step of our models adds to a count; so there is
// no livelock either.
//
// A model M has types StateT (compared as bytes) and ActionT, and
//
//   Enabled(state, actions)     every step that is possible
//   Apply(state, action)        takes it; what it violates, or nullptr
//   Finished(state)             whether every rank has
//   Describe(state, action)     for traces
//   Renumbered(state, i)        `state` with its ranks in the i-th of as many equivalent orders
//
// A step whose kind is Kind::kRaise is one by which the mover raises a signal.
#ifndef SMFREE_TESTS_CPP_MODEL_SEARCH_H_
#define SMFREE_TESTS_CPP_MODEL_SEARCH_H_

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "tests/cpp/model_program.h"

namespace smfree::model {

struct Verdict {
  size_t states = 0;
  const char* violation = nullptr;  // nullptr: none
  std::vector<std::string> trace;   // the steps that lead to it
};

// kAll takes every step from every state. kReduced searches fewer orders for the same violations,
// where all ranks run the same program:
//  - A signal is raised right behind its copy. A late signal only delays the reads that wait for
//    it, and these are delayed in every way anyhow. (That nothing replaces a message whose signal
//    has not been raised is left to the searches with kAll.)
//  - States that differ by renumbering the ranks count as one.
enum class Steps { kAll, kReduced };

template <typename M>
class Search {
 public:
  using StateT = typename M::StateT;
  using ActionT = typename M::ActionT;
  static_assert(std::has_unique_object_representations_v<StateT>, "states are compared as bytes");

  explicit Search(const M& model) : model_(model), table_(1 << 12, kEmpty) {}

  Verdict Run(Steps steps) {
    Add(StateT{}, kEmpty, ActionT{});
    std::vector<ActionT> actions;
    for (uint32_t at = 0; at < states_.size(); ++at) {
      model_.Enabled(states_[at], actions);
      if (actions.empty() && !model_.Finished(states_[at])) {
        return Result("deadlock: nobody can take a step, and not all have finished", at, {});
      }
      if (steps == Steps::kReduced) KeepOnlyARaise(actions);
      for (const ActionT& action : actions) {
        StateT next = states_[at];
        if (const char* violation = model_.Apply(next, action)) {
          return Result(violation, at, action);
        }
        Add(steps == Steps::kReduced ? Smallest(next) : next, at, action);
      }
    }
    return Result(nullptr, 0, {});
  }

 private:
  static constexpr uint32_t kEmpty = ~uint32_t{0};

  static void KeepOnlyARaise(std::vector<ActionT>& actions) {
    for (const ActionT action : actions) {
      if (action.kind == Kind::kRaise) return actions.assign(1, action);
    }
  }

  static StateT Smallest(const StateT& state) {
    StateT smallest = state;
    for (size_t i = 1; i < state.ranks.size(); ++i) {
      const StateT other = M::Renumbered(state, static_cast<int>(i));
      if (std::memcmp(&other, &smallest, sizeof(StateT)) < 0) smallest = other;
    }
    return smallest;
  }

  static size_t Hash(const StateT& state) {
    const char* bytes = reinterpret_cast<const char*>(&state);
    uint64_t hash = 0;
    for (size_t i = 0; i < sizeof(StateT); i += 8) {
      uint64_t word = 0;
      std::memcpy(&word, bytes + i, std::min<size_t>(8, sizeof(StateT) - i));
      hash = (hash ^ word) * 0x9E3779B97F4A7C15u;
      hash ^= hash >> 32;
    }
    return hash;
  }

  // Remembers `state` if it is new.
  void Add(const StateT& state, uint32_t parent, const ActionT& by) {
    if (2 * states_.size() >= table_.size()) Grow();
    const size_t mask = table_.size() - 1;
    size_t slot = Hash(state) & mask;
    for (; table_[slot] != kEmpty; slot = (slot + 1) & mask) {
      if (std::memcmp(&states_[table_[slot]], &state, sizeof(StateT)) == 0) return;
    }
    table_[slot] = static_cast<uint32_t>(states_.size());
    states_.push_back(state);
    parents_.push_back(parent);
    actions_.push_back(by);
  }

  void Grow() {
    table_.assign(4 * table_.size(), kEmpty);
    const size_t mask = table_.size() - 1;
    for (uint32_t i = 0; i < states_.size(); ++i) {
      size_t slot = Hash(states_[i]) & mask;
      while (table_[slot] != kEmpty) slot = (slot + 1) & mask;
      table_[slot] = i;
    }
  }

  Verdict Result(const char* violation, uint32_t at, std::optional<ActionT> last) const {
    Verdict verdict{states_.size(), violation, {}};
    if (violation == nullptr) return verdict;
    if (last) verdict.trace.push_back(model_.Describe(states_[at], *last));
    for (; parents_[at] != kEmpty; at = parents_[at]) {
      verdict.trace.insert(verdict.trace.begin(),
                           model_.Describe(states_[parents_[at]], actions_[at]));
    }
    return verdict;
  }

  const M& model_;
  std::vector<StateT> states_;  // in order of distance
  std::vector<uint32_t> parents_;
  std::vector<ActionT> actions_;
  std::vector<uint32_t> table_;  // open addressing, indices of states_
};

inline void PrintTrace(const Verdict& verdict) {
  for (size_t i = 0; i < verdict.trace.size(); ++i) {
    std::printf("    %2zu  %s\n", i + 1, verdict.trace[i].c_str());
  }
}

}  // namespace smfree::model

#endif  // SMFREE_TESTS_CPP_MODEL_SEARCH_H_
