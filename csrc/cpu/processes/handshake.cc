// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/processes/handshake.h"

#include <poll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <utility>

#include "csrc/cpu/processes/link.h"

namespace smfree::cpu {
namespace {

Status SystemError(const std::string& what, int error) {
  return Status(FaultKind::kSystem, what + " failed: " + std::strerror(error));
}

// False when the deadline passes first.
bool WaitReadable(int fd, Clock::time_point deadline) {
  for (;;) {
    const auto left =
        std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()).count();
    pollfd polled{fd, POLLIN, 0};
    const int ready = poll(&polled, 1, static_cast<int>(std::clamp<int64_t>(left + 1, 0, 60'000)));
    if (ready > 0) return true;
    if (Clock::now() >= deadline) return false;
  }
}

socklen_t FillAddress(const std::string& name, sockaddr_un* address) {
  *address = {};
  address->sun_family = AF_UNIX;
  const size_t size = std::min(name.size(), sizeof(address->sun_path) - 1);
  std::memcpy(address->sun_path + 1, name.data(), size);  // sun_path[0] = 0: abstract
  return static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + size);
}

bool SameUser(int fd) {
  ucred peer{};
  socklen_t size = sizeof(peer);
  return getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) == 0 && peer.uid == geteuid();
}

bool ReceiveHello(int fd, Clock::time_point deadline, wire::HelloPacket* hello) {
  return WaitReadable(fd, deadline) &&
         recv(fd, hello, sizeof(*hello), MSG_TRUNC) == static_cast<ssize_t>(sizeof(*hello)) &&
         hello->kind == wire::PacketKind::kHello && hello->magic == wire::kMagic;
}

int SendHello(int fd, const wire::HelloPacket& hello) {
  return SendPacket(fd, reinterpret_cast<const char*>(&hello), sizeof(hello), -1, 0);
}

bool SameCookie(const wire::HelloPacket& a, const wire::HelloPacket& b) {
  return a.cookie_bytes == b.cookie_bytes && std::memcmp(a.cookie, b.cookie, sizeof(a.cookie)) == 0;
}

// What the peer says of itself against what this process knows.
Status CheckHello(const wire::HelloPacket& mine, const wire::HelloPacket& theirs,
                  const std::vector<int32_t>& ranks_of_process) {
  const auto p = static_cast<size_t>(theirs.process);
  if (theirs.process < 0 || p >= ranks_of_process.size() || theirs.process == mine.process) {
    return Status(FaultKind::kInvalidArgument,
                  "a peer calls itself process " + std::to_string(theirs.process));
  }
  const struct {
    const char* name;
    int64_t here, there;
  } fields[] = {
      {"the version of the wire protocol", mine.version, theirs.version},
      {"the group's id", mine.group_id, theirs.group_id},
      {"the group's replica", mine.replica, theirs.replica},
      {"the number of its local ranks", ranks_of_process[p], theirs.num_local},
  };
  for (const auto& field : fields) {
    if (field.here == field.there) continue;
    return Status(FaultKind::kInvalidArgument,
                  "process " + std::to_string(theirs.process) +
                      " has made another group: " + field.name + " is " +
                      std::to_string(field.there) + " there and " + std::to_string(field.here) +
                      " here (process " + std::to_string(mine.process) +
                      "). Cure: create groups in the same order and with the same configuration "
                      "in every process.");
  }
  return Status();
}

Status Refused(int process) {
  return Status(FaultKind::kSystem,
                "process " + std::to_string(process) +
                    " did not greet properly: it belongs to another user or job, or it ended");
}

}  // namespace

Socket& Socket::operator=(Socket&& other) noexcept {
  std::swap(fd_, other.fd_);
  return *this;
}

Socket::~Socket() {
  if (fd_ >= 0) close(fd_);
}

int Socket::Release() { return std::exchange(fd_, -1); }

StatusOr<Socket> Listen(std::string* address) {
  uint64_t unique = 0;
  if (getrandom(&unique, sizeof(unique), 0) != sizeof(unique)) {
    return SystemError("getrandom", errno);
  }
  char name[64];
  std::snprintf(name, sizeof(name), "smfree-%d-%016llx", static_cast<int>(getpid()),
                static_cast<unsigned long long>(unique));
  Socket socket(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  sockaddr_un bound;
  const socklen_t size = FillAddress(name, &bound);
  if (!socket.open() || bind(socket.fd(), reinterpret_cast<sockaddr*>(&bound), size) != 0 ||
      listen(socket.fd(), SOMAXCONN) != 0) {
    return SystemError("listening on an abstract Unix socket", errno);
  }
  *address = name;
  return socket;
}

StatusOr<std::vector<Socket>> Greet(const Socket& listener,
                                    const std::vector<std::string>& addresses,
                                    const wire::HelloPacket& hello,
                                    const std::vector<int32_t>& ranks_of_process,
                                    Clock::time_point deadline) {
  const int32_t me = hello.process;
  std::vector<Socket> sockets(addresses.size());
  // S1. Greet the lower processes. They listen already, since their addresses are known, and the
  //     kernel completes the connection: nobody waits here.
  for (int32_t p = 0; p < me; ++p) {
    Socket socket(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
    if (!socket.open()) return SystemError("socket", errno);
    sockaddr_un address;
    const socklen_t size = FillAddress(addresses[static_cast<size_t>(p)], &address);
    while (connect(socket.fd(), reinterpret_cast<sockaddr*>(&address), size) != 0) {
      if (errno == EINTR) continue;
      return Status(FaultKind::kSystem,
                    "process " + std::to_string(p) + " cannot be reached at '" +
                        addresses[static_cast<size_t>(p)] + "': " + std::strerror(errno) +
                        ". Cure: run all processes of the group on one host and in one network "
                        "namespace, and look at the log of that process if it ended.");
    }
    if (!SameUser(socket.fd()) || SendHello(socket.fd(), hello) != 0) return Refused(p);
    sockets[static_cast<size_t>(p)] = std::move(socket);
  }
  // S2. Be greeted by the higher ones, in any order, and answer. Strangers are hung up on.
  auto missing = static_cast<int32_t>(addresses.size()) - 1 - me;
  while (missing > 0) {
    if (!WaitReadable(listener.fd(), deadline)) {
      std::string names;
      for (size_t p = static_cast<size_t>(me) + 1; p < sockets.size(); ++p) {
        if (!sockets[p].open()) names += (names.empty() ? "" : ", ") + std::to_string(p);
      }
      return Status(FaultKind::kDeadline, "process(es) " + names +
                                              " did not connect in time. Cure: see whether they "
                                              "run, or raise timeout_s.");
    }
    Socket socket(accept4(listener.fd(), nullptr, nullptr, SOCK_CLOEXEC));
    wire::HelloPacket theirs;
    if (!socket.open() || !SameUser(socket.fd()) || !ReceiveHello(socket.fd(), deadline, &theirs) ||
        !SameCookie(theirs, hello)) {
      continue;
    }
    // Answered even if it does not fit, so that the other side can tell what is wrong as well.
    const int error = SendHello(socket.fd(), hello);
    const Status status = CheckHello(hello, theirs, ranks_of_process);
    if (!status.ok()) return status;
    Socket& slot = sockets[static_cast<size_t>(theirs.process)];
    if (error != 0 || theirs.process < me || slot.open()) return Refused(theirs.process);
    slot = std::move(socket);
    --missing;
  }
  // S3. The answers of the lower ones. They wait for higher processes only, so there is no circle.
  for (int32_t p = 0; p < me; ++p) {
    wire::HelloPacket theirs;
    if (!ReceiveHello(sockets[static_cast<size_t>(p)].fd(), deadline, &theirs) ||
        !SameCookie(theirs, hello)) {
      return Refused(p);
    }
    const Status status = CheckHello(hello, theirs, ranks_of_process);
    if (!status.ok()) return status;
    if (theirs.process != p) return Refused(p);
  }
  return sockets;
}

}  // namespace smfree::cpu
