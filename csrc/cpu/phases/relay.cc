// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/phases/relay.h"

#include <algorithm>
#include <memory>
#include <numeric>
#include <string>
#include <utility>

#include "csrc/core/describe.h"
#include "csrc/core/errors.h"
#include "csrc/cpu/phases/handle.h"
#include "csrc/cpu/processes/outbox.h"

namespace smfree::cpu {
namespace {

// What one rank relays in one operation.
struct Relay {
  Exchange& exchange;
  const char* phase;
  Call call;
  int32_t experts, slots;  // that ride along with each row, or 0
  int32_t stride;          // of its rows
  RelayCounts counts;
  const int32_t* routing;  // [M,T,Q]

  Places OfNode(int32_t node) const {
    const int32_t width = PlacesPerNode(exchange.config());
    return {routing + node * call.tokens * width, call.tokens, width};
  }
};

// The routing of rows that carry expert ids.
void Route(Relay& relay, const std::vector<Message>& messages, int32_t* routing) {
  const GroupConfig& config = relay.exchange.config();
  const Nodes& nodes = relay.exchange.nodes();
  const int32_t width = PlacesPerNode(config);
  const int32_t first_rank = relay.call.rank - nodes.IndexOf(relay.call.rank);
  relay.counts.node.assign(static_cast<size_t>(nodes.num_ranks), 0);
  std::fill_n(routing, nodes.count() * relay.call.tokens * width, -1);
  for (int32_t node = 0; node < nodes.count(); ++node) {
    const Message& message = messages[static_cast<size_t>(node)];
    relay.counts.wire.push_back(message.header.rows);
    PlaceByExpert(config, relay.call.tokens, message.experts(), message.header.rows, first_rank,
                  nodes.ranks_per_node, width, routing + node * relay.call.tokens * width,
                  relay.counts.node.data() + node * nodes.ranks_per_node);
  }
}

// Calls visit(node, rows of its messages before it) for every node.
template <typename Visit>
void ForEachNode(const Relay& relay, const Visit& visit) {
  const Nodes& nodes = relay.exchange.nodes();
  int64_t rows_before = 0;
  for (int32_t node = 0; node < nodes.count(); ++node) {
    visit(node, rows_before);
    const auto first = relay.counts.node.begin() + node * nodes.ranks_per_node;
    rows_before = std::accumulate(first, first + nodes.ranks_per_node, rows_before);
  }
}

// What is not taken from the wire is not in the routing, so that no sum is returned for it. (It is
// here all the same, since messages have memory of their own; the receivers count what they miss.)
void ForgetNotTaken(const Relay& relay, int32_t* routing) {
  const GroupConfig& config = relay.exchange.config();
  const int64_t size = relay.call.tokens * PlacesPerNode(config);
  ForEachNode(relay, [&](int32_t node, int64_t rows_before) {
    if (IsTaken(rows_before, WireRows(config, relay.call.tokens))) return;
    std::fill_n(routing + node * size, size, -1);
  });
}

// Whether the messages on the wire have the rows of the handle, or none of them was taken.
Status CheckTaken(const Relay& relay, const Expectation& expected,
                  const std::vector<Message>& messages) {
  Status status;
  ForEachNode(relay, [&](int32_t node, int64_t rows_before) {
    const MessageHeader& header = messages[static_cast<size_t>(node)].header;
    const int32_t rows = relay.counts.wire[static_cast<size_t>(node)];
    const bool taken =
        IsTaken(rows_before, WireRows(relay.exchange.config(), relay.call.tokens));
    if (header.rows == rows || (rows == 0 && !taken)) return;
    status = ScheduleMismatch(DescribeCall(expected.phase, expected.rank, expected.identity),
                              std::to_string(rows) + " rows by its handle",
                              std::to_string(header.rows), header.source);
  });
  return status;
}

// R2 of a dispatch. The messages have all rows; which of them are handed on they say.
Status Forward(const Relay& relay, const std::vector<Message>& messages) {
  Exchange& exchange = relay.exchange;
  const Nodes& nodes = exchange.nodes();
  Outbox outbox(exchange, relay.phase, Operation::kDispatch, relay.call, kNode);
  const Status status =
      outbox.Allocate(relay.counts.node.data(), relay.experts, relay.slots, relay.stride);
  if (!status.ok()) return status;
  for (int32_t node = 0; node < nodes.count(); ++node) {
    const Message& message = messages[static_cast<size_t>(node)];
    PackAtPlaces(exchange,
                 {message.header.rows, RowsOfMessage(message.row(0), relay.stride),
                  relay.experts ? message.experts() : nullptr,
                  relay.slots ? message.slots() : nullptr},
                 relay.OfNode(node), node * nodes.ranks_per_node, outbox);
  }
  ForEachNode(relay, [&](int32_t node, int64_t rows_before) {
    for (int32_t index = 0; index < nodes.ranks_per_node; ++index) {
      const int32_t region = node * nodes.ranks_per_node + index;
      const int32_t rows = relay.counts.node[static_cast<size_t>(region)];
      const int64_t capacity = WireRows(exchange.config(), relay.call.tokens);
      outbox.HandOn(region, static_cast<int32_t>(KeptRows(rows_before, rows, capacity)));
      rows_before += rows;
    }
  });
  outbox.Post();
  return Status();
}

// R2 of a combine.
Status Reduce(const Relay& relay, const RowFormat& format, const std::vector<Message>& messages) {
  Exchange& exchange = relay.exchange;
  const Nodes& nodes = exchange.nodes();
  Outbox outbox(exchange, relay.phase, Operation::kCombine, relay.call, kWire);
  const Status status =
      outbox.Allocate(relay.counts.wire.data(), 0, relay.slots, relay.stride);
  if (!status.ok()) return status;
  for (int32_t node = 0; node < nodes.count(); ++node) {
    SumAtPlaces(
        exchange, messages, relay.OfNode(node), node * nodes.ranks_per_node, format,
        {relay.counts.wire[static_cast<size_t>(node)], relay.slots ? outbox.slots(node) : nullptr,
         [&](RowSum& sum, int64_t row) { sum.Pack(outbox.row(node, row)); }});
  }
  outbox.Post();
  return Status();
}

}  // namespace

StatusOr<RelayCounts> CheckRelay(const GroupConfig& config, int64_t tokens, const int32_t* relay) {
  const Nodes nodes = NodesOf(config);
  const int32_t width = PlacesPerNode(config);
  RelayCounts counts;
  for (int32_t node = 0; node < nodes.count(); ++node) {
    const Places places{relay + node * tokens * width, tokens, width};
    auto to_ranks = CountPlaces(places, tokens, nodes.ranks_per_node);
    if (!to_ranks.ok()) return to_ranks.status();
    counts.node.insert(counts.node.end(), to_ranks.value().begin(), to_ranks.value().end());
    int32_t rows = 0;
    while (rows < tokens && places.data[rows * width] >= 0) ++rows;
    for (int64_t row = rows; row < tokens; ++row) {
      if (places.data[row * width] < 0) continue;
      return Status(FaultKind::kInvalidArgument, BrokenPlace(rows, -1));
    }
    counts.wire.push_back(rows);
  }
  return counts;
}

void ReceiveDispatch(Exchange& exchange, const Call& call, Expectation expected, Status arguments,
                     const DispatchRelay& relay, Unpacker unpack, Done done) {
  if (!exchange.nodes().hierarchical) {
    if (relay.routing_out != nullptr) *relay.routing_out = -1;
    return exchange.Expect(expected, arguments, std::move(unpack), std::move(done));
  }
  auto state = std::make_shared<Relay>(Relay{exchange, expected.phase, call, expected.experts,
                                             expected.slots, expected.stride, {},
                                             relay.routing});
  const bool routed = expected.experts != 0;
  if (!routed && arguments.ok()) {
    auto counts = CheckRelay(exchange.config(), call.tokens, relay.routing);
    if (counts.ok()) state->counts = std::move(counts.value());
    arguments = counts.status();
  }
  const Expectation on_wire = expected;
  expected.leg = kNode;
  exchange.Expect(
      on_wire, arguments,
      [state, routed, on_wire, routing_out = relay.routing_out](
          const std::vector<Message>& messages) {
        if (routed) {
          Route(*state, messages, routing_out);
          state->routing = routing_out;
        } else if (const Status taken = CheckTaken(*state, on_wire, messages); !taken.ok()) {
          return taken;
        }
        const Status status = Forward(*state, messages);
        if (routed) ForgetNotTaken(*state, routing_out);
        return status;
      },
      [&exchange, expected = std::move(expected), unpack = std::move(unpack),
       done = std::move(done)](const Status& forwarded) mutable {
        if (!forwarded.ok()) return done(forwarded);
        exchange.Expect(expected, Status(), std::move(unpack), std::move(done));
      });
}

void RelayCombine(Exchange& exchange, const char* phase, const Call& call, int32_t slots,
                  const RowFormat& format, const int32_t* routing, const RelayCounts& counts) {
  const int64_t size =
      exchange.nodes().count() * call.tokens * PlacesPerNode(exchange.config());
  auto copy = std::make_shared<const std::vector<int32_t>>(routing, routing + size);
  Relay relay{exchange, phase, call, 0, slots, format.stride, counts, copy->data()};
  Expectation expected;
  expected.phase = phase;
  expected.rank = call.rank;
  expected.identity = WithOperation(call.identity, Operation::kCombine);
  expected.tokens = call.tokens;
  expected.slots = slots;
  expected.stride = format.stride;
  expected.leg = kNode;
  expected.counts = counts.node;
  expected.may_be_cut = MayCut(exchange.config(), call.tokens);
  exchange.Expect(
      expected, Status(),
      [relay = std::move(relay), copy = std::move(copy),
       format](const std::vector<Message>& messages) {
        return Reduce(relay, format, messages);
      },
      [](const Status&) {});  // a failure is the group's, and combine_recv says so
}

}  // namespace smfree::cpu
