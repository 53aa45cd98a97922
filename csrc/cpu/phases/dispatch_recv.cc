// SPDX-License-Identifier: Apache-2.0
//
// dispatch_recv: the rows of all sources, grouped by local expert.
//
//   rows[s,i,k] = n      the k-th slot of row i from source s is row n of x, or -1
//   x[n] = row i,  weights[n] = its slot k
//
// S1. Place: count the rows of each local expert, lay out the groups, number the rows in the order
//     (expert, source, i, k). S2. Scatter: read each received row once, write it once per copy.
// S3. Zero what no row was written to.
// Byte floor: sum(recv_counts) * row_bytes read, N * row_bytes written.
//
// In hierarchical mode the relay comes first (relay.h); the messages are then the same.
//
// The cached forms start at S2 with rows that are known. The weighted one writes
// x[n] = w[n] * row i and values[n] = <y[n], row i>: the gradient of a combine.
#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "csrc/core/describe.h"
#include "csrc/core/errors.h"
#include "csrc/cpu/backend.h"
#include "csrc/cpu/exchange/exchange.h"
#include "csrc/cpu/phases/handle.h"
#include "csrc/cpu/phases/relay.h"
#include "csrc/cpu/processes/pages.h"
#include "csrc/cpu/rows/rows.h"
#include "csrc/cpu/runtime/completion_pool.h"

namespace smfree::cpu {
namespace {

// S1. Returns the number of copies that were dropped.
int32_t Place(Exchange& exchange, const Call& call, const DispatchRecvArrays& a,
              const std::vector<Message>& messages) {
  const GroupConfig& config = exchange.config();
  const int32_t local_experts = config.num_experts / config.num_ranks;
  const int32_t first_expert = call.rank * local_experts;
  const int32_t top_k = config.top_k;
  const auto experts_of = [&](const Message& message) {
    return message.experts(MessageLayout(message.header.rows, top_k, top_k, exchange.row_bytes()));
  };

  std::vector<int64_t> counts(static_cast<size_t>(local_experts));
  for (const Message& message : messages) {
    const int32_t* const experts = experts_of(message);
    for (int64_t i = 0; i < int64_t{message.header.rows} * top_k; ++i) {
      const auto expert = static_cast<uint32_t>(experts[i] - first_expert);
      if (expert < static_cast<uint32_t>(local_experts)) ++counts[expert];
    }
  }

  // A group takes its aligned size as long as there is room, and experts later in the order get
  // what is left.
  std::vector<int64_t> next(counts.size()), limit(counts.size());
  int64_t start = 0;
  for (size_t expert = 0; expert < counts.size(); ++expert) {
    const int64_t aligned = AlignUp(counts[expert], config.expert_alignment);
    const int64_t size = std::min(aligned, a.rows_capacity - start);
    a.group_sizes[expert] = static_cast<int32_t>(size);
    next[expert] = start;
    limit[expert] = start + size;
    start += size;
  }

  int32_t dropped = 0;
  std::fill_n(a.rows, config.num_ranks * call.tokens * top_k, -1);
  for (int32_t source = 0; source < config.num_ranks; ++source) {
    const Message& message = messages[static_cast<size_t>(source)];
    const int32_t* const experts = experts_of(message);
    int32_t* const rows = a.rows + source * call.tokens * top_k;
    a.recv_counts[source] = message.header.rows;
    for (int64_t i = 0; i < int64_t{message.header.rows} * top_k; ++i) {
      const auto expert = static_cast<uint32_t>(experts[i] - first_expert);
      if (expert >= static_cast<uint32_t>(local_experts)) continue;
      if (next[expert] < limit[expert]) {
        rows[i] = static_cast<int32_t>(next[expert]++);
      } else {
        ++dropped;
      }
    }
  }
  return dropped;
}

// S2 and S3.
void Scatter(const Exchange& exchange, int64_t tokens, const DispatchRecvCachedArrays& to,
             const std::vector<Message>& messages) {
  const GroupConfig& config = exchange.config();
  const int32_t top_k = config.top_k;
  const int64_t x_row_bytes = config.hidden * ItemBytes(config.dtype);
  auto* const x = static_cast<std::byte*>(to.x);
  const auto* const y = static_cast<const std::byte*>(to.y);
  AdviseHugePages(x, to.rows_capacity * x_row_bytes);
  std::vector<uint8_t> written(static_cast<size_t>(to.rows_capacity));
  if (to.values) std::fill_n(to.values, to.rows_capacity, 0.0f);

  const ReceivedRows received(to.recv_counts, config.num_ranks);
  const Writes writes = WritesFor(to.rows_capacity * x_row_bytes * exchange.num_local());
  const auto scatter_row = [&](int32_t source, int64_t i, std::byte* scaled) {
    const Message& message = messages[static_cast<size_t>(source)];
    const MessageLayout layout(message.header.rows, message.header.experts, message.header.slots,
                               exchange.row_bytes());
    const std::byte* const row = message.rows(layout) + i * exchange.row_bytes();
    for (int32_t k = 0; k < top_k; ++k) {
      const int64_t n = to.rows[(source * tokens + i) * top_k + k];
      if (n < 0) continue;
      written[static_cast<size_t>(n)] = 1;
      if (to.w) {
        to.values[n] = ScaleRowAndDot(config.dtype, x + n * x_row_bytes, scaled, row,
                                      y + n * x_row_bytes, to.w[n], config.hidden, writes);
      } else {
        CopyRow(x + n * x_row_bytes, row, x_row_bytes, writes);
        if (to.values) to.values[n] = message.slots(layout)[i * top_k + k];
      }
    }
  };
  const auto scatter = [&](int64_t begin, int64_t end) {
    std::vector<std::byte> scaled(to.w ? static_cast<size_t>(x_row_bytes) : 0);
    received.ForEach(begin, end,
                     [&](int32_t source, int64_t i) { scatter_row(source, i, scaled.data()); });
    FinishWrites(writes);
  };
  ParallelFor(received.count(),
              ThreadsFor(received.count() * x_row_bytes, exchange.threads_per_rank()), scatter);

  const auto zero = [&](int64_t begin, int64_t end) {
    while (begin < end) {
      int64_t stop = begin;
      while (stop < end && !written[static_cast<size_t>(stop)]) ++stop;
      std::memset(x + begin * x_row_bytes, 0, static_cast<size_t>((stop - begin) * x_row_bytes));
      begin = stop + 1;
    }
  };
  ParallelFor(to.rows_capacity,
              ThreadsFor(to.rows_capacity * x_row_bytes, exchange.threads_per_rank()), zero);
}

Status Unpack(Exchange& exchange, const char* phase, const Call& call, const DispatchRecvArrays& a,
              const std::vector<Message>& messages) {
  const GroupConfig& config = exchange.config();
  const int32_t dropped = Place(exchange, call, a, messages);
  *a.num_dropped = dropped;
  if (dropped > 0 && config.overflow == Overflow::kError) {
    FillNaN(config.dtype, static_cast<std::byte*>(a.x), a.rows_capacity * config.hidden);
    std::fill_n(a.weights, a.rows_capacity, std::numeric_limits<float>::quiet_NaN());
    exchange.ReportDropped(dropped, Overflowed(DescribeCall(phase, call.rank, call.identity),
                                               dropped, a.rows_capacity));
    return Status();
  }
  if (dropped > 0) exchange.ReportDropped(dropped, Status());
  Scatter(exchange, call.tokens,
          {a.rows_capacity, a.rows, a.recv_counts, a.relay, /*y=*/nullptr, /*w=*/nullptr, a.x,
           a.weights},
          messages);
  return Status();
}

}  // namespace

void DispatchRecv(Group& group, const Call& call, const DispatchRecvArrays& arrays, Done done) {
  static constexpr const char* kPhase = "dispatch_recv";
  Exchange& exchange = group.exchange();
  Expectation expected;
  expected.phase = kPhase;
  expected.rank = call.rank;
  expected.identity = WithOperation(call.identity, Operation::kDispatch);
  expected.tokens = call.tokens;
  expected.experts = expected.slots = exchange.config().top_k;
  ReceiveDispatch(
      exchange, call, std::move(expected), Status(), {/*routing=*/nullptr, arrays.relay},
      [&exchange, call, arrays](const std::vector<Message>& messages) {
        return Unpack(exchange, kPhase, call, arrays, messages);
      },
      std::move(done));
}

void DispatchRecvCached(Group& group, const Call& call, const DispatchRecvCachedArrays& arrays,
                        Done done) {
  Exchange& exchange = group.exchange();
  const bool weighted = arrays.w != nullptr;
  Expectation expected;
  expected.phase = weighted ? "dispatch_recv_weighted" : "dispatch_recv_cached";
  expected.rank = call.rank;
  expected.identity = WithOperation(call.identity, Operation::kDispatch);
  expected.tokens = call.tokens;
  expected.slots = arrays.values && !weighted ? exchange.config().top_k : 0;
  expected.counts.assign(arrays.recv_counts, arrays.recv_counts + exchange.config().num_ranks);
  ReceiveDispatch(
      exchange, call, std::move(expected),
      CheckRows(exchange.config(), call.tokens, arrays.rows_capacity, arrays.rows,
                arrays.recv_counts),
      {arrays.relay, /*routing_out=*/nullptr},
      [&exchange, tokens = call.tokens, arrays](const std::vector<Message>& messages) {
        Scatter(exchange, tokens, arrays, messages);
        return Status();
      },
      std::move(done));
}

}  // namespace smfree::cpu
