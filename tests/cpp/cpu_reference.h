// SPDX-License-Identifier: Apache-2.0
//
// The operations of the CPU backend once more, straight from their definitions, on the arrays of
// all ranks at once. No attention is paid to speed.
#ifndef SMFREE_TESTS_CPP_CPU_REFERENCE_H_
#define SMFREE_TESTS_CPP_CPU_REFERENCE_H_

#include <algorithm>
#include <cstring>
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

// How many rows the relay between `source` and the node of `rank` may hand on when it comes to
// those of this source.
inline int64_t RoomAtRelay(const GroupConfig& c, const World& world, int32_t source, int32_t rank) {
  const int32_t L = c.ranks_per_node;
  int64_t room = WireRows(c, world[source].tokens);
  for (int32_t s = source % L; s < source; s += L) {
    for (int32_t d = rank / L * L; d < (rank / L + 1) * L; ++d) {
      room -= static_cast<int64_t>(SentTo(c, world, d)[s].size());
    }
  }
  return room;
}

// How many of the rows that `source` sends to `rank` are handed on there: all, unless the relay
// between them has too many.
inline size_t HandedOn(const GroupConfig& c, const World& world, int32_t source, int32_t rank) {
  const size_t all = SentTo(c, world, rank)[source].size();
  if (!c.hierarchical) return all;
  int64_t room = RoomAtRelay(c, world, source, rank);
  for (int32_t d = rank / c.ranks_per_node * c.ranks_per_node; d < rank; ++d) {
    room -= static_cast<int64_t>(SentTo(c, world, d)[source].size());
  }
  return std::min(all, static_cast<size_t>(std::max<int64_t>(room, 0)));
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
    if (RoomAtRelay(c, world, source, rank) <= 0) continue;  // it is not taken
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

// The copies of a row that are for experts of `rank`.
inline int32_t CopiesFor(const GroupConfig& c, const Arrays& source, int64_t t, int32_t rank) {
  int32_t copies = 0;
  for (int32_t k = 0; k < c.top_k; ++k) {
    const int32_t e = source.topk_idx[t * c.top_k + k];
    copies += e >= 0 && e / (c.num_experts / c.num_ranks) == rank;
  }
  return copies;
}

// Slot k of the i-th row that `source` has sent to the rank of `a`: its row of the expert-grouped
// array, or -1; also of a row that was cut there.
inline int32_t GroupedRow(const GroupConfig& c, const Arrays& a, int64_t source, int64_t i,
                          int32_t k) {
  if (i >= a.recv_counts[source]) return -1;
  for (int64_t s = 0; s < source; ++s) i += a.recv_counts[s];
  return a.rows[i * c.top_k + k];
}

// A row on its way through a dispatch: as it is, or quantised and back.
inline void DispatchRow(const Rows& x, int64_t from, Rows& dx, int64_t to) {
  for (int32_t l = 0; l < x.format.count; ++l) {
    const Leaf& leaf = x.format.leaves[l];
    if (leaf.quantised) {
      dx.SetRow(l, to, ThroughMessage(x.format, leaf, x.Row(l, from)));
    } else {
      std::memcpy(dx[l].data() + to * leaf.bytes(), x[l].data() + from * leaf.bytes(),
                  static_cast<size_t>(leaf.bytes()));
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
    auto sent = SentTo(c, world, r);
    std::fill(a.rows.begin(), a.rows.end(), -1);
    std::fill(a.weights.begin(), a.weights.end(), 0.0f);
    a.dx.Fill(0);
    a.num_dropped = 0;
    size_t room = WireRows(c, a.tokens);
    for (int32_t s = 0; s < c.num_ranks; ++s) {
      const size_t handed = HandedOn(c, world, s, r);
      for (; sent[s].size() > std::min(room, handed); sent[s].pop_back()) {
        a.num_dropped += CopiesFor(c, world[s], sent[s].back(), r);
      }
      room -= sent[s].size();
      a.recv_counts[s] = static_cast<int32_t>(sent[s].size());
    }
    int64_t to_fill = a.capacity;
    if (a.to_fill < to_fill) {
      for (to_fill = 0; to_fill + c.expert_alignment <= a.to_fill;) to_fill += c.expert_alignment;
    }
    int64_t start = 0;
    for (int32_t e = 0; e < local; ++e) {
      int64_t count = 0;
      for (int32_t s = 0; s < c.num_ranks; ++s) {
        for (const int64_t t : sent[s]) {
          for (int32_t k = 0; k < c.top_k; ++k) {
            count += world[s].topk_idx[t * c.top_k + k] == r * local + e;
          }
        }
      }
      int64_t size = 0;
      while (size < count) size += c.expert_alignment;
      size = std::min(size, to_fill - start);
      a.group_sizes[e] = static_cast<int32_t>(size);
      a.num_rows[e] = static_cast<int32_t>(std::min(count, size));
      int64_t n = start, received = 0;
      for (int32_t s = 0; s < c.num_ranks; ++s) {
        for (size_t i = 0; i < sent[s].size(); ++i, ++received) {
          for (int32_t k = 0; k < c.top_k; ++k) {
            const int64_t slot = sent[s][i] * c.top_k + k;
            if (world[s].topk_idx[slot] != r * local + e) continue;
            if (n == start + size) {
              ++a.num_dropped;
              continue;
            }
            a.rows[received * c.top_k + k] = static_cast<int32_t>(n);
            a.weights[n] = world[s].topk_weights[slot];
            DispatchRow(world[s].x, sent[s][i], a.dx, n++);
          }
        }
      }
      start += size;
    }
    if (a.num_dropped > 0 && c.overflow == Overflow::kError) {
      a.dx.Fill(0xff);
      std::memset(a.weights.data(), 0xff, a.weights.size() * sizeof(float));
    }
  }
}

inline void AddTo(std::vector<float>& sum, const std::vector<float>& row, float weight = 1.0f) {
  for (size_t i = 0; i < sum.size(); ++i) sum[i] += row[i] * weight;
}

// Leaf l of row t of `rank` after a combine, before it is rounded.
inline std::vector<float> CombinedRow(const GroupConfig& c, const World& world, int32_t rank,
                                      int64_t t, int32_t l, bool weighted) {
  const int32_t P = std::min(c.top_k, c.num_ranks);
  const Arrays& a = world[rank];
  const RowFormat& format = a.y.format;
  const Leaf& leaf = format.leaves[l];
  const std::vector<float> zero(leaf.width), lost(leaf.width, kNaN);
  const bool loses = c.overflow == Overflow::kError;
  std::vector<float> sum = zero, of_node = zero;
  int64_t node = -1;
  const auto end_node = [&] {
    if (c.hierarchical && node >= 0) of_node = ThroughMessage(format, leaf, of_node);
    AddTo(sum, std::exchange(of_node, zero));
  };
  for (int32_t p = 0; p < P; ++p) {
    const int32_t place = a.places[t * P + p];
    if (place < 0) continue;
    const int64_t d = place / a.tokens, i = place % a.tokens;
    const int64_t node_of_d = c.hierarchical ? d / c.ranks_per_node : d;
    if (node_of_d != node) end_node();
    node = node_of_d;
    if (i >= world[d].recv_counts[rank]) {  // cut
      if (loses) of_node = lost;
      continue;
    }
    std::vector<float> partial = zero;
    int32_t copies = 0;
    for (int32_t k = 0; k < c.top_k; ++k) {
      const int32_t n = GroupedRow(c, world[d], rank, i, k);
      if (n < 0) continue;
      ++copies;
      AddTo(partial, world[d].y.Row(l, n), weighted ? world[d].weights[n] : 1.0f);
    }
    if (copies == 0 && loses) partial = lost;
    AddTo(of_node, ThroughMessage(format, leaf, partial));
  }
  end_node();
  if (a.adds) AddTo(sum, a.add.Row(l, t));
  return sum;
}

// out and slots of every rank: what comes back of y [N], weighted by weights [N] or not, and of
// weights as slots. Needs the routing.
inline void ReferenceCombine(const GroupConfig& c, World& world, bool weighted) {
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
          const int32_t n = GroupedRow(c, world[d], r, i, k);
          slot += n < 0 ? 0.0f : world[d].weights[n];
        }
        a.slots[t * c.top_k + k] = slot;
      }
      for (int32_t l = 0; l < a.y.format.count; ++l) {
        a.out.SetRow(l, t, CombinedRow(c, world, r, t, l, weighted));
      }
    }
  }
}

}  // namespace smfree::cpu::test

#endif  // SMFREE_TESTS_CPP_CPU_REFERENCE_H_
