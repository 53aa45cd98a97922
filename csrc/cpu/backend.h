// SPDX-License-Identifier: Apache-2.0
//
// The CPU backend: an expert-parallel group whose ranks are threads of one process, or of several
// processes of one host, and the phases that exchange rows between them. No XLA, no Python.
//
// Threads: every function may be called from any thread. A send returns when its rows are packed
// and its input may be reused. A receive returns at once; its Done is called exactly once, inline
// if all messages are there, else on a pool thread, never on the event loop. The arrays of a receive
// must live until then. fork() without exec() is not supported once a group exists.
#ifndef SMFREE_CSRC_CPU_BACKEND_H_
#define SMFREE_CSRC_CPU_BACKEND_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "csrc/core/stats.h"
#include "csrc/core/status.h"
#include "csrc/protocol/arrays.h"
#include "csrc/protocol/group_config.h"
#include "csrc/protocol/identity.h"

namespace smfree::cpu {

// Makes the mover a bad one, for tests. Messages of one point (identity.h) from one rank to another
// always stay in order, because that is what every mover guarantees.
struct Chaos {
  uint64_t seed = 0;
  int64_t max_delay_us = 0;        // each message is held back by a random time up to this
  bool reorder = false;            // messages may overtake those of other peers and other points
  double stall_probability = 0.0;  // per message: everything stands still ...
  int64_t stall_ms = 0;            // ... for this long
  bool enabled() const { return max_delay_us > 0 || (stall_probability > 0 && stall_ms > 0); }
};

// What a group counts, and what is under way in this process now.
struct GroupStats : Stats {
  int64_t pending_receives = 0;    // receives that wait
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
  // The first fault only.
  Status Fault() const;
  // The operations that ranks of this process have sent and not received, in words; "" if there are
  // none.
  std::string Unreceived() const;
  GroupStats stats() const;
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

// What every phase needs beside its arrays. Identity::operation is set by the phase.
struct Call {
  int32_t rank = 0;
  Identity identity;
  int64_t tokens = 0;  // T
};

Status DispatchSend(Group& group, const Call& call, const DispatchSendArrays& arrays);
Status DispatchSendCached(Group& group, const Call& call, const DispatchSendCachedArrays& arrays);
void DispatchRecv(Group& group, const Call& call, const DispatchRecvArrays& arrays, Done done);
void DispatchRecvCached(Group& group, const Call& call, const DispatchRecvCachedArrays& arrays,
                        Done done);
Status CombineSend(Group& group, const Call& call, const CombineSendArrays& arrays);
void CombineRecv(Group& group, const Call& call, const CombineRecvArrays& arrays, Done done);

}  // namespace smfree::cpu

#endif  // SMFREE_CSRC_CPU_BACKEND_H_
