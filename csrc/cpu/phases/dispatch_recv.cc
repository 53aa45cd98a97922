// SPDX-License-Identifier: Apache-2.0
//
// dispatch_recv: the rows of all sources, grouped by local expert.
//
//   rows[b,k] = n        the k-th slot of received row b (arrays.h) is row n of x, or -1
//   x[n] = row b, dequantised,  weights[n] = its slot k
//
// S1. Place: cut the rows that do not fit on the wire, count the rows of each local expert, lay out
//     the groups, number the rows in the order (expert, b, k). S2. Scatter: read each received row
//     once, write it once per copy. S3. Zero what no row was written to, but past padded groups.
// Byte floor: sum(recv_counts) rows read, N rows written.
//
// In hierarchical mode the relay comes first (relay.h); the messages are then the same.
//
// The cached forms start at S2 with rows that are known. The weighted one writes
// x[n] = w[n] * row b and values[n] = <y[n], row b>: the gradient of a combine.
#include <algorithm>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "csrc/core/describe.h"
#include "csrc/core/errors.h"
#include "csrc/cpu/backend.h"
#include "csrc/cpu/exchange/exchange.h"
#include "csrc/cpu/phases/handle.h"
#include "csrc/cpu/phases/relay.h"
#include "csrc/cpu/processes/pages.h"
#include "csrc/cpu/rows/leaves.h"
#include "csrc/cpu/runtime/completion_pool.h"

namespace smfree::cpu {
namespace {

// How many rows of each message, by source, are kept.
std::vector<int32_t> KeptCounts(const GroupConfig& config, int64_t tokens,
                                const std::vector<Message>& messages) {
  const int64_t capacity = WireRows(config, tokens);
  std::vector<int32_t> kept;
  int64_t rows_before = 0;
  for (const Message& message : messages) {
    kept.push_back(static_cast<int32_t>(KeptRows(rows_before, message.header.handed, capacity)));
    rows_before += message.header.handed;
  }
  return kept;
}

// The rows of the expert-grouped array, or of each padded group in it, that may be filled.
int64_t RowsToFill(const GroupConfig& config, const DispatchRecvArrays& a) {
  const int64_t whole = *a.capacity / config.expert_alignment * config.expert_alignment;
  const int64_t groups = config.padded_groups ? config.num_experts / config.num_ranks : 1;
  return std::clamp<int64_t>(whole, 0, a.rows_capacity / groups);
}

// Copies that were dropped, and the expert that got the most copies.
struct Placed {
  int32_t dropped = 0;
  int32_t busiest_expert = 0;
  int64_t its_copies = 0;
};

// S1.
Placed Place(Exchange& exchange, const Call& call, const DispatchRecvArrays& a,
              const std::vector<Message>& messages) {
  const GroupConfig& config = exchange.config();
  const int32_t local_experts = config.num_experts / config.num_ranks;
  const int32_t first_expert = call.rank * local_experts;
  const int32_t top_k = config.top_k;
  const std::vector<int32_t> kept = KeptCounts(config, call.tokens, messages);
  std::copy(kept.begin(), kept.end(), a.recv_counts);
  int32_t dropped = 0;
  std::vector<int64_t> counts(static_cast<size_t>(local_experts));
  for (size_t source = 0; source < messages.size(); ++source) {
    const Message& message = messages[source];
    const int32_t* const experts = message.experts();
    for (int64_t i = 0; i < int64_t{message.header.rows} * top_k; ++i) {
      const auto expert = static_cast<uint32_t>(experts[i] - first_expert);
      if (expert >= static_cast<uint32_t>(local_experts)) continue;
      if (i < int64_t{kept[source]} * top_k) {
        ++counts[expert];
      } else {
        ++dropped;
      }
    }
  }

  // A group takes its aligned size as long as there is room, and experts later in the order get
  // what is left; padded groups do not take from one another.
  const int64_t rows_to_fill = RowsToFill(config, a);
  std::vector<int64_t> next(counts.size()), limit(counts.size());
  int64_t start = 0, end = rows_to_fill;
  for (size_t expert = 0; expert < counts.size(); ++expert) {
    if (config.padded_groups) {
      start = static_cast<int64_t>(expert) * (a.rows_capacity / local_experts);
      end = start + rows_to_fill;
    }
    const int64_t aligned = AlignUp(counts[expert], config.expert_alignment);
    const int64_t size = std::min(aligned, end - start);
    a.group_sizes[expert] = static_cast<int32_t>(size);
    a.num_rows[expert] = static_cast<int32_t>(std::min(counts[expert], size));
    next[expert] = start;
    limit[expert] = start + size;
    start += size;
  }

  std::fill_n(a.rows, WireRows(config, call.tokens) * top_k, -1);
  int32_t* rows = a.rows;
  for (size_t source = 0; source < messages.size(); ++source) {
    const int32_t* const experts = messages[source].experts();
    for (int64_t i = 0; i < int64_t{kept[source]} * top_k; ++i, ++rows) {
      const auto expert = static_cast<uint32_t>(experts[i] - first_expert);
      if (expert >= static_cast<uint32_t>(local_experts)) continue;
      if (next[expert] < limit[expert]) {
        *rows = static_cast<int32_t>(next[expert]++);
      } else {
        ++dropped;
      }
    }
  }
  const auto busiest = std::max_element(counts.begin(), counts.end());
  return {dropped, first_expert + static_cast<int32_t>(busiest - counts.begin()), *busiest};
}

// S2 and S3.
void Scatter(const Exchange& exchange, const DispatchRecvCachedArrays& to,
             const std::vector<Message>& messages) {
  const GroupConfig& config = exchange.config();
  const int32_t top_k = config.top_k;
  const RowFormat& format = to.x.format;
  const int64_t x_row_bytes = format.bytes();
  for (int32_t l = 0; l < format.count; ++l) {
    AdviseHugePages(to.x.leaves[l], to.rows_capacity * format.leaves[l].bytes());
  }
  std::vector<uint8_t> written(static_cast<size_t>(to.rows_capacity));
  if (to.values) std::fill_n(to.values, to.rows_capacity, 0.0f);

  const ReceivedRows received(to.recv_counts, config.num_ranks);
  const Writes writes = WritesFor(to.rows_capacity * x_row_bytes * exchange.num_local());
  const auto scatter_row = [&](int64_t number, int32_t source, int64_t i, RowUnpacker& unpacker) {
    const Message& message = messages[static_cast<size_t>(source)];
    unpacker.Read(message.row(i));
    for (int32_t k = 0; k < top_k; ++k) {
      const int64_t n = to.rows[number * top_k + k];
      if (n < 0) continue;
      written[static_cast<size_t>(n)] = 1;
      if (to.w) {
        to.values[n] = unpacker.WriteScaled(n, to.y, to.w[n], writes);
      } else {
        unpacker.Write(n, writes);
        if (to.values) to.values[n] = message.slots()[i * top_k + k];
      }
    }
  };
  const auto scatter = [&](int64_t begin, int64_t end) {
    RowUnpacker unpacker(to.x);
    received.ForEach(begin, end, [&](int64_t number, int32_t source, int64_t i) {
      scatter_row(number, source, i, unpacker);
    });
    FinishWrites(writes);
  };
  ParallelFor(received.count(),
              ThreadsFor(received.count() * x_row_bytes, exchange.threads_per_rank()), scatter);

  // What is past a padded group is not touched. A group fills its rows up to the alignment, and the
  // first of these is written.
  const int64_t alignment = config.expert_alignment;
  const auto is_zero = [&](int64_t n) {
    if (written[static_cast<size_t>(n)]) return false;
    return !config.padded_groups || written[static_cast<size_t>(n - n % alignment)] != 0;
  };
  const auto zero = [&](int64_t begin, int64_t end) {
    while (begin < end) {
      int64_t stop = begin;
      while (stop < end && is_zero(stop)) ++stop;
      FillRows(to.x, begin, stop, 0);
      begin = stop + 1;
    }
  };
  ParallelFor(to.rows_capacity,
              ThreadsFor(to.rows_capacity * x_row_bytes, exchange.threads_per_rank()), zero);
}

Status Unpack(Exchange& exchange, const char* phase, const Call& call, const DispatchRecvArrays& a,
              const std::vector<Message>& messages) {
  const GroupConfig& config = exchange.config();
  const Placed placed = Place(exchange, call, a, messages);
  const int32_t dropped = placed.dropped;
  *a.num_dropped = dropped;
  if (dropped > 0 && config.overflow == Overflow::kError) {
    FillRows(a.x, 0, a.rows_capacity, 0xff);
    std::memset(a.weights, 0xff, static_cast<size_t>(a.rows_capacity) * sizeof(float));
    const std::string here = DescribeCall(phase, call.rank, call.identity);
    int64_t came = 0;
    bool all_handed_on = true;
    for (const Message& message : messages) {
      came += message.header.rows;
      all_handed_on = all_handed_on && message.header.handed == message.header.rows;
    }
    const int64_t room = RowsToFill(config, a);
    exchange.ReportDropped(
        dropped, came > WireRows(config, call.tokens) ? OverflowedWire(here, came, config)
                 : !all_handed_on                     ? OverflowedRelay(here, config)
                 : config.padded_groups
                     ? OverflowedGroup(here, dropped, placed.busiest_expert, placed.its_copies,
                                       room, config)
                     : Overflowed(here, dropped, room, config));
    return Status();
  }
  if (dropped > 0) exchange.ReportDropped(dropped, Status());
  DispatchRecvCachedArrays to;
  to.rows_capacity = a.rows_capacity;
  to.rows = a.rows;
  to.recv_counts = a.recv_counts;
  to.x = a.x;
  to.values = a.weights;
  Scatter(exchange, to, messages);
  return Status();
}

// Whether what is kept of the messages is what the handle says.
Status CheckKept(const GroupConfig& config, const Expectation& expected, const int32_t* recv_counts,
                 const std::vector<Message>& messages) {
  const std::vector<int32_t> kept = KeptCounts(config, expected.tokens, messages);
  for (size_t source = 0; source < kept.size(); ++source) {
    if (kept[source] == recv_counts[source]) continue;
    return ScheduleMismatch(DescribeCall(expected.phase, expected.rank, expected.identity),
                            std::to_string(recv_counts[source]) + " rows by its handle",
                            std::to_string(kept[source]), static_cast<int32_t>(source));
  }
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
  expected.stride = arrays.x.format.stride;
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
  expected.stride = arrays.x.format.stride;
  ReceiveDispatch(
      exchange, call, expected,
      CheckRows(exchange.config(), call.tokens, arrays.rows_capacity, arrays.rows,
                arrays.recv_counts),
      {arrays.relay, /*routing_out=*/nullptr},
      [&exchange, expected, arrays](const std::vector<Message>& messages) {
        const Status kept = CheckKept(exchange.config(), expected, arrays.recv_counts, messages);
        if (kept.ok()) Scatter(exchange, arrays, messages);
        return kept;
      },
      std::move(done));
}

}  // namespace smfree::cpu
