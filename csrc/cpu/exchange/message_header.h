// SPDX-License-Identifier: Apache-2.0
#ifndef SMFREE_CSRC_CPU_EXCHANGE_MESSAGE_HEADER_H_
#define SMFREE_CSRC_CPU_EXCHANGE_MESSAGE_HEADER_H_

#include <cstdint>

#include "csrc/protocol/identity.h"
#include "csrc/protocol/nodes.h"

namespace smfree::cpu {

// Describes a message: whose it is, and what its MessageLayout (layout.h) follows from.
struct MessageHeader {
  Identity identity;
  int32_t source;
  int32_t destination;
  Leg leg;
  int32_t region;  // of the destination, see nodes.h
  int32_t tokens;  // T of the sender; equal on all ranks
  int32_t rows;
  int32_t handed;   // of them, how many are handed on: all, unless a relay has too many
  int32_t experts;  // expert ids per row: top_k or 0
  int32_t slots;    // values per row: top_k or 0
  int32_t stride;   // bytes from row to row
  int64_t bytes;    // MessageLayout::bytes
};

}  // namespace smfree::cpu

#endif  // SMFREE_CSRC_CPU_EXCHANGE_MESSAGE_HEADER_H_
