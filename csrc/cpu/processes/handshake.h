// SPDX-License-Identifier: Apache-2.0
//
// How the processes of a group find each other: each listens on an abstract Unix socket, whose name
// vanishes with the process, and each pair greets once. The process of the higher number connects.
#ifndef SMFREE_CSRC_CPU_PROCESSES_HANDSHAKE_H_
#define SMFREE_CSRC_CPU_PROCESSES_HANDSHAKE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "csrc/cpu/runtime/threads.h"
#include "csrc/core/status.h"
#include "csrc/cpu/processes/packets.h"

namespace smfree::cpu {

// Owns a file descriptor.
class Socket {
 public:
  explicit Socket(int fd = -1) : fd_(fd) {}
  Socket(Socket&& other) noexcept : fd_(other.Release()) {}
  Socket& operator=(Socket&& other) noexcept;
  ~Socket();

  int fd() const { return fd_; }
  bool open() const { return fd_ >= 0; }
  int Release();

 private:
  int fd_;
};

// Listens under a fresh name, which goes to *address.
StatusOr<Socket> Listen(std::string* address);

// Greets every other process; returns the sockets by process, with none for this one. `hello` is
// this process's greeting; the others' must agree with it in everything but `process` and
// `num_local`, which must be ranks_of_process[process].
StatusOr<std::vector<Socket>> Greet(const Socket& listener,
                                    const std::vector<std::string>& addresses,
                                    const packets::HelloPacket& hello,
                                    const std::vector<int32_t>& ranks_of_process,
                                    Clock::time_point deadline);

}  // namespace smfree::cpu

#endif  // SMFREE_CSRC_CPU_PROCESSES_HANDSHAKE_H_
