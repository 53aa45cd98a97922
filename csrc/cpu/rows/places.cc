// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/rows/places.h"

#include <algorithm>

#include "csrc/cpu/runtime/completion_pool.h"
#include "csrc/cpu/phases/handle.h"
#include "csrc/cpu/processes/outbox.h"
#include "csrc/cpu/rows/rows.h"

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
  width_ = std::min(config.top_k, nodes.count());
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
  const int64_t bytes = exchange.config().hidden * ItemBytes(exchange.config().dtype);
  const Writes writes = WritesFor(outbox.total_rows() * bytes * exchange.num_local());
  const auto pack = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      places.ForEach(row, [&](int32_t destination, int64_t i) {
        const int32_t region = first_region + destination;
        CopyRow(outbox.rows(region) + i * exchange.row_bytes(), from.rows + row * from.row_stride,
                bytes, writes);
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
  ParallelFor(from.count, ThreadsFor(outbox.total_rows() * bytes, exchange.threads_per_rank()),
              pack);
}

void SumAtPlaces(const Exchange& exchange, const std::vector<Message>& messages,
                 const Places& places, int32_t first_region, const SummedRows& to) {
  const GroupConfig& config = exchange.config();
  const int32_t top_k = config.top_k;
  const auto sum = [&](int64_t begin, int64_t end) {
    std::vector<WeightedRow> terms(static_cast<size_t>(places.width));
    for (int64_t row = begin; row < end; ++row) {
      float* const slots = to.slots ? to.slots + row * top_k : nullptr;
      if (slots) std::fill_n(slots, top_k, 0.0f);
      int64_t num_terms = 0;
      places.ForEach(row, [&](int32_t destination, int64_t i) {
        const Message& message = messages[static_cast<size_t>(first_region + destination)];
        const MessageLayout layout(message.header.rows, message.header.experts,
                                   message.header.slots, exchange.row_bytes());
        terms[static_cast<size_t>(num_terms++)] = {
            message.rows(layout) + i * exchange.row_bytes(), 1.0f};
        const float* const values = message.slots(layout) + i * top_k;
        for (int32_t k = 0; slots && k < top_k; ++k) slots[k] += values[k];
      });
      SumRows(config.dtype, to.rows + row * to.row_stride, terms.data(), num_terms, config.hidden);
    }
  };
  const int64_t bytes = to.count * config.hidden * ItemBytes(config.dtype);
  ParallelFor(to.count, ThreadsFor(bytes, exchange.threads_per_rank()), sum);
}

}  // namespace smfree::cpu
