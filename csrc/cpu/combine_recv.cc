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
#include "csrc/cpu/rows.h"

namespace smfree::cpu {
namespace {

void Unpack(const Exchange& exchange, const CombineRecvArgs& args,
            const std::vector<Message>& messages) {
  const GroupConfig& config = exchange.config();
  const int32_t top_k = config.top_k;
  const int32_t places_per_row = PlacesPerRow(config);
  auto* const out = static_cast<std::byte*>(args.out);
  const int64_t out_row_bytes = config.hidden * ItemBytes(config.dtype);
  const auto unpack = [&](int64_t begin, int64_t end) {
    std::vector<WeightedRow> terms(static_cast<size_t>(places_per_row));
    for (int64_t row = begin; row < end; ++row) {
      float* const slots = args.slots ? args.slots + row * top_k : nullptr;
      if (slots) std::fill_n(slots, top_k, 0.0f);
      int64_t num_terms = 0;
      for (int32_t p = 0; p < places_per_row; ++p) {
        const int32_t place = args.places[row * places_per_row + p];
        if (place < 0) break;
        const Message& message = messages[static_cast<size_t>(place / args.tokens)];
        const int64_t i = place % args.tokens;
        const MessageLayout layout(message.header.rows, message.header.experts,
                                   message.header.slots, exchange.row_bytes());
        terms[static_cast<size_t>(num_terms++)] = {message.rows(layout) + i * exchange.row_bytes(),
                                                   1.0f};
        for (int32_t k = 0; slots && k < top_k; ++k) {
          slots[k] += message.slots(layout)[i * top_k + k];
        }
      }
      SumRows(config.dtype, out + row * out_row_bytes, terms.data(), num_terms, config.hidden);
    }
  };
  ParallelFor(args.tokens, ThreadsFor(args.tokens * out_row_bytes, exchange.threads_per_rank()),
              unpack);
}

}  // namespace

void CombineRecv(Group& group, const CombineRecvArgs& args, Done done) {
  Exchange& exchange = group.exchange();
  Expectation expected;
  expected.phase = "combine_recv";
  expected.rank = args.rank;
  expected.identity = exchange.Complete(args.identity, Operation::kCombine);
  expected.tokens = args.tokens;
  expected.slots = args.slots ? exchange.config().top_k : 0;
  expected.counts = args.send_counts;
  exchange.Expect(
      expected, CheckPlaces(exchange.config(), args.tokens, args.places, args.send_counts),
      [&exchange, args](const std::vector<Message>& messages) {
        Unpack(exchange, args, messages);
        return Status();
      },
      std::move(done));
}

}  // namespace smfree::cpu
