// SPDX-License-Identifier: Apache-2.0
//
// combine_recv: for each row t, over its places d * T + i, ascending in d:
//
//   out[t]   = sum of row i of the message from d        float32, rounded once
//   slots[t] = sum of its slots                          float32
//
// Byte floor: sum(send_counts) * row_bytes read, T * row_bytes written.
#include <algorithm>
#include <utility>
#include <vector>

#include "csrc/cpu/backend.h"
#include "csrc/cpu/completion_pool.h"
#include "csrc/cpu/exchange.h"
#include "csrc/cpu/handle.h"
#include "csrc/cpu/pages.h"
#include "csrc/cpu/rows.h"

namespace smfree::cpu {
namespace {

void Unpack(const Exchange& exchange, int64_t tokens, const CombineRecvArrays& a,
            const std::vector<Message>& messages) {
  const GroupConfig& config = exchange.config();
  const int32_t top_k = config.top_k;
  const int32_t places_per_row = PlacesPerRow(config);
  auto* const out = static_cast<std::byte*>(a.out);
  const int64_t out_row_bytes = config.hidden * ItemBytes(config.dtype);
  const auto layout_of = [&](const Message& message) {
    return MessageLayout(message.header.rows, message.header.experts, message.header.slots,
                         exchange.row_bytes());
  };
  const auto message_of = [&](int32_t place) -> const Message& {
    return messages[static_cast<size_t>(place / tokens)];
  };
  const auto row_of = [&](int32_t place) {
    const Message& message = message_of(place);
    return message.rows(layout_of(message)) + place % tokens * exchange.row_bytes();
  };
  AdviseHugePages(out, tokens * out_row_bytes);
  const auto unpack = [&](int64_t begin, int64_t end) {
    std::vector<WeightedRow> terms(static_cast<size_t>(places_per_row));
    for (int64_t row = begin; row < end; ++row) {
      float* const slots = a.slots ? a.slots + row * top_k : nullptr;
      if (slots) std::fill_n(slots, top_k, 0.0f);
      const int32_t* const places = a.places + row * places_per_row;
      int64_t num_terms = 0;
      for (int32_t p = 0; p < places_per_row && places[p] >= 0; ++p) {
        terms[static_cast<size_t>(num_terms++)] = {row_of(places[p]), 1.0f};
        const Message& message = message_of(places[p]);
        const float* const values = message.slots(layout_of(message));
        for (int32_t k = 0; slots && k < top_k; ++k) {
          slots[k] += values[places[p] % tokens * top_k + k];
        }
      }
      SumRows(config.dtype, out + row * out_row_bytes, terms.data(), num_terms, config.hidden);
    }
  };
  ParallelFor(tokens, ThreadsFor(tokens * out_row_bytes, exchange.threads_per_rank()), unpack);
}

}  // namespace

void CombineRecv(Group& group, const Call& call, const CombineRecvArrays& arrays, Done done) {
  Exchange& exchange = group.exchange();
  Expectation expected;
  expected.phase = "combine_recv";
  expected.rank = call.rank;
  expected.identity = exchange.Complete(call.identity, Operation::kCombine);
  expected.tokens = call.tokens;
  expected.slots = arrays.slots ? exchange.config().top_k : 0;
  expected.counts = arrays.send_counts;
  exchange.Expect(
      expected, CheckPlaces(exchange.config(), call.tokens, arrays.places, arrays.send_counts),
      [&exchange, tokens = call.tokens, arrays](const std::vector<Message>& messages) {
        Unpack(exchange, tokens, arrays, messages);
        return Status();
      },
      std::move(done));
}

}  // namespace smfree::cpu
