// SPDX-License-Identifier: Apache-2.0
//
// The CPU backend: an expert-parallel group whose ranks are threads of one process, or of several
// processes of one host, and the seven phases that exchange rows between them. No XLA, no Python.
//
// Sizes, per rank: R ranks, E experts, El = E / R local experts, T rows sent (equal on all ranks,
// at most max_tokens), K top_k, P = min(K, R) places of a row, H hidden, N rows of the
// expert-grouped array. Rows are H elements of the group's dtype; all arrays are dense and
// row-major.
//
//   places      int32[T,P]    destination_rank * T + position in that destination's list,
//                             ascending; -1 fills the end (places.h)
//   send_counts int32[R]      rows sent to each rank
//   rows        int32[R,T,K]  of source s, its i-th row here, its slot k: the row of the
//                             expert-grouped array, or -1
//   recv_counts int32[R]      rows received from each rank
//   relay       int32[M,T,Q]  hierarchical mode, else not used: what this rank relays (relay.h). Of
//                             the rank with its index in node n of M nodes, the i-th row here: its
//                             places in this node of L ranks, index * T + position; Q = min(K, L)
//   slots       float32[T,K]  one value per (row, slot) that rides along with the row
//
// Threads: every function may be called from any thread. A send returns when its rows are packed
// and its input may be reused. A receive returns at once; its Done is called exactly once, inline
// if all messages are there, else on a pool thread, never on the mover. The arrays of a receive
// must live until then. fork() without exec() is not supported once a group exists.
#ifndef SMFREE_CSRC_CPU_BACKEND_H_
#define SMFREE_CSRC_CPU_BACKEND_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "csrc/protocol/group_config.h"
#include "csrc/protocol/identity.h"
#include "csrc/protocol/status.h"

namespace smfree::cpu {

// Makes the mover a bad one, for tests. Messages of one stream from one rank to another always stay
// in order, because that is what every mover guarantees.
struct Chaos {
  uint64_t seed = 0;
  int64_t max_delay_us = 0;        // each message is held back by a random time up to this
  bool reorder = false;            // messages may overtake those of other peers and other streams
  double stall_probability = 0.0;  // per message: everything stands still ...
  int64_t stall_ms = 0;            // ... for this long
  bool enabled() const { return max_delay_us > 0 || (stall_probability > 0 && stall_ms > 0); }
};

struct PhaseStats {
  int64_t calls = 0;
  int64_t rows = 0;     // rows of the messages that the phase sends or unpacks
  int64_t bytes = 0;    // bytes of these rows with their slots and expert ids
  int64_t wait_ns = 0;  // receives only: from the call until the last message was there
};

struct Stats {
  PhaseStats dispatch_send, dispatch_recv, combine_send, combine_recv;
  int64_t rows_relayed = 0;   // hierarchical mode: what relays sent on the second leg
  int64_t bytes_relayed = 0;  // bytes of these
  int64_t dispatch_internode_bytes = 0;  // bytes of messages from one node to another, by operation
  int64_t combine_internode_bytes = 0;
  int64_t rows_dropped = 0;        // copies that exceeded recv_capacity
  int64_t pending_receives = 0;    // receives that wait now
  int64_t messages_in_flight = 0;  // arrived here and not yet received
  int64_t arena_bytes_in_use = 0;  // rows packed by ranks of this process, not yet unpacked
  int64_t arena_bytes_high_water = 0;
};

using Done = std::function<void(Status)>;

class Exchange;

// The ranks of one group that live in this process.
class Group {
 public:
  // Registers the group under (group_id, replica): `group_id` numbers the groups of a program,
  // `replica` the coordinates of the mesh axes beside the expert-parallel one. If all ranks are
  // local the group is ready; else publish address() and call Connect.
  static StatusOr<std::shared_ptr<Group>> Create(int64_t group_id, int32_t replica,
                                                 const GroupConfig& config,
                                                 std::vector<int32_t> process_of_rank,
                                                 int32_t my_process, std::string cookie);
  ~Group();  // closes
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;

  // Where the other processes reach this one: an abstract Unix socket name; "" if all are local.
  std::string address() const;
  // `addresses` by process. Collective; returns when this process is connected to every other one,
  // or after timeout_s. Processes of another user, cookie or configuration are refused.
  Status Connect(const std::vector<std::string>& addresses);

  // Ends pending receives with an error, hands what was sent to the peers, says goodbye to them and
  // removes the group from the registry. Idempotent.
  void Close();
  // The first fault of the group, which stays; or else an overflow since the last Check, which is
  // cleared by this.
  Status Check();
  Stats stats() const;
  // For tests: set while no operation is in flight.
  void SetChaos(const Chaos& chaos);
  // Memory held for rows in flight, by this process.
  int64_t memory_bytes() const;

  const GroupConfig& config() const;
  bool IsLocal(int32_t rank) const;
  Exchange& exchange() { return *exchange_; }  // for the phases

 private:
  explicit Group(std::shared_ptr<Exchange> exchange);
  std::shared_ptr<Exchange> exchange_;
};

// The open group of that name in this process, or nullptr.
std::shared_ptr<Group> FindGroup(int64_t group_id, int32_t replica);

// Closes every group of the process. Runs at process exit too; call it earlier where something that
// waits for receives is torn down before that (an XLA client).
void CloseAllGroups();

// What every phase needs. Identity::operation is set by the phase.
struct Call {
  int32_t rank = 0;
  Identity identity;
  int64_t tokens = 0;  // T
};

// places, send_counts <- topk_idx; sends x rows with their expert ids and weights.
struct DispatchSendArgs : Call {
  const void* x = nullptr;              // [T,H]
  const int32_t* topk_idx = nullptr;    // [T,K], -1 = no expert
  const float* topk_weights = nullptr;  // [T,K]
  int32_t* places = nullptr;            // out [T,P]
  int32_t* send_counts = nullptr;       // out [R]
};
Status DispatchSend(Group& group, const DispatchSendArgs& args);

// The expert-grouped rows and the routing of this receiver. All of every output is written; rows
// past the end and padding rows are zero.
struct DispatchRecvArgs : Call {
  int64_t rows_capacity = 0;       // N
  void* x = nullptr;               // out [N,H]
  float* weights = nullptr;        // out [N]
  int32_t* group_sizes = nullptr;  // out [El]
  int32_t* num_dropped = nullptr;  // out []
  int32_t* rows = nullptr;         // out [R,T,K]
  int32_t* recv_counts = nullptr;  // out [R]
  int32_t* relay = nullptr;        // out [M,T,Q]
};
void DispatchRecv(Group& group, const DispatchRecvArgs& args, Done done);

// Sends x rows (with slots) along a known routing.
struct DispatchSendCachedArgs : Call {
  const void* x = nullptr;               // [T,H]
  const float* slots = nullptr;          // [T,K] or null
  const int32_t* places = nullptr;       // [T,P]
  const int32_t* send_counts = nullptr;  // [R]
};
Status DispatchSendCached(Group& group, const DispatchSendCachedArgs& args);

// x[rows[s,i,k]] = row i of source s; values[rows[s,i,k]] = its slot k. Everything else is zero.
struct DispatchRecvCachedArgs : Call {
  int64_t rows_capacity = 0;             // N
  const int32_t* rows = nullptr;         // [R,T,K]
  const int32_t* recv_counts = nullptr;  // [R]
  const int32_t* relay = nullptr;        // [M,T,Q]
  void* x = nullptr;                     // out [N,H]
  float* values = nullptr;               // out [N] or null
};
void DispatchRecvCached(Group& group, const DispatchRecvCachedArgs& args, Done done);

// With n = rows[s,i,k] and r = row i of source s: x[n] = w[n] * r and values[n] = <y[n], r> in
// float32. Everything else is zero.
struct DispatchRecvWeightedArgs : Call {
  int64_t rows_capacity = 0;             // N
  const void* y = nullptr;               // [N,H]
  const float* w = nullptr;              // [N]
  const int32_t* rows = nullptr;         // [R,T,K]
  const int32_t* recv_counts = nullptr;  // [R]
  const int32_t* relay = nullptr;        // [M,T,Q]
  void* x = nullptr;                     // out [N,H]
  float* values = nullptr;               // out [N]
};
void DispatchRecvWeighted(Group& group, const DispatchRecvWeightedArgs& args, Done done);

// Returns to source s, for its i-th row here, sum over k ascending of w[n] * y[n], n = rows[s,i,k],
// in float32, rounded once; and as slot k values[n], or 0 without n. In hierarchical mode the relay
// of s adds up what its node returns, ranks ascending, in the same way; that part runs when it has
// arrived, and needs no array of the call.
struct CombineSendArgs : Call {
  int64_t rows_capacity = 0;             // N
  const void* y = nullptr;               // [N,H]
  const float* w = nullptr;              // [N] or null: ones
  const float* values = nullptr;         // [N] or null: no slots
  const int32_t* rows = nullptr;         // [R,T,K]
  const int32_t* recv_counts = nullptr;  // [R]
  const int32_t* relay = nullptr;        // [M,T,Q]
};
Status CombineSend(Group& group, const CombineSendArgs& args);

// out[t] = sum over the places of row t (hierarchical mode: over their nodes), ascending, of the row
// returned from there, in float32, rounded once; slots likewise. Rows without a place are zero.
struct CombineRecvArgs : Call {
  const int32_t* places = nullptr;       // [T,P]
  const int32_t* send_counts = nullptr;  // [R]
  void* out = nullptr;                   // out [T,H]
  float* slots = nullptr;                // out [T,K] or null
};
void CombineRecv(Group& group, const CombineRecvArgs& args, Done done);

}  // namespace smfree::cpu

#endif  // SMFREE_CSRC_CPU_BACKEND_H_
