// SPDX-License-Identifier: Apache-2.0
//
// Places: where rows stand in messages, and how they get there and back. Row t goes to
// destination d as the i-th row there:
//
//   place = d * tokens + i          i counts the rows to d in the order of t
//
// A row has up to `width` places, ascending, each with another d; -1 fills the end. What a
// destination is follows from the leg: a rank, a node, or an index inside a node.
#ifndef SMFREE_CSRC_CPU_ROWS_PLACES_H_
#define SMFREE_CSRC_CPU_ROWS_PLACES_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "csrc/cpu/exchange/exchange.h"
#include "csrc/cpu/exchange/message.h"
#include "csrc/cpu/rows/leaves.h"

namespace smfree::cpu {

class Outbox;

struct Places {
  const int32_t* data;  // [rows, width]
  int64_t tokens;
  int32_t width;

  // Calls body(destination, position) for the places of `row`.
  template <typename Body>
  void ForEach(int64_t row, const Body& body) const {
    const int32_t* const places = data + row * width;
    for (int32_t p = 0; p < width && places[p] >= 0; ++p) {
      body(static_cast<int32_t>(places[p] / tokens), places[p] % tokens);
    }
  }
};

// Fills `places` [rows, width] and adds to `counts` [ranks] from the experts of each row: which of
// the ranks [first_rank, first_rank + ranks) hold any of them. Other ids are left out.
void PlaceByExpert(const GroupConfig& config, int64_t tokens, const int32_t* experts, int64_t rows,
                   int32_t first_rank, int32_t ranks, int32_t width, int32_t* places,
                   int32_t* counts);

// The places of rows on the wire leg, from those by rank in a handle: the same in direct mode, by
// node in hierarchical mode. The arrays of the handle must outlive it.
class WirePlaces {
 public:
  WirePlaces(const GroupConfig& config, int64_t tokens, const int32_t* places,
             const int32_t* send_counts);

  Places places() const {
    return hierarchical_ ? Places{by_node_.data(), by_rank_.tokens, width_} : by_rank_;
  }
  const std::vector<int32_t>& counts() const { return counts_; }  // rows to each destination

 private:
  Places by_rank_;
  bool hierarchical_;
  int32_t width_ = 0;  // of by_node_
  std::vector<int32_t> by_node_, counts_;
};

// Packs rows at their places: row t goes to region first_region + d of the outbox.
struct PackedRows {
  int64_t count;
  RowsIn rows;
  const int32_t* experts;  // [count, K] or null
  const float* slots;      // [count, K] or null
};
void PackAtPlaces(const Exchange& exchange, const PackedRows& from, const Places& places,
                  int32_t first_region, Outbox& outbox);

// Calls store(sum, t) for the rows t, with the sum over their places of the rows there; and
// slots[t] = sum of their slots. A destination d is message first_region + d. A place past its rows
// was cut: the sum has lost something, or, if that is to be dropped, the place adds nothing.
struct SummedRows {
  int64_t count;
  float* slots;  // [count, K] or null
  std::function<void(RowSum& sum, int64_t row)> store;
};
void SumAtPlaces(const Exchange& exchange, const std::vector<Message>& messages,
                 const Places& places, int32_t first_region, const RowFormat& format,
                 const SummedRows& to);

}  // namespace smfree::cpu

#endif  // SMFREE_CSRC_CPU_ROWS_PLACES_H_
