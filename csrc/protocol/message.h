// SPDX-License-Identifier: Apache-2.0
//
// What stands at the start of a region: whose message it is, and in how many chunks it comes. At
// kHeaderIdentityBytes follow counts (int32): of the copies for each expert behind the destination,
// and on the wire of hierarchical mode of the rows for each rank of its node.
//
// For the CPU backend's form, see csrc/cpu/exchange/message_header.h.
#ifndef SMFREE_CSRC_PROTOCOL_MESSAGE_H_
#define SMFREE_CSRC_PROTOCOL_MESSAGE_H_

#include <cstdint>

#include "csrc/protocol/host_device.h"
#include "csrc/protocol/identity.h"
#include "csrc/protocol/layout.h"

namespace smfree {

struct RegionHeader {
  int64_t number;
  uint32_t call_site;
  Operation operation;
  int32_t lane;
  int32_t derivation;
  int32_t source;
  int32_t tokens;  // T of the sender; equal on all ranks
  int32_t rows;
  int32_t stride;   // of the rows, in bytes
  int32_t experts;  // per row: top_k or 0
  int32_t slots;    // per row: top_k or 0
  int32_t chunks;   // asked for, see Chunks
  int32_t sent;     // rows that the source has sent: more than `rows` if a relay has too many
};
static_assert(sizeof(RegionHeader) <= kHeaderIdentityBytes);

// How the rows of a message are cut: equal chunks of whole rows, the last one may be smaller. A
// message without rows is one chunk. The header and what stands before the rows belong to chunk 0.
struct Chunks {
  int32_t rows;
  int32_t rows_per_chunk;
  int32_t count;

  Chunks() = default;
  SMFREE_HD constexpr Chunks(int32_t num_rows, int32_t wanted)
      : rows(num_rows),
        rows_per_chunk(num_rows == 0 ? 1 : (num_rows + wanted - 1) / wanted),
        count(num_rows == 0 ? 1 : (num_rows + rows_per_chunk - 1) / rows_per_chunk) {}

  SMFREE_HD constexpr int32_t Of(int32_t row) const { return row / rows_per_chunk; }
  SMFREE_HD constexpr int32_t RowsIn(int32_t chunk) const { return End(chunk) - Begin(chunk); }
  SMFREE_HD constexpr int32_t Begin(int32_t chunk) const { return chunk * rows_per_chunk; }
  SMFREE_HD constexpr int32_t End(int32_t chunk) const {
    return chunk + 1 == count ? rows : (chunk + 1) * rows_per_chunk;
  }
};
static_assert(Chunks(0, 4).count == 1 && Chunks(0, 4).RowsIn(0) == 0);
static_assert(Chunks(9, 4).count == 3 && Chunks(9, 4).End(2) == 9);

// On a GPU the expert ids of a message are codes that say more: which local expert of the
// destination, and how many earlier rows of this source go there. So the receiver numbers its rows
// without a scan. -1: the slot's expert lives elsewhere.
struct CopyCode {
  int32_t index_bits;

  SMFREE_HD explicit constexpr CopyCode(int64_t max_tokens) : index_bits(0) {
    while ((int64_t{1} << index_bits) < max_tokens) ++index_bits;
  }
  SMFREE_HD constexpr bool Fits(int32_t local_experts) const {
    return (int64_t{local_experts} << index_bits) <= int64_t{1} << 31;
  }
  SMFREE_HD constexpr int32_t Encode(int32_t local_expert, int32_t index) const {
    return (local_expert << index_bits) | index;
  }
  SMFREE_HD constexpr int32_t Expert(int32_t code) const { return code >> index_bits; }
  SMFREE_HD constexpr int32_t Index(int32_t code) const {
    return code & ((1 << index_bits) - 1);
  }
};

}  // namespace smfree

#endif  // SMFREE_CSRC_PROTOCOL_MESSAGE_H_
