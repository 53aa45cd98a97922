// SPDX-License-Identifier: Apache-2.0
//
// The operations of the CPU backend once more, straight from their definitions, on the arrays of
// all ranks at once. No attention is paid to speed.
#ifndef SMFREE_TESTS_CPP_CPU_REFERENCE_H_
#define SMFREE_TESTS_CPP_CPU_REFERENCE_H_

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "tests/cpp/cpu_ranks.h"

namespace smfree::cpu::test {

using World = std::vector<Arrays>;  // by rank

// The rows that each source sends to `rank`, by source: their numbers at the source.
inline std::vector<std::vector<int64_t>> SentTo(const GroupConfig& c, const World& world,
                                                int32_t rank) {
  const int32_t local = c.num_experts / c.num_ranks;
  std::vector<std::vector<int64_t>> sent(c.num_ranks);
  for (int32_t s = 0; s < c.num_ranks; ++s) {
    for (int64_t t = 0; t < world[s].tokens; ++t) {
      bool here = false;
      for (int32_t k = 0; k < c.top_k; ++k) {
        const int32_t e = world[s].topk_idx[t * c.top_k + k];
        here = here || (e >= 0 && e / local == rank);
      }
      if (here) sent[s].push_back(t);
    }
  }
  return sent;
}

// What `rank` relays: the rows that the ranks with its index send to its node, and where they go.
inline void ReferenceRelay(const GroupConfig& c, World& world, int32_t rank) {
  const Nodes nodes = NodesOf(c);
  const int32_t L = nodes.ranks_per_node, Q = std::min(c.top_k, L);
  Arrays& a = world[rank];
  std::fill(a.relay.begin(), a.relay.end(), -1);
  if (!c.hierarchical) return;
  for (int32_t n = 0; n < nodes.count(); ++n) {
    const int32_t source = n * L + rank % L;
    int64_t row = 0;
    std::vector<int32_t> sent(L, 0);
    for (int64_t t = 0; t < a.tokens; ++t) {
      int32_t p = 0;
      for (int32_t j = 0; j < L; ++j) {
        const auto to_j = SentTo(c, world, rank / L * L + j)[source];
        if (std::find(to_j.begin(), to_j.end(), t) == to_j.end()) continue;
        a.relay[(n * a.tokens + row) * Q + p++] = static_cast<int32_t>(j * a.tokens + sent[j]++);
      }
      row += p > 0;
    }
  }
}

// Fills in everything that a dispatch produces, on every rank.
inline void ReferenceDispatch(const GroupConfig& c, World& world) {
  const int32_t local = c.num_experts / c.num_ranks;
  const int32_t P = std::min(c.top_k, c.num_ranks);
  for (int32_t r = 0; r < c.num_ranks; ++r) {
    Arrays& a = world[r];
    std::fill(a.places.begin(), a.places.end(), -1);
    for (int32_t d = 0; d < c.num_ranks; ++d) {
      const auto to_d = SentTo(c, world, d)[r];
      a.send_counts[d] = static_cast<int32_t>(to_d.size());
      for (size_t i = 0; i < to_d.size(); ++i) {
        int32_t p = 0;
        while (a.places[to_d[i] * P + p] >= 0) ++p;
        a.places[to_d[i] * P + p] = static_cast<int32_t>(d * a.tokens + i);
      }
    }

    ReferenceRelay(c, world, r);
    const auto sent = SentTo(c, world, r);
    std::fill(a.rows.begin(), a.rows.end(), -1);
    std::fill(a.weights.begin(), a.weights.end(), 0.0f);
    for (int64_t i = 0; i < a.dx.size(); ++i) a.dx.Set(i, 0.0f);
    a.num_dropped = 0;
    int64_t start = 0;
    for (int32_t e = 0; e < local; ++e) {
      int64_t count = 0;
      for (int32_t s = 0; s < c.num_ranks; ++s) {
        for (const int32_t expert : world[s].topk_idx) count += expert == r * local + e;
      }
      int64_t size = 0;
      while (size < count) size += c.expert_alignment;
      size = std::min(size, a.capacity - start);
      a.group_sizes[e] = static_cast<int32_t>(size);
      int64_t n = start;
      for (int32_t s = 0; s < c.num_ranks; ++s) {
        a.recv_counts[s] = static_cast<int32_t>(sent[s].size());
        for (size_t i = 0; i < sent[s].size(); ++i) {
          for (int32_t k = 0; k < c.top_k; ++k) {
            const int64_t slot = sent[s][i] * c.top_k + k;
            if (world[s].topk_idx[slot] != r * local + e) continue;
            if (n == start + size) {
              ++a.num_dropped;
              continue;
            }
            a.rows[(s * a.tokens + i) * c.top_k + k] = static_cast<int32_t>(n);
            a.weights[n] = world[s].topk_weights[slot];
            for (int64_t h = 0; h < c.hidden; ++h) {
              a.dx.Set(n * c.hidden + h, world[s].x[sent[s][i] * c.hidden + h]);
            }
            ++n;
          }
        }
      }
      start += size;
    }
    if (a.num_dropped > 0 && c.overflow == Overflow::kError) {
      const float nan = std::numeric_limits<float>::quiet_NaN();
      for (int64_t i = 0; i < a.dx.size(); ++i) a.dx.Set(i, nan);
      std::fill(a.weights.begin(), a.weights.end(), nan);
    }
  }
}

// out and slots of every rank: what comes back of y [N,H] and values [N] (by rank), weighted by w
// (by rank) unless that is empty. Needs the routing.
inline void ReferenceCombine(const GroupConfig& c, World& world, const std::vector<Array>& y,
                             const std::vector<std::vector<float>>& w,
                             const std::vector<std::vector<float>>& values) {
  const int32_t P = std::min(c.top_k, c.num_ranks);
  for (int32_t r = 0; r < c.num_ranks; ++r) {
    Arrays& a = world[r];
    for (int64_t t = 0; t < a.tokens; ++t) {
      for (int32_t k = 0; k < c.top_k; ++k) {
        float slot = 0;
        for (int32_t p = 0; p < P; ++p) {
          const int32_t place = a.places[t * P + p];
          if (place < 0) continue;
          const int64_t d = place / a.tokens, i = place % a.tokens;
          const int32_t n = world[d].rows[(r * a.tokens + i) * c.top_k + k];
          slot += n < 0 ? 0.0f : values[d][n];
        }
        a.slots[t * c.top_k + k] = slot;
      }
      for (int64_t h = 0; h < c.hidden; ++h) {
        // Over the ranks, or over the ranks of a node and then over the nodes.
        float sum = 0, of_node = 0;
        int64_t node = 0;
        for (int32_t p = 0; p < P; ++p) {
          const int32_t place = a.places[t * P + p];
          if (place < 0) continue;
          const int64_t d = place / a.tokens, i = place % a.tokens;
          const int64_t node_of_d = c.hierarchical ? d / c.ranks_per_node : d;
          if (node_of_d != node) {
            sum += RoundTo(c.dtype, std::exchange(of_node, 0.0f));
            node = node_of_d;
          }
          float partial = 0;
          for (int32_t k = 0; k < c.top_k; ++k) {
            const int32_t n = world[d].rows[(r * a.tokens + i) * c.top_k + k];
            if (n < 0) continue;
            const float term = y[d][n * c.hidden + h];
            partial += w.empty() ? term : w[d][n] * term;
          }
          of_node += RoundTo(c.dtype, partial);
        }
        a.out.Set(t * c.hidden + h, sum + RoundTo(c.dtype, of_node));
      }
    }
  }
}

}  // namespace smfree::cpu::test

#endif  // SMFREE_TESTS_CPP_CPU_REFERENCE_H_
