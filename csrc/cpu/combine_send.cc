// SPDX-License-Identifier: Apache-2.0
//
// combine_send: for each source s and each of its rows i here, with n = rows[s,i,k]:
//
//   message to s, row i = sum over k ascending, n >= 0, of w[n] * y[n]     float32, rounded once
//                 slot k = values[n], or 0 where n < 0
//
// In hierarchical mode the message goes to the relay of s, with the same rows, and this rank becomes
// the relay of others (relay.h).
//
// S1. Allocate one block for all messages.  S2. Reduce and pack.  S3. Post.
// Byte floor: one read of each row of y that is named, sum(recv_counts) * row_bytes written.
#include <utility>
#include <vector>

#include "csrc/cpu/backend.h"
#include "csrc/cpu/completion_pool.h"
#include "csrc/cpu/handle.h"
#include "csrc/cpu/outbox.h"
#include "csrc/cpu/relay.h"
#include "csrc/cpu/rows.h"

namespace smfree::cpu {
namespace {

Status PackAndPost(Exchange& exchange, Outbox& outbox, const CombineSendArgs& args) {
  const GroupConfig& config = exchange.config();
  const int32_t top_k = config.top_k;
  Status status = outbox.Allocate(args.recv_counts, 0, args.values ? top_k : 0);
  if (!status.ok()) return status;

  const auto* const y = static_cast<const std::byte*>(args.y);
  const int64_t y_row_bytes = config.hidden * ItemBytes(config.dtype);
  const ReceivedRows received(args.recv_counts, config.num_ranks);
  const auto pack = [&](int64_t begin, int64_t end) {
    std::vector<WeightedRow> terms(static_cast<size_t>(top_k));
    received.ForEach(begin, end, [&](int32_t source, int64_t i) {
      const int32_t* const rows = args.rows + (source * args.tokens + i) * top_k;
      int64_t num_terms = 0;
      for (int32_t k = 0; k < top_k; ++k) {
        const int64_t n = rows[k];
        if (args.values) outbox.slots(source)[i * top_k + k] = n < 0 ? 0.0f : args.values[n];
        if (n < 0) continue;
        terms[static_cast<size_t>(num_terms++)] = {y + n * y_row_bytes, args.w ? args.w[n] : 1.0f};
      }
      SumRows(config.dtype, outbox.rows(source) + i * exchange.row_bytes(), terms.data(), num_terms,
              config.hidden);
    });
  };
  ParallelFor(received.count(),
              ThreadsFor(received.count() * y_row_bytes, exchange.threads_per_rank()), pack);
  outbox.Post();
  return status;
}

}  // namespace

Status CombineSend(Group& group, const CombineSendArgs& args) {
  constexpr const char* kPhase = "combine_send";
  Exchange& exchange = group.exchange();
  const GroupConfig& config = exchange.config();
  Status arguments =
      CheckRows(config, args.tokens, args.rows_capacity, args.rows, args.recv_counts);
  StatusOr<RelayCounts> relay = RelayCounts{};
  if (config.hierarchical && arguments.ok()) {
    relay = CheckRelay(config, args.tokens, args.relay);
    arguments = relay.status();
  }
  Outbox outbox(exchange, kPhase, Operation::kCombine, args,
                exchange.nodes().FirstLeg(Operation::kCombine));
  Status status = outbox.Begin(arguments);
  if (status.ok()) status = PackAndPost(exchange, outbox, args);
  if (!status.ok()) return outbox.Fail(std::move(status));
  if (config.hierarchical) {
    RelayCombine(exchange, kPhase, args, args.values ? config.top_k : 0, args.relay,
                 relay.value());
  }
  return status;
}

}  // namespace smfree::cpu
