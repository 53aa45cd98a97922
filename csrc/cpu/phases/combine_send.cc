// SPDX-License-Identifier: Apache-2.0
//
// combine_send: for each source s and each of its rows i that was kept here, received row b
// (arrays.h), with n = rows[b,k]:
//
//   message to s, row i = sum over k ascending, n >= 0, of w[n] * y[n]     float32, rounded once
//                 slot k = values[n], or 0 where n < 0
//
// A quantised leaf is rounded to its values and scales. A row without any n has lost all its copies:
// it is NaN, or, if they were dropped, zero.
//
// In hierarchical mode the message goes to the relay of s, with the same rows, and this rank is the
// relay of others (relay.h).
//
// S1. Allocate one block for all messages.  S2. Reduce and pack.  S3. Post.
// Byte floor: one read of each row of y that is named, sum(recv_counts) rows written.
#include <utility>
#include <vector>

#include "csrc/cpu/backend.h"
#include "csrc/cpu/runtime/completion_pool.h"
#include "csrc/cpu/phases/handle.h"
#include "csrc/cpu/processes/outbox.h"
#include "csrc/cpu/phases/relay.h"
#include "csrc/cpu/rows/leaves.h"

namespace smfree::cpu {
namespace {

Status PackAndPost(Exchange& exchange, Outbox& outbox, const CombineSendArrays& a) {
  const GroupConfig& config = exchange.config();
  const int32_t top_k = config.top_k;
  const RowFormat& format = a.y.format;
  Status status = outbox.Allocate(a.recv_counts, 0, a.values ? top_k : 0, format.stride);
  if (!status.ok()) return status;

  const ReceivedRows received(a.recv_counts, config.num_ranks);
  const auto pack = [&](int64_t begin, int64_t end) {
    RowSum sum(format, top_k);
    received.ForEach(begin, end, [&](int64_t number, int32_t source, int64_t i) {
      const int32_t* const rows = a.rows + number * top_k;
      sum.Clear();
      for (int32_t k = 0; k < top_k; ++k) {
        const int64_t n = rows[k];
        if (a.values) outbox.slots(source)[i * top_k + k] = n < 0 ? 0.0f : a.values[n];
        if (n >= 0) sum.Add(a.y, n, a.w ? a.w[n] : 1.0f);
      }
      if (sum.num_terms() == 0 && config.overflow == Overflow::kError) sum.Lose();
      sum.Pack(outbox.row(source, i));
    });
  };
  ParallelFor(received.count(),
              ThreadsFor(received.count() * format.bytes(), exchange.threads_per_rank()), pack);
  outbox.Post();
  return status;
}

}  // namespace

Status CombineSend(Group& group, const Call& call, const CombineSendArrays& arrays) {
  constexpr const char* kPhase = "combine_send";
  Exchange& exchange = group.exchange();
  const GroupConfig& config = exchange.config();
  Status checked = CheckRows(config, call.tokens, arrays.rows_capacity, arrays.rows,
                             arrays.recv_counts);
  StatusOr<RelayCounts> relay = RelayCounts{};
  if (config.hierarchical && checked.ok()) {
    relay = CheckRelay(config, call.tokens, arrays.relay);
    checked = relay.status();
  }
  Outbox outbox(exchange, kPhase, Operation::kCombine, call,
                exchange.nodes().FirstLeg(Operation::kCombine));
  Status status = outbox.Begin(checked);
  if (status.ok()) status = PackAndPost(exchange, outbox, arrays);
  if (!status.ok()) return outbox.Fail(std::move(status));
  if (config.hierarchical) {
    RelayCombine(exchange, kPhase, call, arrays.values ? config.top_k : 0, arrays.y.format,
                 arrays.relay, relay.value());
  }
  return status;
}

}  // namespace smfree::cpu
