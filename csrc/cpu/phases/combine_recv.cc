// SPDX-License-Identifier: Apache-2.0
//
// combine_recv: for each row t, over its places d * T + i on the wire, ascending in d, which is a
// rank, or a node in hierarchical mode:
//
//   out[t]   = sum of row i of the message from d        float32, rounded once
//   slots[t] = sum of its slots                          float32
//
// Byte floor: the rows of all messages read, T * row_bytes written.
#include <optional>
#include <utility>
#include <vector>

#include "csrc/cpu/backend.h"
#include "csrc/cpu/exchange/exchange.h"
#include "csrc/cpu/phases/handle.h"
#include "csrc/cpu/processes/pages.h"
#include "csrc/cpu/rows/places.h"

namespace smfree::cpu {

void CombineRecv(Group& group, const Call& call, const CombineRecvArrays& arrays, Done done) {
  Exchange& exchange = group.exchange();
  const GroupConfig& config = exchange.config();
  Expectation expected;
  expected.phase = "combine_recv";
  expected.rank = call.rank;
  expected.identity = WithOperation(call.identity, Operation::kCombine);
  expected.tokens = call.tokens;
  expected.slots = arrays.slots ? config.top_k : 0;
  const Status checked = CheckPlaces(config, call.tokens, arrays.places, arrays.send_counts);
  std::optional<WirePlaces> wire;
  if (checked.ok()) {
    wire.emplace(config, call.tokens, arrays.places, arrays.send_counts);
    expected.counts = wire->counts();
  }
  exchange.Expect(
      expected, checked,
      [&exchange, arrays, tokens = call.tokens,
       wire = std::move(wire)](const std::vector<Message>& messages) {
        auto* const out = static_cast<std::byte*>(arrays.out);
        const int64_t row_bytes = exchange.config().hidden * ItemBytes(exchange.config().dtype);
        AdviseHugePages(out, tokens * row_bytes);
        SumAtPlaces(exchange, messages, wire->places(), /*first_region=*/0,
                    {tokens, out, row_bytes, arrays.slots});
        return Status();
      },
      std::move(done));
}

}  // namespace smfree::cpu
