// SPDX-License-Identifier: Apache-2.0
//
// What ranks on CPUs tell each other about a message, and the packets in which the processes of one
// host do so. A packet is one datagram. Processes of one host share the byte order, and the
// handshake refuses another kVersion.
#ifndef SMFREE_CSRC_PROTOCOL_WIRE_H_
#define SMFREE_CSRC_PROTOCOL_WIRE_H_

#include <cstdint>
#include <type_traits>

#include "csrc/protocol/faults.h"
#include "csrc/protocol/identity.h"
#include "csrc/protocol/nodes.h"

namespace smfree::wire {

constexpr uint32_t kMagic = 0x46724d53;  // "SMrF"
constexpr uint32_t kVersion = 3;

// Describes a message: whose it is, and what its MessageLayout (layout.h) follows from.
struct MessageHeader {
  Identity identity;
  int32_t source;
  int32_t destination;
  Leg leg;
  int32_t region;  // of the destination, see nodes.h
  int32_t tokens;  // T of the sender; equal on all ranks
  int32_t rows;
  int32_t experts;  // expert ids per row: top_k or 0
  int32_t slots;    // values per row: top_k or 0
  int64_t bytes;    // MessageLayout::bytes
};

enum class PacketKind : uint32_t {
  kHello = 1,    // first packet of each side
  kSegment = 2,  // a new piece of the sender's arena; its file descriptor comes along
  kMessage = 3,  // rows are ready in the sender's arena
  kRelease = 4,  // the receiver needs the rows of a message no more
  kFault = 5,    // the sender's side of the group has failed; a text follows the packet
  kGoodbye = 6,  // the sender closed the group: the end of the stream is no crash
};

constexpr int64_t kMaxTextBytes = 4096;
constexpr int64_t kMaxCookieBytes = 128;

struct HelloPacket {
  PacketKind kind;
  uint32_t magic;
  uint32_t version;
  int32_t process;
  int64_t group_id;  // follows from mesh, axis and configuration: equal ids, equal configurations
  int32_t replica;
  int32_t cookie_bytes;
  char cookie[kMaxCookieBytes];
  int32_t num_local;
  int32_t unused;
};

struct SegmentPacket {
  PacketKind kind;
  int32_t segment;  // numbered from 0 in the order of sending
  int64_t bytes;
};

struct MessagePacket {
  PacketKind kind;
  int32_t segment;
  int64_t offset;
  int64_t ticket;  // names the message in the release
  MessageHeader header;
};

struct ReleasePacket {
  PacketKind kind;
  int32_t unused;
  int64_t ticket;
};

struct FaultPacket {  // followed by the text
  PacketKind kind;
  FaultKind fault;
};

struct GoodbyePacket {
  PacketKind kind;
};

static_assert(sizeof(MessageHeader) == 88 && sizeof(MessagePacket) == 112);
static_assert(std::is_trivially_copyable_v<HelloPacket> &&
              std::is_trivially_copyable_v<MessagePacket>);

}  // namespace smfree::wire

#endif  // SMFREE_CSRC_PROTOCOL_WIRE_H_
