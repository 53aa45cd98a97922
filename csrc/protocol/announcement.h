// SPDX-License-Identifier: Apache-2.0
//
// What a rank announces before the rows of a large operation leave it: one 64-bit word for each of
// its messages, which whoever releases rows waits for (PROTOCOL.md, "Large operations").
//
//   bit   63 … 40                  39 … 24                   23 … 0
//         number of the operation  which operation it is     rows of the message
//
// Each word vouches for itself, so that words need no order among them. They lie in two slots by
// the parity of the number: a rank may announce k + 1 while another still reads those of k.
#ifndef SMFREE_CSRC_PROTOCOL_ANNOUNCEMENT_H_
#define SMFREE_CSRC_PROTOCOL_ANNOUNCEMENT_H_

#include <cstdint>
#include <initializer_list>

#include "csrc/protocol/host_device.h"
#include "csrc/protocol/identity.h"
#include "csrc/protocol/lanes.h"

namespace smfree {

constexpr int32_t kAnnouncedRowsBits = 24;
constexpr int64_t kMaxAnnouncedRows = (int64_t{1} << kAnnouncedRowsBits) - 1;

struct Announcement {
  uint64_t word = 0;

  SMFREE_HD static constexpr Announcement Of(int64_t number, uint32_t operation, int32_t rows) {
    return {Mark(number) | uint64_t{operation & 0xffffu} << kAnnouncedRowsBits |
            static_cast<uint64_t>(rows)};
  }
  SMFREE_HD constexpr bool IsOf(int64_t number) const { return word >> 40 == Mark(number) >> 40; }
  SMFREE_HD constexpr uint32_t operation() const {
    return static_cast<uint32_t>(word >> kAnnouncedRowsBits) & 0xffffu;
  }
  SMFREE_HD constexpr int32_t rows() const {
    return static_cast<int32_t>(word & static_cast<uint64_t>(kMaxAnnouncedRows));
  }

 private:
  // Never 0, which is what stands there before the first operation.
  SMFREE_HD static constexpr uint64_t Mark(int64_t number) {
    return (static_cast<uint64_t>(number) % 0xfffffe + 1) << 40;
  }
};
static_assert(sizeof(Announcement) == 8);
static_assert(Announcement::Of(3, 7, 9).IsOf(3) && Announcement::Of(3, 7, 9).rows() == 9);
static_assert(!Announcement{}.IsOf(0xfffffe) && Announcement::Of(3, 7, 9).operation() == 7);

// Sixteen bits by which ranks notice that they do not run the same operation; what they run then
// stands in the headers.
SMFREE_HD constexpr uint32_t OperationMark(uint32_t call_site, Operation operation,
                                           int32_t derivation, int32_t tokens, int32_t stride,
                                           int32_t carried) {
  uint32_t hash = 2166136261u;  // FNV-1a over words
  for (const uint32_t part : {call_site, static_cast<uint32_t>(operation),
                              static_cast<uint32_t>(derivation), static_cast<uint32_t>(tokens),
                              static_cast<uint32_t>(stride), static_cast<uint32_t>(carried)}) {
    hash = (hash ^ part) * 16777619u;
    hash ^= hash >> 15;
  }
  return (hash ^ hash >> 16) & 0xffffu;
}

// Where the words of a leg are: [set, slot, rank, word]. Word m is of message m. On the wire of
// hierarchical mode as many follow, of how many rows each message becomes inside its node.
struct AnnouncementTable {
  int64_t first;  // word of the table: the legs' stand one behind the other
  int32_t num_ranks, words;

  SMFREE_HD constexpr int64_t At(int32_t set, int64_t number, int32_t rank, int32_t word) const {
    const int64_t slot = int64_t{set} * kParities + ParityOf(number);
    return first + (slot * num_ranks + rank) * words + word;
  }
  SMFREE_HD constexpr int64_t End(int32_t num_sets) const { return At(num_sets, 0, 0, 0); }
};

}  // namespace smfree

#endif  // SMFREE_CSRC_PROTOCOL_ANNOUNCEMENT_H_
