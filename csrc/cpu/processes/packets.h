// SPDX-License-Identifier: Apache-2.0
//
// The packets in which the processes of one host tell each other about messages, faults and their
// ends. A packet is one datagram. Processes of one host share the byte order, and the
// handshake refuses another kVersion.
#ifndef SMFREE_CSRC_CPU_PROCESSES_PACKETS_H_
#define SMFREE_CSRC_CPU_PROCESSES_PACKETS_H_

#include <cstdint>
#include <type_traits>

#include "csrc/cpu/exchange/message_header.h"
#include "csrc/protocol/faults.h"

namespace smfree::cpu::packets {

constexpr uint32_t kMagic = 0x46724d53;  // "SMrF"
constexpr uint32_t kVersion = 4;

enum class PacketKind : uint32_t {
  kHello = 1,    // first packet of each side
  kSegment = 2,  // a new segment of the sender's arena; its file descriptor comes along
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

static_assert(sizeof(MessageHeader) == 96 && sizeof(MessagePacket) == 120);
static_assert(std::is_trivially_copyable_v<HelloPacket> &&
              std::is_trivially_copyable_v<MessagePacket>);

}  // namespace smfree::cpu::packets

#endif  // SMFREE_CSRC_CPU_PROCESSES_PACKETS_H_
