// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/phases/handle.h"

#include <algorithm>
#include <string>

#include "csrc/core/errors.h"

namespace smfree::cpu {
namespace {

Status Broken(const std::string& what) { return Status(FaultKind::kInvalidArgument, what); }

}  // namespace

StatusOr<std::vector<int32_t>> CountPlaces(const Places& places, int64_t rows,
                                           int32_t destinations) {
  std::vector<int32_t> counts(static_cast<size_t>(destinations));
  const int32_t* const data = places.data;
  for (int64_t i = 0; i < rows * places.width; ++i) {
    const int32_t place = data[i];
    if (place == -1) continue;
    const int64_t destination = place / places.tokens;
    const bool ascends = i % places.width == 0 ||
                         (data[i - 1] >= 0 && data[i - 1] / places.tokens < destination);
    if (place < 0 || destination >= destinations || !ascends ||
        place % places.tokens != counts[static_cast<size_t>(destination)]++) {
      return Broken(BrokenPlace(i / places.width, place));
    }
  }
  return counts;
}

Status CheckPlaces(const GroupConfig& config, int64_t tokens, const int32_t* places,
                   const int32_t* send_counts) {
  const auto counted = CountPlaces({places, tokens, PlacesPerRow(config)}, tokens,
                                   config.num_ranks);
  if (!counted.ok()) return counted.status();
  for (int32_t rank = 0; rank < config.num_ranks; ++rank) {
    const int32_t count = counted.value()[static_cast<size_t>(rank)];
    if (send_counts[rank] == count) continue;
    return Broken(BrokenHandle("it sends " + std::to_string(count) + " rows to rank " +
                               std::to_string(rank) + " by its places and " +
                               std::to_string(send_counts[rank]) + " by its counts"));
  }
  return Status();
}

Status CheckRows(const GroupConfig& config, int64_t tokens, int64_t rows_capacity,
                 const int32_t* rows, const int32_t* recv_counts) {
  int64_t room = WireRows(config, tokens);
  for (int32_t source = 0; source < config.num_ranks; ++source) {
    const int32_t count = recv_counts[source];
    const int64_t most = std::min(tokens, room);
    if (count < 0 || count > most) return Broken(BrokenCount(count, source, most));
    for (const int32_t* const end = rows + int64_t{count} * config.top_k; rows < end; ++rows) {
      if (*rows >= -1 && *rows < rows_capacity) continue;
      return Broken(BrokenCount(*rows, source, rows_capacity - 1));
    }
    room -= count;
  }
  return Status();
}

}  // namespace smfree::cpu
