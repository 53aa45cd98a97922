// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/handle.h"

#include <string>

namespace smfree::cpu {
namespace {

Status Broken(const std::string& what) {
  return Status(FaultKind::kInvalidArgument,
                what +
                    ". Cure: pass the handle of the dispatch unchanged, and only to the rank that "
                    "got it.");
}

}  // namespace

Status CheckPlaces(const GroupConfig& config, int64_t tokens, const int32_t* places,
                   const int32_t* send_counts) {
  const int32_t places_per_row = PlacesPerRow(config);
  std::vector<int32_t> counted(static_cast<size_t>(config.num_ranks));
  for (int64_t i = 0; i < tokens * places_per_row; ++i) {
    const int32_t place = places[i];
    if (place == -1) continue;
    const int64_t rank = place / tokens;
    const bool ascends = i % places_per_row == 0 || (places[i - 1] >= 0 && places[i - 1] < place);
    if (place < 0 || rank >= config.num_ranks || !ascends ||
        place % tokens != counted[static_cast<size_t>(rank)]++) {
      return Broken("the handle's places are broken: row " + std::to_string(i / places_per_row) +
                    " has place " + std::to_string(place));
    }
  }
  for (int32_t rank = 0; rank < config.num_ranks; ++rank) {
    if (send_counts[rank] == counted[static_cast<size_t>(rank)]) continue;
    return Broken("the handle sends " + std::to_string(counted[static_cast<size_t>(rank)]) +
                  " rows to rank " + std::to_string(rank) + " by its places and " +
                  std::to_string(send_counts[rank]) + " by its counts");
  }
  return Status();
}

Status CheckRows(const GroupConfig& config, int64_t tokens, int64_t rows_capacity,
                 const int32_t* rows, const int32_t* recv_counts) {
  for (int32_t source = 0; source < config.num_ranks; ++source) {
    const int32_t count = recv_counts[source];
    if (count < 0 || count > tokens) {
      return Broken("the handle receives " + std::to_string(count) + " rows from rank " +
                    std::to_string(source) + " of at most " + std::to_string(tokens));
    }
    const int32_t* const of_source = rows + source * tokens * config.top_k;
    for (int64_t i = 0; i < int64_t{count} * config.top_k; ++i) {
      if (of_source[i] >= -1 && of_source[i] < rows_capacity) continue;
      return Broken("the handle puts a row of rank " + std::to_string(source) + " at " +
                    std::to_string(of_source[i]) + " of " + std::to_string(rows_capacity));
    }
  }
  return Status();
}

}  // namespace smfree::cpu
