// SPDX-License-Identifier: Apache-2.0
//
// Handle arrays that come back from the program. They were made by dispatch_send and dispatch_recv,
// but a program can do anything to arrays, and they become addresses: so they are checked, at a
// cost that is nothing beside the rows. And loops over received rows.
#ifndef SMFREE_CSRC_CPU_PHASES_HANDLE_H_
#define SMFREE_CSRC_CPU_PHASES_HANDLE_H_

#include <cstdint>
#include <vector>

#include "csrc/core/status.h"
#include "csrc/cpu/backend.h"
#include "csrc/cpu/rows/places.h"

namespace smfree::cpu {

// How many of `rows` rows go to each of the `destinations`, if the places are what a dispatch
// makes.
StatusOr<std::vector<int32_t>> CountPlaces(const Places& places, int64_t rows,
                                           int32_t destinations);

// Whether `places` [T,P] and `send_counts` [R] are what dispatch_send makes of some routing.
Status CheckPlaces(const GroupConfig& config, int64_t tokens, const int32_t* places,
                   const int32_t* send_counts);

// Whether `recv_counts` [R] are at most T each and B in all, and `rows` [B,K] point into the
// `rows_capacity` rows of the expert-grouped array, or are -1.
Status CheckRows(const GroupConfig& config, int64_t tokens, int64_t rows_capacity,
                 const int32_t* rows, const int32_t* recv_counts);

// All rows kept of those received, numbered through: those of source 0, of source 1, …
class ReceivedRows {
 public:
  ReceivedRows(const int32_t* recv_counts, int32_t num_ranks) : first_{0} {
    for (int32_t source = 0; source < num_ranks; ++source) {
      first_.push_back(first_.back() + recv_counts[source]);
    }
  }
  int64_t count() const { return first_.back(); }

  // Calls body(n, source, i) for the rows with numbers n in [begin, end): row i of that source.
  template <typename Body>
  void ForEach(int64_t begin, int64_t end, const Body& body) const {
    int32_t source = 0;
    for (int64_t n = begin; n < end; ++n) {
      while (n >= first_[static_cast<size_t>(source) + 1]) ++source;
      body(n, source, n - first_[static_cast<size_t>(source)]);
    }
  }

 private:
  std::vector<int64_t> first_;  // number of each source's first row, and the end
};

// Threads for a loop that moves `bytes`: several only if that is worth waking them.
inline int ThreadsFor(int64_t bytes, int threads_per_rank) {
  constexpr int64_t kBytesWorthAThread = 1 << 20;
  return bytes < kBytesWorthAThread ? 1 : threads_per_rank;
}

}  // namespace smfree::cpu

#endif  // SMFREE_CSRC_CPU_PHASES_HANDLE_H_
