// SPDX-License-Identifier: Apache-2.0
#ifndef SMFREE_CSRC_CPU_EXCHANGE_MESSAGE_H_
#define SMFREE_CSRC_CPU_EXCHANGE_MESSAGE_H_

#include <cstddef>
#include <memory>

#include "csrc/protocol/layout.h"
#include "csrc/cpu/exchange/message_header.h"

namespace smfree::cpu {

// The rows from one rank to another. They are immutable once the message is posted; the block they
// lie in, here or in another process, returns to its sender when the last `hold` on it goes.
struct Message {
  MessageHeader header{};
  const std::byte* data = nullptr;
  std::shared_ptr<const void> hold;

  MessageLayout layout() const {
    return MessageLayout(header.rows, header.experts, header.slots, header.stride);
  }
  const int32_t* experts() const {
    return reinterpret_cast<const int32_t*>(data + layout().experts_offset);
  }
  const float* slots() const {
    return reinterpret_cast<const float*>(data + layout().slots_offset);
  }
  const std::byte* row(int64_t i) const {
    return data + layout().rows_offset + i * header.stride;
  }
};

}  // namespace smfree::cpu

#endif  // SMFREE_CSRC_CPU_EXCHANGE_MESSAGE_H_
