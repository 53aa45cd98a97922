// SPDX-License-Identifier: Apache-2.0
//
// The arena: memory into which the ranks of this process pack what they send, and from which every
// reader, here or in another process, unpacks directly. Memory in one process is anonymous; memory
// that other processes map is a memfd, which has no name that could be left behind and is not bound
// by the size of /dev/shm.
//
// A block goes back to the arena when its last reader lets go of it, and the next send takes the
// lowest free range that fits: the same warm pages again and again. Pages are claimed from the
// operating system when they are first handed out and kept until the group is closed.
#ifndef SMFREE_CSRC_CPU_PROCESSES_ARENA_H_
#define SMFREE_CSRC_CPU_PROCESSES_ARENA_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "csrc/core/status.h"

namespace smfree::cpu {

// A mapping of pages, unmapped at the end.
class Mapping {
 public:
  // `fd` -1: anonymous memory. Else the file is mapped shared, and closed at the end.
  static StatusOr<std::shared_ptr<Mapping>> Create(int fd, int64_t bytes, bool writable);
  ~Mapping();
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  std::byte* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  int fd() const { return fd_; }

 private:
  Mapping(std::byte* data, int64_t bytes, int fd) : data_(data), bytes_(bytes), fd_(fd) {}
  std::byte* const data_;
  const int64_t bytes_;
  const int fd_;
};

// Maps a memfd that another process sent, for reading. Takes the descriptor. Refuses a file that
// its owner could still shrink, since reading past the end of a file kills the process.
StatusOr<std::shared_ptr<Mapping>> MapForeignSegment(int fd, int64_t bytes);

class Arena : public std::enable_shared_from_this<Arena> {
 public:
  enum class Backing { kAnonymous, kMemfd };

  // Called with (segment number, its mapping) before any block of a new segment is handed out.
  using OnSegment = std::function<void(int32_t, const Mapping&)>;

  Arena(Backing backing, OnSegment on_segment)
      : backing_(backing), on_segment_(std::move(on_segment)) {}

  class Block {
   public:
    Block(std::shared_ptr<Arena> arena, int32_t segment, int64_t offset, int64_t bytes,
          std::byte* data)
        : arena_(std::move(arena)),
          data_(data),
          offset_(offset),
          bytes_(bytes),
          segment_(segment) {}
    ~Block() { arena_->Free(segment_, offset_, bytes_); }
    Block(const Block&) = delete;
    Block& operator=(const Block&) = delete;

    std::byte* data() const { return data_; }
    int32_t segment() const { return segment_; }
    int64_t offset() const { return offset_; }

   private:
    const std::shared_ptr<Arena> arena_;
    std::byte* const data_;
    const int64_t offset_, bytes_;
    const int32_t segment_;
  };

  StatusOr<std::shared_ptr<Block>> Allocate(int64_t bytes);
  // No block will be handed out any more: peers may still read pages that have come back since.
  void Retire();

  int64_t bytes_in_use() const;
  int64_t high_water() const;
  int64_t committed() const;  // claimed from the operating system

 private:
  struct Segment {
    std::shared_ptr<Mapping> mapping;
    int64_t committed = 0;            // pages below are backed
    std::map<int64_t, int64_t> free;  // offset -> bytes, no two ranges touch
  };

  void Free(int32_t segment, int64_t offset, int64_t bytes);
  bool TakeLowest(Segment& segment, int64_t bytes, int64_t* offset);
  Status Commit(Segment& segment, int64_t end);
  Status AddSegment(int64_t bytes);

  const Backing backing_;
  const OnSegment on_segment_;
  mutable std::mutex mutex_;
  std::vector<Segment> segments_;
  bool retired_ = false;
  int64_t in_use_ = 0;
  int64_t high_water_ = 0;
};

}  // namespace smfree::cpu

#endif  // SMFREE_CSRC_CPU_PROCESSES_ARENA_H_
