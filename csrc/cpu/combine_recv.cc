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
#include "csrc/cpu/exchange.h"
#include "csrc/cpu/handle.h"
#include "csrc/cpu/pages.h"
#include "csrc/cpu/places.h"

namespace smfree::cpu {

void CombineRecv(Group& group, const CombineRecvArgs& args, Done done) {
  Exchange& exchange = group.exchange();
  const GroupConfig& config = exchange.config();
  Expectation expected;
  expected.phase = "combine_recv";
  expected.rank = args.rank;
  expected.identity = exchange.Complete(args.identity, Operation::kCombine);
  expected.tokens = args.tokens;
  expected.slots = args.slots ? config.top_k : 0;
  const Status arguments = CheckPlaces(config, args.tokens, args.places, args.send_counts);
  std::optional<WirePlaces> wire;
  if (arguments.ok()) {
    wire.emplace(config, args.tokens, args.places, args.send_counts);
    expected.counts = wire->counts();
  }
  exchange.Expect(
      expected, arguments,
      [&exchange, args, wire = std::move(wire)](const std::vector<Message>& messages) {
        auto* const out = static_cast<std::byte*>(args.out);
        const int64_t row_bytes =
            exchange.config().hidden * ItemBytes(exchange.config().dtype);
        AdviseHugePages(out, args.tokens * row_bytes);
        SumAtPlaces(exchange, messages, wire->places(), /*first_region=*/0,
                    {args.tokens, out, row_bytes, args.slots});
        return Status();
      },
      std::move(done));
}

}  // namespace smfree::cpu
