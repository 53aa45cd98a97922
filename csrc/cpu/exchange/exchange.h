// SPDX-License-Identifier: Apache-2.0
//
// The exchange: the state of one group in this process, between the phases (which pack and unpack
// rows) and the event loop. It owns the mailboxes of the local ranks, the arena, the network and the
// first fault.
//
// One mutex guards all of it; nothing slow happens under it. Lock order: Exchange, then EventLoop; a
// message is let go of, a Done called and a socket written only without the Exchange's mutex.
//
// A message between local ranks goes straight into the mailbox, by the sender's thread. Posting
// takes the mutex after the rows were written, and the reader takes it before it reads them: that
// publishes the rows. (Between processes a socket does; see link.h.)
#ifndef SMFREE_CSRC_CPU_EXCHANGE_EXCHANGE_H_
#define SMFREE_CSRC_CPU_EXCHANGE_EXCHANGE_H_

#include <sys/types.h>

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "csrc/cpu/processes/arena.h"
#include "csrc/cpu/backend.h"
#include "csrc/cpu/exchange/chaos.h"
#include "csrc/cpu/exchange/mailbox.h"
#include "csrc/cpu/processes/network.h"

namespace smfree::cpu {

class Exchange : public NetworkEvents, public std::enable_shared_from_this<Exchange> {
 public:
  Exchange(int64_t group_id, int32_t replica, const GroupConfig& config,
           std::vector<int32_t> process_of_rank, int32_t my_process, std::string cookie);

  // ---- for the Group
  Status Open();  // makes the arena, and listens if there are other processes
  const std::string& address() const { return address_; }
  Status Connect(const std::vector<std::string>& addresses);
  // Waits until nothing is in flight here, but not for long.
  void Settle() const;
  void Close();
  Status Check();
  Status Fault() const;
  Unreceived UnreceivedHere() const;
  GroupStats stats() const;
  void SetChaos(const Chaos& chaos);
  int64_t memory_bytes() const;

  // ---- for the phases
  const GroupConfig& config() const { return config_; }
  const Nodes& nodes() const { return nodes_; }
  int64_t group_id() const { return group_id_; }
  int32_t replica() const { return replica_; }
  bool IsLocal(int32_t rank) const;
  // Threads that one rank's loop over rows may use: the cores are divided among the ranks.
  int threads_per_rank() const { return threads_per_rank_; }
  int32_t num_local() const { return num_local_; }

  // Whether `call` fits the group and a send may begin; then the operation is in flight.
  // `arguments` is what the phase found about its other arguments.
  Status BeginSend(const char* phase, const Call& call, const Identity& identity,
                   const Status& arguments);
  StatusOr<std::shared_ptr<Arena::Block>> Allocate(int64_t bytes);
  // Hands over a message whose rows are written, at `offset` of the block.
  void Post(const MessageHeader& header, std::shared_ptr<Arena::Block> block, int64_t offset);
  // Calls unpack and then done, as soon as all messages are there; or done with an error.
  void Expect(const Expectation& expected, const Status& arguments, Unpacker unpack, Done done);

  // Makes `fault` the group's fault, unless there is one, and tells everybody; returns it.
  Status Fail(int32_t rank, Status fault);
  // Notes rows that exceeded the capacity. `overflow` is what Check tells once, or ok; not a fault.
  void ReportDropped(int64_t copies, Status overflow);

 private:
  // NetworkEvents
  void OnArrival(Message message) override;
  void OnPeerFault(const Status& fault) override;
  void OnLoss(const Status& why) override;
  void OnPeerClosed(int32_t process) override;
  void OnPeerDied(int32_t process, const std::string& why) override;

  Mailbox& MailboxOf(int32_t rank) const { return *mailboxes_[static_cast<size_t>(rank)]; }
  Status CheckCall(const char* phase, int32_t rank, int64_t tokens, const Identity& identity,
                   const Status& arguments) const;
  // Under the mutex.
  Status CheckOpen(const char* phase, int32_t rank, const Identity& identity) const;
  // Under the mutex: whether `receive` waits for a rank that closed its group.
  Status CheckPeersOpen(const Receive& receive) const;
  std::string RanksOf(int32_t process) const;

  // To the mailbox or the process of the destination.
  void Forward(const MessageHeader& header, std::shared_ptr<Arena::Block> block,
               int64_t offset);
  // Under the mutex: a message is on its way.
  void NoteSent(const MessageHeader& header);
  void Deliver(Message message);
  // Under the mutex: the last message of a receive is there.
  void NoteArrived(const Receive& receive);
  Clock::time_point DeadlineOf(const Expectation& expected) const;
  void OnDeadline(const ReceivePtr& receive);
  void Finish(const ReceivePtr& receive);
  void Raise(const Status& fault, int32_t rank, bool tell_peers);
  // Under the mutex: empties all mailboxes.
  Mailbox::Contents TakeAll();
  // Ends receives on the pool, with `fault`; for ranks other than `rank` as the group's fault.
  static void EndReceives(std::vector<ReceivePtr> receives, const Status& fault, int32_t rank);

  const int64_t group_id_;
  const int32_t replica_;
  const GroupConfig config_;
  const Nodes nodes_;
  const std::vector<int32_t> process_of_rank_;
  const int32_t my_process_;
  const std::string cookie_;
  const int32_t num_processes_;
  const int threads_per_rank_;
  const int32_t num_local_;
  const pid_t owner_;
  std::string address_;
  Socket listener_;
  std::shared_ptr<Network> network_;  // null if all ranks are local; used once connected_

  mutable std::mutex mutex_;
  bool connected_ = false;
  bool closed_ = false;
  Status fault_, overflow_;
  std::vector<std::unique_ptr<Mailbox>> mailboxes_;  // by rank; null if it lives elsewhere
  std::shared_ptr<Arena> arena_;                     // null once closed
  std::vector<bool> peer_closed_;                    // by process
  Stats stats_;
  int64_t arena_high_water_ = 0;  // of an arena that is gone

  ChaoticSchedule chaos_;
  int64_t held_back_ = 0;  // messages that chaos holds back
  std::condition_variable none_held_back_;
};

}  // namespace smfree::cpu

#endif  // SMFREE_CSRC_CPU_EXCHANGE_EXCHANGE_H_
