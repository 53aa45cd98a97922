// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/phases/relay.h"

#include <algorithm>
#include <memory>
#include <utility>

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
    const int64_t rows = message.header.rows;
    const MessageLayout layout(rows, config.top_k, config.top_k, relay.exchange.row_bytes());
    relay.counts.wire.push_back(message.header.rows);
    PlaceByExpert(config, relay.call.tokens, message.experts(layout), rows, first_rank,
                  nodes.ranks_per_node, width, routing + node * relay.call.tokens * width,
                  relay.counts.node.data() + node * nodes.ranks_per_node);
  }
}

// R2 of a dispatch.
Status Forward(const Relay& relay, const std::vector<Message>& messages) {
  Exchange& exchange = relay.exchange;
  const Nodes& nodes = exchange.nodes();
  Outbox outbox(exchange, relay.phase, Operation::kDispatch, relay.call, kNode);
  const Status status = outbox.Allocate(relay.counts.node.data(), relay.experts, relay.slots);
  if (!status.ok()) return status;
  for (int32_t node = 0; node < nodes.count(); ++node) {
    const Message& message = messages[static_cast<size_t>(node)];
    const MessageLayout layout(message.header.rows, message.header.experts, message.header.slots,
                               exchange.row_bytes());
    PackAtPlaces(exchange,
                 {message.header.rows, message.rows(layout), exchange.row_bytes(),
                  relay.experts ? message.experts(layout) : nullptr,
                  relay.slots ? message.slots(layout) : nullptr},
                 relay.OfNode(node), node * nodes.ranks_per_node, outbox);
  }
  outbox.Post();
  return Status();
}

// R2 of a combine.
Status Reduce(const Relay& relay, const std::vector<Message>& messages) {
  Exchange& exchange = relay.exchange;
  const Nodes& nodes = exchange.nodes();
  Outbox outbox(exchange, relay.phase, Operation::kCombine, relay.call, kWire);
  const Status status = outbox.Allocate(relay.counts.wire.data(), 0, relay.slots);
  if (!status.ok()) return status;
  for (int32_t node = 0; node < nodes.count(); ++node) {
    SumAtPlaces(exchange, messages, relay.OfNode(node), node * nodes.ranks_per_node,
                {relay.counts.wire[static_cast<size_t>(node)], outbox.rows(node),
                 exchange.row_bytes(), relay.slots ? outbox.slots(node) : nullptr});
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
                                             expected.slots, {}, relay.routing});
  const bool routed = expected.experts != 0;
  if (!routed && arguments.ok()) {
    auto counts = CheckRelay(exchange.config(), call.tokens, relay.routing);
    if (counts.ok()) state->counts = std::move(counts.value());
    arguments = counts.status();
  }
  Expectation on_wire = expected;
  on_wire.counts = state->counts.wire;
  expected.leg = kNode;
  exchange.Expect(
      on_wire, arguments,
      [state, routed, routing_out = relay.routing_out](const std::vector<Message>& messages) {
        if (routed) {
          Route(*state, messages, routing_out);
          state->routing = routing_out;
        }
        return Forward(*state, messages);
      },
      [&exchange, expected = std::move(expected), unpack = std::move(unpack),
       done = std::move(done)](const Status& forwarded) mutable {
        if (!forwarded.ok()) return done(forwarded);
        exchange.Expect(expected, Status(), std::move(unpack), std::move(done));
      });
}

void RelayCombine(Exchange& exchange, const char* phase, const Call& call, int32_t slots,
                  const int32_t* routing, const RelayCounts& counts) {
  const int64_t size =
      exchange.nodes().count() * call.tokens * PlacesPerNode(exchange.config());
  auto copy = std::make_shared<const std::vector<int32_t>>(routing, routing + size);
  Relay relay{exchange, phase, call, 0, slots, counts, copy->data()};
  Expectation expected;
  expected.phase = phase;
  expected.rank = call.rank;
  expected.identity = WithOperation(call.identity, Operation::kCombine);
  expected.tokens = call.tokens;
  expected.slots = slots;
  expected.leg = kNode;
  expected.counts = counts.node;
  exchange.Expect(
      expected, Status(),
      [relay = std::move(relay), copy = std::move(copy)](const std::vector<Message>& messages) {
        return Reduce(relay, messages);
      },
      [](const Status&) {});  // a failure is the group's, and combine_recv says so
}

}  // namespace smfree::cpu
