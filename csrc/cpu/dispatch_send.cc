// SPDX-License-Identifier: Apache-2.0
//
// dispatch_send: for each row t of x and each rank d that holds an expert of it, ascending:
//
//   message to d, row i = x[t], expert ids topk_idx[t,:], slots topk_weights[t,:]
//   places[t,p] = d * T + i          i counts the rows to d in the order of t
//
// In hierarchical mode the messages go to nodes in the same way (WirePlaces); places is the same.
//
// S1. Route: places and counts from topk_idx.   S2. Allocate one block for all messages.
// S3. Pack: read each row of x once, write it once per destination.   S4. Post.
// Byte floor: T * row_bytes read, the rows of all messages written.
//
// The cached form starts at S2 with a routing that is known, and sends no expert ids.
#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "csrc/cpu/backend.h"
#include "csrc/protocol/describe.h"
#include "csrc/cpu/handle.h"
#include "csrc/cpu/outbox.h"
#include "csrc/cpu/places.h"

namespace smfree::cpu {
namespace {

Status BadRouting(const char* phase, const DispatchSendArgs& args, int32_t top_k, int64_t row,
                  const std::string& what) {
  const int32_t* const experts = args.topk_idx + row * top_k;
  return Status(FaultKind::kInvalidRouting,
                DescribeCall(phase, args.rank, args.identity) + ": row " + std::to_string(row) +
                    " " + what + ": topk_idx = [" +
                    JoinNumbers(std::vector<int32_t>(experts, experts + top_k)) +
                    "]. Cure: name each expert of a row once, -1 for none.");
}

Status CheckRouting(const char* phase, const GroupConfig& config, const DispatchSendArgs& args) {
  const int32_t top_k = config.top_k;
  std::vector<int64_t> last_row(static_cast<size_t>(config.num_experts), -1);  // that named it
  for (int64_t row = 0; row < args.tokens; ++row) {
    for (int32_t k = 0; k < top_k; ++k) {
      const int32_t expert = args.topk_idx[row * top_k + k];
      if (expert == -1) continue;
      if (expert < -1 || expert >= config.num_experts) {
        return BadRouting(
            phase, args, top_k, row,
            "names expert " + std::to_string(expert) + " of " + std::to_string(config.num_experts));
      }
      int64_t& last = last_row[static_cast<size_t>(expert)];
      if (last == row) {
        return BadRouting(phase, args, top_k, row,
                          "names expert " + std::to_string(expert) + " twice");
      }
      last = row;
    }
  }
  return Status();
}

// S1.
Status Route(const char* phase, const GroupConfig& config, const DispatchSendArgs& args) {
  Status status = CheckRouting(phase, config, args);
  if (!status.ok()) return status;
  std::fill_n(args.send_counts, config.num_ranks, 0);
  PlaceByExpert(config, args.tokens, args.topk_idx, args.tokens, /*first_rank=*/0,
                config.num_ranks, PlacesPerRow(config), args.places, args.send_counts);
  return status;
}

// S2 to S4. `experts` and `slots` may be null.
Status PackAndPost(Exchange& exchange, Outbox& outbox, int64_t tokens, const void* x,
                   const int32_t* experts, const float* slots, const int32_t* places,
                   const int32_t* send_counts) {
  const GroupConfig& config = exchange.config();
  const WirePlaces wire(config, tokens, places, send_counts);
  Status status =
      outbox.Allocate(wire.counts().data(), experts ? config.top_k : 0, slots ? config.top_k : 0);
  if (!status.ok()) return status;
  PackAtPlaces(exchange,
               {tokens, static_cast<const std::byte*>(x), config.hidden * ItemBytes(config.dtype),
                experts, slots},
               wire.places(), /*first_region=*/0, outbox);
  outbox.Post();
  return status;
}

}  // namespace

Status DispatchSend(Group& group, const DispatchSendArgs& args) {
  constexpr const char* kPhase = "dispatch_send";
  Exchange& exchange = group.exchange();
  Outbox outbox(exchange, kPhase, Operation::kDispatch, args, kWire);
  Status status = outbox.Begin();
  if (status.ok()) status = Route(kPhase, exchange.config(), args);
  if (status.ok()) {
    status = PackAndPost(exchange, outbox, args.tokens, args.x, args.topk_idx, args.topk_weights,
                         args.places, args.send_counts);
  }
  return status.ok() ? status : outbox.Fail(std::move(status));
}

Status DispatchSendCached(Group& group, const DispatchSendCachedArgs& args) {
  Exchange& exchange = group.exchange();
  Outbox outbox(exchange, "dispatch_send_cached", Operation::kDispatch, args, kWire);
  Status status =
      outbox.Begin(CheckPlaces(exchange.config(), args.tokens, args.places, args.send_counts));
  if (status.ok()) {
    status = PackAndPost(exchange, outbox, args.tokens, args.x, /*experts=*/nullptr, args.slots,
                         args.places, args.send_counts);
  }
  return status.ok() ? status : outbox.Fail(std::move(status));
}

}  // namespace smfree::cpu
