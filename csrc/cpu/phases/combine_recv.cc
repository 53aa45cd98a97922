// SPDX-License-Identifier: Apache-2.0
//
// combine_recv: for each row t, over its places d * T + i on the wire, ascending in d, which is a
// rank, or a node in hierarchical mode:
//
//   out[t]   = sum of row i of the message from d, and add[t]      float32, rounded once
//   slots[t] = sum of its slots                                    float32
//
// What was cut at d is not in its message: out[t] is NaN, or, if it was dropped, it adds nothing.
//
// Byte floor: the rows of all messages read, and those of add; T rows written.
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
  expected.stride = arrays.out.format.stride;
  const Status checked = CheckPlaces(config, call.tokens, arrays.places, arrays.send_counts);
  std::optional<WirePlaces> wire;
  if (checked.ok()) {
    wire.emplace(config, call.tokens, arrays.places, arrays.send_counts);
    expected.counts = wire->counts();
    expected.may_be_cut = MayCut(config, call.tokens);
  }
  exchange.Expect(
      expected, checked,
      [&exchange, arrays, tokens = call.tokens,
       wire = std::move(wire)](const std::vector<Message>& messages) {
        const RowFormat& format = arrays.out.format;
        for (int32_t l = 0; l < format.count; ++l) {
          AdviseHugePages(arrays.out.leaves[l], tokens * format.leaves[l].bytes());
        }
        const bool adds = arrays.add.format.count > 0;
        SumAtPlaces(exchange, messages, wire->places(), /*first_region=*/0, format,
                    {tokens, arrays.slots, [&](RowSum& sum, int64_t row) {
                       if (adds) sum.Add(arrays.add, row, 1.0f);
                       sum.Store(arrays.out, row);
                     }});
        return Status();
      },
      std::move(done));
}

}  // namespace smfree::cpu
