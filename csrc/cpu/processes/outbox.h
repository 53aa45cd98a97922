// SPDX-License-Identifier: Apache-2.0
//
// The outbox of one send: a message for every region of a leg, all in one block, written in place
// and then posted. Every message is sent, also one without rows: receivers wait for all of them.
#ifndef SMFREE_CSRC_CPU_PROCESSES_OUTBOX_H_
#define SMFREE_CSRC_CPU_PROCESSES_OUTBOX_H_

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "csrc/cpu/exchange/exchange.h"

namespace smfree::cpu {

class Outbox {
 public:
  Outbox(Exchange& exchange, const char* phase, Operation operation, const Call& call, Leg leg)
      : exchange_(exchange),
        phase_(phase),
        call_(call),
        leg_(leg),
        identity_(WithOperation(call.identity, operation)) {}

  // Send phases call it, relays do not. `arguments`: what is wrong with those of the call.
  Status Begin(const Status& arguments = Status()) {
    return exchange_.BeginSend(phase_, call_, identity_, arguments);
  }

  // Makes room for counts[r] rows, `stride` bytes apart, in each region r. Any thread may then
  // write there.
  Status Allocate(const int32_t* counts, int32_t experts, int32_t slots, int32_t stride) {
    stride_ = stride;
    const Nodes& nodes = exchange_.nodes();
    int64_t offset = 0;
    for (int32_t region = 0; region < nodes.Regions(leg_); ++region) {
      const int32_t rows = counts[region];
      const MessageLayout layout(rows, experts, slots, stride);
      rooms_.push_back(Room{{}, nullptr, nullptr, nullptr, offset});
      rooms_.back().header = MessageHeader{
          identity_, call_.rank, nodes.Peer(leg_, call_.rank, region), leg_,
          nodes.RegionAtPeer(leg_, call_.rank, region), static_cast<int32_t>(call_.tokens), rows,
          /*handed=*/rows, experts, slots, stride, layout.bytes};
      offset += layout.bytes;
      total_rows_ += rows;
    }
    auto block = exchange_.Allocate(offset);
    if (!block.ok()) return block.status();
    block_ = std::move(block.value());
    for (Room& room : rooms_) {
      const MessageLayout layout(room.header.rows, experts, slots, stride);
      std::byte* const data = block_->data() + room.offset;
      room.experts = reinterpret_cast<int32_t*>(data + layout.experts_offset);
      room.slots = reinterpret_cast<float*>(data + layout.slots_offset);
      room.rows = data + layout.rows_offset;
    }
    return Status();
  }

  // Says that not all rows of a message count as handed on.
  void HandOn(int32_t region, int32_t rows) { room(region).header.handed = rows; }

  int32_t* experts(int32_t region) { return room(region).experts; }
  float* slots(int32_t region) { return room(region).slots; }
  std::byte* row(int32_t region, int64_t i) { return room(region).rows + i * stride_; }
  int64_t stride() const { return stride_; }
  int64_t total_rows() const { return total_rows_; }

  // What goes to this rank itself goes last: an operation that has ended here has then handed over
  // all that others need of it, and the group may be closed.
  void Post() {
    for (const bool to_itself : {false, true}) {
      for (const Room& room : rooms_) {
        if ((room.header.destination == call_.rank) != to_itself) continue;
        exchange_.Post(room.header, block_, room.offset);
      }
    }
  }

  // The send failed: so does the group, since the peers wait for it.
  Status Fail(Status status) { return exchange_.Fail(call_.rank, std::move(status)); }

 private:
  struct Room {  // of one message
    MessageHeader header;
    int32_t* experts;
    float* slots;
    std::byte* rows;
    int64_t offset;
  };
  Room& room(int32_t region) { return rooms_[static_cast<size_t>(region)]; }

  Exchange& exchange_;
  const char* const phase_;
  const Call call_;
  const Leg leg_;
  const Identity identity_;
  std::vector<Room> rooms_;  // by region
  int64_t total_rows_ = 0;
  int64_t stride_ = 0;
  std::shared_ptr<Arena::Block> block_;
};

}  // namespace smfree::cpu

#endif  // SMFREE_CSRC_CPU_PROCESSES_OUTBOX_H_
