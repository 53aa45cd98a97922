// SPDX-License-Identifier: Apache-2.0
//
// The relay: what a rank does for others between the two legs of an operation in hierarchical mode
// (PROTOCOL.md, R1 and R2). No thread waits in it: a relay is a receive, and what it does runs
// where receives complete.
//
// Its routing, `relay` [M,T,Q] in a handle, are places (places.h): the i-th row that the rank with
// this index in node n has sent here goes to the ranks of this node at relay[n,i,:].
#ifndef SMFREE_CSRC_CPU_PHASES_RELAY_H_
#define SMFREE_CSRC_CPU_PHASES_RELAY_H_

#include <cstdint>
#include <vector>

#include "csrc/cpu/exchange/exchange.h"
#include "csrc/cpu/rows/places.h"

namespace smfree::cpu {

// How many rows a relay gets and passes on.
struct RelayCounts {
  std::vector<int32_t> wire;  // [M] rows of each node's message on the wire leg
  std::vector<int32_t> node;  // [R] rows of each message on the node leg
};

// Checks that a relay's routing that comes back from the program is one that a dispatch can have
// made.
StatusOr<RelayCounts> CheckRelay(const GroupConfig& config, int64_t tokens, const int32_t* relay);

// Receives a dispatch: `unpack` gets the messages by source rank. `expected` describes them, but
// for the leg; its counts are empty, or those of the handle. In hierarchical mode the rank's relay
// comes first.
struct DispatchRelay {
  const int32_t* routing;  // [M,T,Q] of the handle; not used if expected.experts != 0
  int32_t* routing_out;    // [M,T,Q] filled in from the expert ids; null if expected.experts == 0
};
void ReceiveDispatch(Exchange& exchange, const Call& call, Expectation expected, Status arguments,
                     const DispatchRelay& relay, Unpacker unpack, Done done);

// Registers the relay of a combine that has been sent on the node leg: adds up what the ranks of
// the node return for each row, and sends one sum, rounded to the wire again, to where it came
// from. Copies `routing`.
void RelayCombine(Exchange& exchange, const char* phase, const Call& call, int32_t slots,
                  const RowFormat& format, const int32_t* routing, const RelayCounts& counts);

}  // namespace smfree::cpu

#endif  // SMFREE_CSRC_CPU_PHASES_RELAY_H_
