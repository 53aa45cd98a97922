// SPDX-License-Identifier: Apache-2.0
//
// The outbox of one send: a message for every rank, all in one block, written in place and then
// posted. Every message is sent, also one without rows: receivers wait for all sources.
#ifndef SMFREE_CSRC_CPU_OUTBOX_H_
#define SMFREE_CSRC_CPU_OUTBOX_H_

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "csrc/cpu/exchange.h"

namespace smfree::cpu {

class Outbox {
 public:
  Outbox(Exchange& exchange, const char* phase, Operation operation, const Call& call)
      : exchange_(exchange),
        phase_(phase),
        call_(call),
        identity_(exchange.Complete(call.identity, operation)) {}

  // `arguments`: what the phase found about them.
  Status Begin(const Status& arguments = Status()) {
    return exchange_.BeginSend(phase_, call_, identity_, arguments);
  }

  // Makes room for counts[d] rows to each rank d. Any thread may then write the parts.
  Status Allocate(const int32_t* counts, int32_t experts, int32_t slots) {
    const int32_t num_ranks = exchange_.config().num_ranks;
    int64_t offset = 0;
    for (int32_t rank = 0; rank < num_ranks; ++rank) {
      const MessageLayout layout(counts[rank], experts, slots, exchange_.row_bytes());
      parts_.push_back(Part{{}, nullptr, nullptr, nullptr, offset});
      parts_.back().header =
          wire::MessageHeader{identity_,    call_.rank, rank,  static_cast<int32_t>(call_.tokens),
                              counts[rank], experts,    slots, layout.bytes};
      offset += layout.bytes;
    }
    auto block = exchange_.Allocate(offset);
    if (!block.ok()) return block.status();
    block_ = std::move(block.value());
    for (Part& part : parts_) {
      const MessageLayout layout(part.header.rows, experts, slots, exchange_.row_bytes());
      std::byte* const data = block_->data() + part.offset;
      part.experts = reinterpret_cast<int32_t*>(data + layout.experts_offset);
      part.slots = reinterpret_cast<float*>(data + layout.slots_offset);
      part.rows = data + layout.rows_offset;
    }
    return Status();
  }

  int32_t* experts(int32_t rank) { return part(rank).experts; }
  float* slots(int32_t rank) { return part(rank).slots; }
  std::byte* rows(int32_t rank) { return part(rank).rows; }

  Status Post() {
    for (const Part& part : parts_) exchange_.Post(part.header, block_, part.offset);
    return Status();
  }

  // The send failed: so does the group, since the peers wait for it.
  Status Fail(Status status) { return exchange_.Fail(call_.rank, std::move(status)); }

 private:
  struct Part {
    wire::MessageHeader header;
    int32_t* experts;
    float* slots;
    std::byte* rows;
    int64_t offset;
  };
  Part& part(int32_t rank) { return parts_[static_cast<size_t>(rank)]; }

  Exchange& exchange_;
  const char* const phase_;
  const Call& call_;
  const Identity identity_;
  std::vector<Part> parts_;  // by destination
  std::shared_ptr<Arena::Block> block_;
};

}  // namespace smfree::cpu

#endif  // SMFREE_CSRC_CPU_OUTBOX_H_
