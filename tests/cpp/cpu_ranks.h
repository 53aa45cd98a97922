// SPDX-License-Identifier: Apache-2.0
//
// What the tests of the CPU backend share: arrays of rows, one rank's arrays, ranks as threads,
// waiting for a receive, and a small group with its arrays.
#ifndef SMFREE_TESTS_CPP_CPU_RANKS_H_
#define SMFREE_TESTS_CPP_CPU_RANKS_H_

#include <chrono>
#include <cmath>
#include <cstring>
#include <functional>
#include <future>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "csrc/cpu/backend.h"
#include "csrc/protocol/layout.h"
#include "tests/cpp/check.h"

// A failed status shows its text.
#define CHECK_OK(status) CHECK_EQ((status).message(), std::string())

namespace smfree::cpu::test {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

// Rounds as the definition says, without tricks: one bit of the mantissa after the other is beyond
// suspicion, frexp and nearbyint nearly so.
inline float RoundTo(DType dtype, float value) {
  if (dtype == DType::kF32 || !std::isfinite(value)) return value;
  if (dtype == DType::kF16) return static_cast<float>(static_cast<_Float16>(value));
  int exponent;
  const float mantissa = std::frexp(value, &exponent);
  return std::ldexp(std::nearbyint(std::ldexp(mantissa, 8)), exponent - 8);
}

// Elements of a group's dtype.
class Array {
 public:
  Array() = default;
  // Full of a pattern that is no sensible value, so that elements left unwritten are noticed.
  Array(DType dtype, int64_t size) : dtype_(dtype), bytes_(size * ItemBytes(dtype), 0xee) {}

  void* data() { return bytes_.data(); }
  const void* data() const { return bytes_.data(); }
  int64_t size() const { return static_cast<int64_t>(bytes_.size()) / ItemBytes(dtype_); }
  float operator[](int64_t i) const {
    uint32_t bits = 0;
    if (dtype_ == DType::kF32) {
      std::memcpy(&bits, &bytes_[i * 4], 4);
    } else if (dtype_ == DType::kBF16) {
      std::memcpy(reinterpret_cast<char*>(&bits) + 2, &bytes_[i * 2], 2);
    } else {
      _Float16 half;
      std::memcpy(&half, &bytes_[i * 2], 2);
      return static_cast<float>(half);
    }
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  void Set(int64_t i, float value) {
    const float rounded = RoundTo(dtype_, value);
    if (dtype_ == DType::kF32) {
      std::memcpy(&bytes_[i * 4], &rounded, 4);
    } else if (dtype_ == DType::kBF16) {
      std::memcpy(&bytes_[i * 2], reinterpret_cast<const char*>(&rounded) + 2, 2);
    } else {
      const _Float16 half = static_cast<_Float16>(rounded);
      std::memcpy(&bytes_[i * 2], &half, 2);
    }
  }
  friend bool operator==(const Array& a, const Array& b) { return a.bytes_ == b.bytes_; }

 private:
  DType dtype_ = DType::kF32;
  std::vector<unsigned char> bytes_;
};

// The arrays of one rank for a dispatch and its combine, sized for `tokens` rows.
struct Arrays {
  explicit Arrays(const GroupConfig& c, int64_t tokens_in)
      : tokens(tokens_in),
        capacity(RowsCapacity(c, tokens_in)),
        x(c.dtype, tokens * c.hidden),
        topk_idx(tokens * c.top_k),
        topk_weights(tokens * c.top_k),
        places(tokens * std::min(c.top_k, c.num_ranks), -7),
        send_counts(c.num_ranks, -7),
        dx(c.dtype, capacity * c.hidden),
        weights(capacity, -7),
        group_sizes(c.num_experts / c.num_ranks, -7),
        rows(c.num_ranks * tokens * c.top_k, -7),
        recv_counts(c.num_ranks, -7),
        relay(c.hierarchical ? NodesOf(c).count() * tokens * PlacesPerNode(c) : 1, -7),
        out(c.dtype, tokens * c.hidden),
        slots(tokens * c.top_k, -7) {}

  int64_t tokens, capacity;
  Array x;
  std::vector<int32_t> topk_idx;
  std::vector<float> topk_weights;
  std::vector<int32_t> places, send_counts;
  Array dx;
  std::vector<float> weights;
  std::vector<int32_t> group_sizes;
  int32_t num_dropped = -7;
  std::vector<int32_t> rows, recv_counts, relay;
  Array out;
  std::vector<float> slots;
};

// Routings of the kinds that go wrong.
enum class Routing { kUniform, kSomeMissing, kNoRows, kOneExpert, kOneRankSilent };

inline void FillInputs(const GroupConfig& c, Arrays& a, Routing routing, std::mt19937& random,
                       int32_t rank) {
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < a.x.size(); ++i) a.x.Set(i, normal(random));
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
                      {a.x.data(), a.topk_idx.data(), a.topk_weights.data(), a.places.data(),
                       a.send_counts.data()});
}

inline void Receive(Group& group, int32_t rank, const Identity& identity, Arrays& a, Done done) {
  DispatchRecv(group, MakeCall(rank, identity, a),
               {a.capacity, a.dx.data(), a.weights.data(), a.group_sizes.data(), &a.num_dropped,
                a.rows.data(), a.recv_counts.data(), a.relay.data()},
               std::move(done));
}

// Returns dx, weighted or not, with `values` as slots or without.
inline Status SendBack(Group& group, int32_t rank, const Identity& identity, const Arrays& a,
                       const float* w, const float* values) {
  return CombineSend(
      group, MakeCall(rank, identity, a),
      {a.capacity, a.dx.data(), w, values, a.rows.data(), a.recv_counts.data(), a.relay.data()});
}

inline void ReceiveBack(Group& group, int32_t rank, const Identity& identity, Arrays& a,
                        bool with_slots, Done done) {
  CombineRecv(group, MakeCall(rank, identity, a),
              {a.places.data(), a.send_counts.data(), a.out.data(),
               with_slots ? a.slots.data() : nullptr},
              std::move(done));
}

inline GroupConfig SmallConfig(int32_t num_ranks) {
  GroupConfig config;
  config.num_ranks = num_ranks;
  config.num_experts = num_ranks * 2;
  config.top_k = 2;
  config.num_lanes = 2;
  config.hidden = 8;
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
