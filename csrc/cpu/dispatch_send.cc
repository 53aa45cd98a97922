// SPDX-License-Identifier: Apache-2.0
//
// dispatch_send: for each row t of x and each rank d that holds an expert of it, ascending:
//
//   message to d, row i = x[t], expert ids topk_idx[t,:], slots topk_weights[t,:]
//   places[t,p] = d * T + i          i counts the rows to d in the order of t
//
// S1. Route: places and counts from topk_idx.   S2. Allocate one block for all messages.
// S3. Pack: read each row of x once, write it once per destination.   S4. Post.
// Byte floor: T * row_bytes read, sum(send_counts) * row_bytes written.
//
// The cached form starts at S2 with a routing that is known, and sends no expert ids.
#include <algorithm>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "csrc/cpu/backend.h"
#include "csrc/cpu/completion_pool.h"
#include "csrc/protocol/describe.h"
#include "csrc/cpu/handle.h"
#include "csrc/cpu/outbox.h"
#include "csrc/cpu/rows.h"

namespace smfree::cpu {
namespace {

Status BadRouting(const char* phase, const Call& call, const int32_t* experts, int32_t top_k,
                  int64_t row, const std::string& what) {
  return Status(FaultKind::kInvalidRouting,
                DescribeCall(phase, call.rank, call.identity) + ": row " + std::to_string(row) +
                    " " + what + ": topk_idx = [" +
                    JoinNumbers(std::vector<int32_t>(experts, experts + top_k)) +
                    "]. Cure: name each expert of a row once, -1 for none.");
}

// S1.
Status Route(const char* phase, const GroupConfig& config, const Call& call,
             const DispatchSendArrays& a) {
  const int32_t local_experts = config.num_experts / config.num_ranks;
  const int32_t top_k = config.top_k;
  const int32_t places_per_row = PlacesPerRow(config);
  std::fill_n(a.send_counts, config.num_ranks, 0);
  std::vector<int64_t> last_row(static_cast<size_t>(config.num_experts), -1);  // that named it
  std::vector<int32_t> ranks;
  for (int64_t row = 0; row < call.tokens; ++row) {
    const int32_t* const experts = a.topk_idx + row * top_k;
    ranks.clear();
    for (int32_t k = 0; k < top_k; ++k) {
      const int32_t expert = experts[k];
      if (expert == -1) continue;
      if (expert < -1 || expert >= config.num_experts) {
        return BadRouting(
            phase, call, experts, top_k, row,
            "names expert " + std::to_string(expert) + " of " + std::to_string(config.num_experts));
      }
      int64_t& last = last_row[static_cast<size_t>(expert)];
      if (last == row) {
        return BadRouting(phase, call, experts, top_k, row,
                          "names expert " + std::to_string(expert) + " twice");
      }
      last = row;
      const int32_t rank = expert / local_experts;
      const auto at = std::lower_bound(ranks.begin(), ranks.end(), rank);
      if (at == ranks.end() || *at != rank) ranks.insert(at, rank);
    }
    int32_t* const places = a.places + row * places_per_row;
    std::fill_n(places, places_per_row, -1);
    for (size_t p = 0; p < ranks.size(); ++p) {
      places[p] = static_cast<int32_t>(ranks[p] * call.tokens) + a.send_counts[ranks[p]]++;
    }
  }
  return Status();
}

// S2 to S4. `experts` may be null.
Status PackAndPost(Exchange& exchange, Outbox& outbox, int64_t tokens, const int32_t* experts,
                   const DispatchSendCachedArrays& a) {
  const GroupConfig& config = exchange.config();
  const int32_t top_k = config.top_k;
  const int32_t places_per_row = PlacesPerRow(config);
  const Status status = outbox.Allocate(a.send_counts, experts ? top_k : 0, a.slots ? top_k : 0);
  if (!status.ok()) return status;

  const auto* const source = static_cast<const std::byte*>(a.x);
  const int64_t x_row_bytes = config.hidden * ItemBytes(config.dtype);
  const int64_t wire_rows =
      std::accumulate(a.send_counts, a.send_counts + config.num_ranks, int64_t{0});
  const Writes writes = WritesFor(wire_rows * x_row_bytes * exchange.num_local());
  const auto pack = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int32_t p = 0; p < places_per_row; ++p) {
        const int32_t place = a.places[row * places_per_row + p];
        if (place < 0) break;
        const auto rank = static_cast<int32_t>(place / tokens);
        const int64_t i = place % tokens;
        CopyRow(outbox.rows(rank) + i * exchange.row_bytes(), source + row * x_row_bytes,
                x_row_bytes, writes);
        if (experts) std::copy_n(experts + row * top_k, top_k, outbox.experts(rank) + i * top_k);
        if (a.slots) std::copy_n(a.slots + row * top_k, top_k, outbox.slots(rank) + i * top_k);
      }
    }
    FinishWrites(writes);
  };
  ParallelFor(tokens, ThreadsFor(wire_rows * x_row_bytes, exchange.threads_per_rank()), pack);
  return outbox.Post();
}

}  // namespace

Status DispatchSend(Group& group, const Call& call, const DispatchSendArrays& arrays) {
  constexpr const char* kPhase = "dispatch_send";
  Exchange& exchange = group.exchange();
  Outbox outbox(exchange, kPhase, Operation::kDispatch, call);
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
  Outbox outbox(exchange, "dispatch_send_cached", Operation::kDispatch, call);
  Status status = outbox.Begin(
      CheckPlaces(exchange.config(), call.tokens, arrays.places, arrays.send_counts));
  if (status.ok()) {
    status = PackAndPost(exchange, outbox, call.tokens, /*experts=*/nullptr, arrays);
  }
  return status.ok() ? status : outbox.Fail(std::move(status));
}

}  // namespace smfree::cpu
