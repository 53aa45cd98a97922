// SPDX-License-Identifier: Apache-2.0
//
// What a group counts, on both backends.
#ifndef SMFREE_CSRC_CORE_STATS_H_
#define SMFREE_CSRC_CORE_STATS_H_

#include <cstdint>
#include <map>
#include <string>

#include "csrc/protocol/phase.h"

namespace smfree {

struct PhaseStats {
  int64_t calls = 0;
  int64_t rows = 0;     // of the messages that the phase itself sends or unpacks
  int64_t bytes = 0;    // of these rows
  int64_t wait_ns = 0;  // of a recv: from its begin until the last message that it waited for
};

struct Stats {
  PhaseStats phases[kPhases];
  int64_t internode_bytes[2] = {};  // by Operation: sent from one node to another
  int64_t rows_relayed = 0;         // that relays sent on, in hierarchical mode
  int64_t bytes_relayed = 0;
  int64_t rows_dropped = 0;  // copies that exceeded wire_capacity or recv_capacity

  PhaseStats& of(Phase phase) { return phases[static_cast<int32_t>(phase)]; }
  const PhaseStats& of(Phase phase) const { return phases[static_cast<int32_t>(phase)]; }
  int64_t& internode(Operation operation) {
    return internode_bytes[static_cast<int32_t>(operation)];
  }
};

// By the names that EpGroup.stats documents.
using Counters = std::map<std::string, int64_t>;
inline Counters CountersOf(const Stats& stats) {
  Counters counters{{"rows_relayed", stats.rows_relayed},
                    {"bytes_relayed", stats.bytes_relayed},
                    {"rows_dropped", stats.rows_dropped}};
  for (const Operation operation : {Operation::kDispatch, Operation::kCombine}) {
    counters[std::string(Name(operation)) + "_internode_bytes"] =
        stats.internode_bytes[static_cast<int32_t>(operation)];
  }
  for (int32_t i = 0; i < kPhases; ++i) {
    const auto phase = static_cast<Phase>(i);
    const std::string name = Name(phase);
    counters[name + "_calls"] = stats.phases[i].calls;
    counters[name + "_rows"] = stats.phases[i].rows;
    counters[name + "_bytes"] = stats.phases[i].bytes;
    if (!IsSend(phase)) counters[name + "_wait_ns"] = stats.phases[i].wait_ns;
  }
  return counters;
}

}  // namespace smfree

#endif  // SMFREE_CSRC_CORE_STATS_H_
