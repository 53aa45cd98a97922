// SPDX-License-Identifier: Apache-2.0
//
// dispatch_send: for each row t of x and each rank d that holds an expert of it, ascending:
//
//   message to d, row i = x[t], quantised where its format says so, expert ids topk_idx[t,:], slots
//                 topk_weights[t,:]
//   places[t,p] = d * T + i          i counts the rows to d in the order of t
//
// In hierarchical mode the messages go to nodes in the same way (WirePlaces); places is the same.
//
// S1. Route: places and counts from topk_idx.   S2. Allocate one block for all messages.
// S3. Pack: read each row of x once, write it once per destination.   S4. Post.
// Byte floor: the T rows of x read, the rows of all messages written.
//
// The cached form starts at S2 with a routing that is known, and sends no expert ids.
#include <algorithm>
#include <utility>
#include <vector>

#include "csrc/core/describe.h"
#include "csrc/core/errors.h"
#include "csrc/cpu/backend.h"
#include "csrc/cpu/phases/handle.h"
#include "csrc/cpu/processes/outbox.h"
#include "csrc/cpu/rows/places.h"

namespace smfree::cpu {
namespace {

Status CheckRouting(const char* phase, const GroupConfig& config, const Call& call,
                    const int32_t* topk_idx) {
  const int32_t top_k = config.top_k;
  std::vector<int64_t> last_row(static_cast<size_t>(config.num_experts), -1);  // that named it
  for (int64_t row = 0; row < call.tokens; ++row) {
    const int32_t* const experts = topk_idx + row * top_k;
    for (int32_t k = 0; k < top_k; ++k) {
      const int32_t expert = experts[k];
      if (expert == -1) continue;
      const bool exists = expert >= 0 && expert < config.num_experts;
      if (!exists || last_row[static_cast<size_t>(expert)] == row) {
        return InvalidRouting(
            DescribeCall(phase, call.rank, call.identity), row, expert, config.num_experts,
            ": topk_idx = [" + JoinNumbers(std::vector<int32_t>(experts, experts + top_k)) + "]");
      }
      last_row[static_cast<size_t>(expert)] = row;
    }
  }
  return Status();
}

// S1.
Status Route(const char* phase, const GroupConfig& config, const Call& call,
             const DispatchSendArrays& a) {
  Status status = CheckRouting(phase, config, call, a.topk_idx);
  if (!status.ok()) return status;
  std::fill_n(a.send_counts, config.num_ranks, 0);
  PlaceByExpert(config, call.tokens, a.topk_idx, call.tokens, /*first_rank=*/0, config.num_ranks,
                PlacesPerRow(config), a.places, a.send_counts);
  return status;
}

// S2 to S4. `experts` may be null.
Status PackAndPost(Exchange& exchange, Outbox& outbox, int64_t tokens, const int32_t* experts,
                   const DispatchSendCachedArrays& a) {
  const GroupConfig& config = exchange.config();
  const WirePlaces wire(config, tokens, a.places, a.send_counts);
  Status status = outbox.Allocate(wire.counts().data(), experts ? config.top_k : 0,
                                  a.slots ? config.top_k : 0, a.x.format.stride);
  if (!status.ok()) return status;
  PackAtPlaces(exchange, {tokens, a.x, experts, a.slots}, wire.places(), /*first_region=*/0,
               outbox);
  outbox.Post();
  return status;
}

}  // namespace

Status DispatchSend(Group& group, const Call& call, const DispatchSendArrays& arrays) {
  constexpr const char* kPhase = "dispatch_send";
  Exchange& exchange = group.exchange();
  Outbox outbox(exchange, kPhase, Operation::kDispatch, call, kWire);
  Status status = outbox.Begin();
  if (status.ok()) status = Route(kPhase, exchange.config(), call, arrays);
  if (status.ok()) {
    status = PackAndPost(exchange, outbox, call.tokens, arrays.topk_idx,
                         {arrays.x, arrays.topk_weights, arrays.places, arrays.send_counts});
  }
  return status.ok() ? status : outbox.Fail(std::move(status));
}

Status DispatchSendCached(Group& group, const Call& call, const DispatchSendCachedArrays& arrays) {
  Exchange& exchange = group.exchange();
  Outbox outbox(exchange, "dispatch_send_cached", Operation::kDispatch, call, kWire);
  Status status = outbox.Begin(
      CheckPlaces(exchange.config(), call.tokens, arrays.places, arrays.send_counts));
  if (status.ok()) {
    status = PackAndPost(exchange, outbox, call.tokens, /*experts=*/nullptr, arrays);
  }
  return status.ok() ? status : outbox.Fail(std::move(status));
}

}  // namespace smfree::cpu
