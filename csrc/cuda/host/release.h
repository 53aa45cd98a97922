// SPDX-License-Identifier: Apache-2.0
//
// When the rows of a large operation may leave a rank on a leg, and where they go: the part of its
// mover that waits for the announcements of the leg's members (PROTOCOL.md, "Large operations"). In
// direct mode these are all ranks.
#ifndef SMFREE_CSRC_CUDA_HOST_RELEASE_H_
#define SMFREE_CSRC_CUDA_HOST_RELEASE_H_

#include <cstdint>
#include <vector>

#include "csrc/cuda/host/descriptor.h"
#include "csrc/protocol/announcement.h"
#include "csrc/protocol/group_config.h"
#include "csrc/protocol/layout.h"

namespace smfree::cuda {

// Bytes that move from here to a peer; both places are offsets in the memories.
struct Transfer {
  int64_t from, to, bytes;
};

// The operation of one set that is leaving on a leg, with the chunks that are handed over and wait.
class Release {
 public:
  // Where the payload of each message goes, once all members have announced. By region.
  struct Plan {
    bool agreed = false;  // all members run the same operation, and it fits
    std::vector<int64_t> payload_at;  // from the start of the peer's memory
    std::vector<int32_t> kept;        // rows of the message that the peer takes
  };

  // Takes a chunk; those of an operation come after all those of the one before.
  void Add(const Descriptor& chunk) { waiting_.push_back(chunk); }
  bool waits() const { return !waiting_.empty(); }
  const Descriptor& first() const { return waiting_.front(); }

  // The chunks of one operation that may leave now, in order; none while a member has not
  // announced.
  std::vector<Descriptor> Take(const GroupConfig& config, const Layout& layout, int32_t rank,
                               const uint64_t* announced);
  // The plan of the chunks that Take has returned.
  const Plan& plan() const { return plan_; }

 private:
  int64_t number_ = kNoOperation;  // of plan_
  int32_t heard_ = 0;              // members below this one have announced number_
  std::vector<Announcement> words_;  // what they have announced, [member, word]
  Plan plan_;
  std::vector<Descriptor> waiting_;
};

// What of a chunk moves, beside the header: the payload up to the rows that the peer keeps. Where
// it keeps fewer rows than were packed, each array moves by itself.
std::vector<Transfer> TransfersOf(const Descriptor& chunk, int64_t to, int32_t kept);

}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_HOST_RELEASE_H_
