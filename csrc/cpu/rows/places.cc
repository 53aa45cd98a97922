// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/rows/places.h"

#include <algorithm>

#include "csrc/cpu/runtime/completion_pool.h"
#include "csrc/cpu/phases/handle.h"
#include "csrc/cpu/processes/outbox.h"

namespace smfree::cpu {

void PlaceByExpert(const GroupConfig& config, int64_t tokens, const int32_t* experts, int64_t rows,
                   int32_t first_rank, int32_t ranks, int32_t width, int32_t* places,
                   int32_t* counts) {
  const int32_t local_experts = config.num_experts / config.num_ranks;
  const int32_t top_k = config.top_k;
  std::vector<int32_t> destinations;
  for (int64_t row = 0; row < rows; ++row, experts += top_k, places += width) {
    destinations.clear();
    for (int32_t k = 0; k < top_k; ++k) {
      if (experts[k] < 0) continue;
      const int32_t destination = experts[k] / local_experts - first_rank;
      if (destination < 0 || destination >= ranks) continue;
      const auto at = std::lower_bound(destinations.begin(), destinations.end(), destination);
      if (at == destinations.end() || *at != destination) destinations.insert(at, destination);
    }
    std::fill_n(places, width, -1);
    for (size_t p = 0; p < destinations.size(); ++p) {
      const int32_t destination = destinations[p];
      places[p] = static_cast<int32_t>(destination * tokens) + counts[destination]++;
    }
  }
}

WirePlaces::WirePlaces(const GroupConfig& config, int64_t tokens, const int32_t* places,
                       const int32_t* send_counts)
    : by_rank_{places, tokens, PlacesPerRow(config)}, hierarchical_(config.hierarchical) {
  const Nodes nodes = NodesOf(config);
  if (!hierarchical_) {
    counts_.assign(send_counts, send_counts + config.num_ranks);
    return;
  }
  width_ = WirePlacesPerRow(config);
  by_node_.assign(static_cast<size_t>(tokens * width_), -1);
  counts_.assign(static_cast<size_t>(nodes.count()), 0);
  for (int64_t row = 0; row < tokens; ++row) {
    int32_t* to = by_node_.data() + row * width_;
    int32_t last_node = -1;
    by_rank_.ForEach(row, [&](int32_t rank, int64_t) {
      const int32_t node = nodes.NodeOf(rank);
      if (node == last_node) return;
      last_node = node;
      *to++ = static_cast<int32_t>(node * tokens) + counts_[static_cast<size_t>(node)]++;
    });
  }
}

void PackAtPlaces(const Exchange& exchange, const PackedRows& from, const Places& places,
                  int32_t first_region, Outbox& outbox) {
  const int32_t top_k = exchange.config().top_k;
  const int64_t bytes = outbox.total_rows() * outbox.stride();
  const Writes writes = WritesFor(bytes * exchange.num_local());
  const auto pack = [&](int64_t begin, int64_t end) {
    RowPacker packer(from.rows);
    for (int64_t row = begin; row < end; ++row) {
      packer.Read(row);
      places.ForEach(row, [&](int32_t destination, int64_t i) {
        const int32_t region = first_region + destination;
        packer.Write(outbox.row(region, i), writes);
        if (from.experts) {
          std::copy_n(from.experts + row * top_k, top_k, outbox.experts(region) + i * top_k);
        }
        if (from.slots) {
          std::copy_n(from.slots + row * top_k, top_k, outbox.slots(region) + i * top_k);
        }
      });
    }
    FinishWrites(writes);
  };
  ParallelFor(from.count, ThreadsFor(bytes, exchange.threads_per_rank()), pack);
}

void SumAtPlaces(const Exchange& exchange, const std::vector<Message>& messages,
                 const Places& places, int32_t first_region, const RowFormat& format,
                 const SummedRows& to) {
  const int32_t top_k = exchange.config().top_k;
  const bool cut_is_lost = exchange.config().overflow == Overflow::kError;
  const auto sum_up = [&](int64_t begin, int64_t end) {
    RowSum sum(format, places.width + 1);  // and one that `store` may add
    for (int64_t row = begin; row < end; ++row) {
      float* const slots = to.slots ? to.slots + row * top_k : nullptr;
      if (slots) std::fill_n(slots, top_k, 0.0f);
      sum.Clear();
      places.ForEach(row, [&](int32_t destination, int64_t i) {
        const Message& message = messages[static_cast<size_t>(first_region + destination)];
        if (i >= message.header.rows) {
          if (cut_is_lost) sum.Lose();
          return;
        }
        sum.AddPacked(message.row(i));
        const float* const values = message.slots() + i * top_k;
        for (int32_t k = 0; slots && k < top_k; ++k) slots[k] += values[k];
      });
      to.store(sum, row);
    }
  };
  ParallelFor(to.count, ThreadsFor(to.count * format.bytes(), exchange.threads_per_rank()), sum_up);
}

}  // namespace smfree::cpu
