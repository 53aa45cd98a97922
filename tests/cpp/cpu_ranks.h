// SPDX-License-Identifier: Apache-2.0
//
// What the tests of the CPU backend share: one rank's arrays, ranks as threads, waiting for a
// receive, and a small group with its arrays.
#ifndef SMFREE_TESTS_CPP_CPU_RANKS_H_
#define SMFREE_TESTS_CPP_CPU_RANKS_H_

#include <algorithm>
#include <chrono>
#include <functional>
#include <future>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "csrc/cpu/backend.h"
#include "csrc/protocol/layout.h"
#include "tests/cpp/check.h"
#include "tests/cpp/cpu_numbers.h"

// A failed status shows its text.
#define CHECK_OK(status) CHECK_EQ((status).message(), std::string())

namespace smfree::cpu::test {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

// Rows of float32 as long as the group's longest.
inline RowFormat LongestRows(const GroupConfig& c) {
  return Plain(DType::kF32, static_cast<int32_t>(c.row_bytes / 4));
}

// The arrays of one rank for a dispatch and its combine, sized for `tokens` rows. The combine
// returns y.
struct Arrays {
  Arrays(const GroupConfig& c, int64_t tokens_in) : Arrays(c, tokens_in, LongestRows(c)) {}
  Arrays(const GroupConfig& c, int64_t tokens_in, const RowFormat& rows_in)
      : Arrays(c, tokens_in, rows_in, rows_in) {}
  Arrays(const GroupConfig& c, int64_t tokens_in, const RowFormat& there, const RowFormat& back)
      : tokens(tokens_in),
        capacity(RowsCapacity(c, tokens_in)),
        x(there, tokens),
        topk_idx(tokens * c.top_k),
        topk_weights(tokens * c.top_k),
        places(tokens * std::min(c.top_k, c.num_ranks), -7),
        send_counts(c.num_ranks, -7),
        dx(there, capacity),
        weights(capacity, -7),
        group_sizes(c.num_experts / c.num_ranks, -7),
        num_rows(c.num_experts / c.num_ranks, -7),
        rows(WireRows(c, tokens) * c.top_k, -7),
        recv_counts(c.num_ranks, -7),
        relay(c.hierarchical ? NodesOf(c).count() * tokens * PlacesPerNode(c) : 1, -7),
        y(back, capacity),
        add(back, tokens),
        out(back, tokens),
        slots(tokens * c.top_k, -7) {}

  int64_t tokens, capacity;
  Rows x;
  std::vector<int32_t> topk_idx;
  std::vector<float> topk_weights;
  std::vector<int32_t> places, send_counts;
  int32_t to_fill = std::numeric_limits<int32_t>::max();  // rows of dx
  Rows dx;
  std::vector<float> weights;
  std::vector<int32_t> group_sizes, num_rows;
  int32_t num_dropped = -7;
  std::vector<int32_t> rows, recv_counts, relay;
  Rows y;
  bool adds = false;  // whether `add` is added
  Rows add, out;
  std::vector<float> slots;
};

// Routings of the kinds that go wrong.
enum class Routing { kUniform, kSomeMissing, kNoRows, kOneExpert, kOneRankSilent };

inline void FillRandomly(Rows& rows, std::mt19937& random) {
  std::normal_distribution<float> normal;
  for (int32_t l = 0; l < rows.format.count; ++l) {
    Array& leaf = rows[l];
    if (leaf.dtype() != DType::kOther) {
      for (int64_t i = 0; i < leaf.size(); ++i) leaf.Set(i, normal(random));
    } else {
      for (int64_t i = 0; i < leaf.bytes(); ++i) {
        leaf.data()[i] = static_cast<unsigned char>(random());
      }
    }
  }
}

inline void FillInputs(const GroupConfig& c, Arrays& a, Routing routing, std::mt19937& random,
                       int32_t rank) {
  std::normal_distribution<float> normal;
  FillRandomly(a.x, random);
  FillRandomly(a.y, random);
  FillRandomly(a.add, random);
  for (float& weight : a.topk_weights) weight = normal(random);
  std::vector<int32_t> experts(c.num_experts);
  for (int32_t e = 0; e < c.num_experts; ++e) experts[e] = e;
  for (int64_t t = 0; t < a.tokens; ++t) {
    std::shuffle(experts.begin(), experts.end(), random);
    if (routing == Routing::kOneExpert) {
      std::swap(*std::find(experts.begin(), experts.end(), 1 % c.num_experts), experts[0]);
    }
    for (int32_t k = 0; k < c.top_k; ++k) {
      const bool none = routing == Routing::kNoRows ||
                        (routing == Routing::kSomeMissing && random() % 3 == 0) ||
                        (routing == Routing::kOneRankSilent && rank == 0) ||
                        (routing == Routing::kOneExpert && k > 0);
      a.topk_idx[t * c.top_k + k] = none ? -1 : experts[k];
    }
  }
}

// That a status is a fault of this kind, and that its text has these words.
inline void CheckFault(const Status& status, FaultKind kind,
                       const std::vector<std::string>& words) {
  CHECK_EQ(Name(status.kind()), std::string(Name(kind)));
  for (const std::string& word : words) {
    if (status.message().find(word) == std::string::npos) CHECK_EQ(status.message(), word);
  }
}

inline std::future<Status> Start(const std::function<void(Done)>& receive) {
  // Shared, because the thread that sets the value may still be inside set_value when get returns.
  auto promise = std::make_shared<std::promise<Status>>();
  receive([promise](Status status) { promise->set_value(std::move(status)); });
  return promise->get_future();
}

inline Status Await(const std::function<void(Done)>& receive) { return Start(receive).get(); }

inline bool WaitFor(const std::function<bool()>& condition) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (!condition()) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return true;
}

inline void RunRanks(int32_t num_ranks, const std::function<void(int32_t)>& body) {
  std::vector<std::thread> threads;
  for (int32_t rank = 0; rank < num_ranks; ++rank) threads.emplace_back(body, rank);
  for (std::thread& thread : threads) thread.join();
}

// A group whose ranks all live here.
inline std::shared_ptr<Group> MakeLocalGroup(const GroupConfig& config, int64_t group_id = 1) {
  auto group = Group::Create(group_id, 0, config, std::vector<int32_t>(config.num_ranks, 0), 0, "");
  return group.ok() ? group.value() : nullptr;
}

inline Identity MakeIdentity(int64_t number, int32_t lane = 0, int32_t derivation = 0) {
  Identity identity;
  identity.run_id = 1;
  identity.number = number;
  identity.lane = lane;
  identity.derivation = derivation;
  identity.call_site = 0xabc;
  return identity;
}

inline Call MakeCall(int32_t rank, const Identity& identity, const Arrays& a) {
  return {rank, identity, a.tokens};
}

inline Status Send(Group& group, int32_t rank, const Identity& identity, Arrays& a) {
  return DispatchSend(group, MakeCall(rank, identity, a),
                      {a.x.in(), a.topk_idx.data(), a.topk_weights.data(), a.places.data(),
                       a.send_counts.data()});
}

inline void Receive(Group& group, int32_t rank, const Identity& identity, Arrays& a, Done done) {
  DispatchRecv(group, MakeCall(rank, identity, a),
               {a.capacity, &a.to_fill, a.dx.out(), a.weights.data(), a.group_sizes.data(),
                a.num_rows.data(), &a.num_dropped, a.rows.data(), a.recv_counts.data(),
                a.relay.data()},
               std::move(done));
}

// Along the routing of a dispatch.
inline DispatchRecvCachedArrays CachedArrays(const Arrays& a, Rows& x, float* values) {
  DispatchRecvCachedArrays arrays;
  arrays.rows_capacity = a.capacity;
  arrays.rows = a.rows.data();
  arrays.recv_counts = a.recv_counts.data();
  arrays.relay = a.relay.data();
  arrays.x = x.out();
  arrays.values = values;
  return arrays;
}

// Returns y, weighted or not, with `values` as slots or without.
inline Status SendBack(Group& group, int32_t rank, const Identity& identity, const Arrays& a,
                       const float* w, const float* values) {
  return CombineSend(
      group, MakeCall(rank, identity, a),
      {a.capacity, a.y.in(), w, values, a.rows.data(), a.recv_counts.data(), a.relay.data()});
}

inline void ReceiveBack(Group& group, int32_t rank, const Identity& identity, Arrays& a,
                        bool with_slots, Done done) {
  CombineRecv(group, MakeCall(rank, identity, a),
              {a.places.data(), a.send_counts.data(), a.adds ? a.add.in() : RowsIn(),
               a.out.out(), with_slots ? a.slots.data() : nullptr},
              std::move(done));
}

inline GroupConfig SmallConfig(int32_t num_ranks) {
  GroupConfig config;
  config.num_ranks = num_ranks;
  config.num_experts = num_ranks * 2;
  config.top_k = 2;
  config.num_lanes = 2;
  config.row_bytes = 8 * 4;
  config.max_tokens = 10;
  config.timeout_s = 30;
  return config;
}

// A group with one set of arrays per rank.
struct Setup {
  explicit Setup(const GroupConfig& config, int64_t tokens = 10)
      : id(++last_id), group(MakeLocalGroup(config, id)) {
    std::mt19937 random(1);
    for (int32_t rank = 0; rank < config.num_ranks; ++rank) {
      arrays.emplace_back(config, tokens);
      FillInputs(config, arrays.back(), Routing::kUniform, random, rank);
    }
  }
  ~Setup() { group->Close(); }

  Status SendOn(int32_t rank, const Identity& identity) {
    return Send(*group, rank, identity, arrays[rank]);
  }
  std::future<Status> ReceiveOn(int32_t rank, const Identity& identity) {
    return Start([&](Done done) {
      Receive(*group, rank, identity, arrays[rank], std::move(done));
    });
  }

  static inline int64_t last_id = 0;
  const int64_t id;
  std::shared_ptr<Group> group;
  std::vector<Arrays> arrays;
};

}  // namespace smfree::cpu::test

#endif  // SMFREE_TESTS_CPP_CPU_RANKS_H_
