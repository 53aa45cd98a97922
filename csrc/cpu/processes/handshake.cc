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
#include "csrc/cpu/processes/system_error.h"
#include "csrc/core/describe.h"

namespace smfree::cpu {
namespace {

// How long a connection may be silent before it is hung up on.
constexpr std::chrono::seconds kSilenceLimit{10};

// Waits until one of `polled` is ready or the deadline has passed; false then.
bool Poll(std::vector<pollfd>& polled, Clock::time_point deadline) {
  for (;;) {
    const auto left =
        std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()).count();
    const int limit_ms = static_cast<int>(std::clamp<int64_t>(left + 1, 0, 60'000));
    if (poll(polled.data(), polled.size(), limit_ms) > 0) return true;
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

// For a connection that has something to read, or is at its end.
bool ReceiveHello(int fd, packets::HelloPacket* hello) {
  return recv(fd, hello, sizeof(*hello), MSG_TRUNC | MSG_DONTWAIT) ==
             static_cast<ssize_t>(sizeof(*hello)) &&
         hello->kind == packets::PacketKind::kHello && hello->magic == packets::kMagic;
}

int SendHello(int fd, const packets::HelloPacket& hello) {
  return SendPacket(fd, reinterpret_cast<const char*>(&hello), sizeof(hello), -1, MSG_DONTWAIT);
}

bool SameCookie(const packets::HelloPacket& a, const packets::HelloPacket& b) {
  return a.cookie_bytes == b.cookie_bytes && std::memcmp(a.cookie, b.cookie, sizeof(a.cookie)) == 0;
}

// What the peer says of itself against what this process knows.
Status CheckHello(const packets::HelloPacket& mine, const packets::HelloPacket& theirs,
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
                      "). Fix: create groups in the same order and with the same configuration "
                      "in every process.");
  }
  return Status();
}

Status Refused(int process) {
  return Status(FaultKind::kSystem,
                "process " + std::to_string(process) +
                    " did not greet properly: it belongs to another user or job, or it ended");
}

// The greetings of this process with all others.
class Greeting {
 public:
  Greeting(const Socket& listener, const std::vector<std::string>& addresses,
           const packets::HelloPacket& hello, const std::vector<int32_t>& ranks_of_process,
           Clock::time_point deadline)
      : listener_(listener),
        addresses_(addresses),
        hello_(hello),
        ranks_of_process_(ranks_of_process),
        deadline_(deadline),
        me_(hello.process),
        sockets_(addresses.size()) {}

  StatusOr<std::vector<Socket>> Run() {
    // S1. Greet the lower processes. They listen already, since their addresses are known, and the
    //     kernel completes the connection.
    for (int32_t p = 0; p < me_; ++p) {
      const Status status = Connect(p);
      if (!status.ok()) return status;
    }
    // S2. Be greeted by the higher ones, and answer.
    Status status = BeGreeted();
    // S3. The answers of the lower ones. They wait for higher processes only, so there is no
    //     circle.
    for (int32_t p = 0; p < me_ && status.ok(); ++p) status = Answer(p);
    if (!status.ok()) return status;
    return std::move(sockets_);
  }

 private:
  // A connection of which nobody knows yet whose it is.
  struct Guest {
    Socket socket;
    Clock::time_point leaves;  // if it has said nothing by then
  };

  Status Connect(int32_t process) {
    const std::string& name = addresses_[static_cast<size_t>(process)];
    Socket socket(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
    if (!socket.open()) return SystemError("opening a socket", errno);
    // Connecting waits where strangers fill the queue of the listener.
    const double left_s = std::max(0.001, Seconds(deadline_ - Clock::now()));
    timeval limit{};
    limit.tv_sec = static_cast<time_t>(left_s);
    limit.tv_usec = static_cast<suseconds_t>(1e6 * (left_s - static_cast<double>(limit.tv_sec)));
    setsockopt(socket.fd(), SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit));
    sockaddr_un address;
    const socklen_t size = FillAddress(name, &address);
    while (connect(socket.fd(), reinterpret_cast<sockaddr*>(&address), size) != 0) {
      if (errno == EINTR) continue;
      return Status(FaultKind::kSystem,
                    "process " + std::to_string(process) + " cannot be reached at '" + name +
                        "': " + std::strerror(errno) +
                        ". Fix: run all processes of the group on one host and in one network "
                        "namespace, and look at the log of that process if it ended.");
    }
    if (!SameUser(socket.fd()) || SendHello(socket.fd(), hello_) != 0) return Refused(process);
    sockets_[static_cast<size_t>(process)] = std::move(socket);
    return Status();
  }

  // In any order. Strangers are hung up on, and nobody waits for one that says nothing.
  Status BeGreeted() {
    while (!Missing().empty()) {
      std::vector<pollfd> polled{{listener_.fd(), POLLIN, 0}};
      Clock::time_point until = deadline_;
      for (const Guest& guest : guests_) {
        polled.push_back({guest.socket.fd(), POLLIN, 0});
        until = std::min(until, guest.leaves);
      }
      const bool ready = Poll(polled, until);
      if (!ready && Clock::now() >= deadline_) {
        return Status(FaultKind::kDeadline, "process(es) " + JoinNumbers(Missing()) +
                                                " did not connect in time. Fix: see whether they "
                                                "run, or raise timeout_s.");
      }
      std::vector<Guest> guests = std::exchange(guests_, {});
      for (size_t i = 0; i < guests.size(); ++i) {
        if (polled[i + 1].revents != 0) {
          const Status status = Meet(std::move(guests[i].socket));
          if (!status.ok()) return status;
        } else if (Clock::now() < guests[i].leaves) {
          guests_.push_back(std::move(guests[i]));
        }
      }
      if (polled[0].revents == 0) continue;
      Socket socket(accept4(listener_.fd(), nullptr, nullptr, SOCK_CLOEXEC));
      if (!socket.open() && IsOutOfDescriptors(errno)) {
        return SystemError("accepting a connection of another process", errno);
      }
      if (socket.open() && SameUser(socket.fd())) {
        guests_.push_back({std::move(socket), Clock::now() + kSilenceLimit});
      }
    }
    return Status();
  }

  // Answers a guest that says something. A stranger's socket ends here.
  Status Meet(Socket socket) {
    packets::HelloPacket theirs;
    if (!ReceiveHello(socket.fd(), &theirs) || !SameCookie(theirs, hello_)) return Status();
    // Answered even if it does not fit, so that the other side can tell what is wrong as well.
    const int error = SendHello(socket.fd(), hello_);
    const Status status = CheckHello(hello_, theirs, ranks_of_process_);
    if (!status.ok()) return status;
    Socket& to_them = sockets_[static_cast<size_t>(theirs.process)];
    if (error != 0 || theirs.process < me_ || to_them.open()) return Refused(theirs.process);
    to_them = std::move(socket);
    return Status();
  }

  Status Answer(int32_t process) {
    std::vector<pollfd> polled{{sockets_[static_cast<size_t>(process)].fd(), POLLIN, 0}};
    if (!Poll(polled, deadline_)) {
      return Status(FaultKind::kDeadline,
                    "process " + std::to_string(process) +
                        " did not answer in time. Fix: see what it does, or raise timeout_s.");
    }
    packets::HelloPacket theirs;
    if (!ReceiveHello(polled[0].fd, &theirs) || !SameCookie(theirs, hello_)) {
      return Refused(process);
    }
    const Status status = CheckHello(hello_, theirs, ranks_of_process_);
    return !status.ok() || theirs.process == process ? status : Refused(process);
  }

  // The higher processes that have not greeted yet.
  std::vector<int32_t> Missing() const {
    std::vector<int32_t> missing;
    for (size_t p = static_cast<size_t>(me_) + 1; p < sockets_.size(); ++p) {
      if (!sockets_[p].open()) missing.push_back(static_cast<int32_t>(p));
    }
    return missing;
  }

  const Socket& listener_;
  const std::vector<std::string>& addresses_;
  const packets::HelloPacket& hello_;
  const std::vector<int32_t>& ranks_of_process_;
  const Clock::time_point deadline_;
  const int32_t me_;
  std::vector<Socket> sockets_;  // by process
  std::vector<Guest> guests_;
};

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
                                    const packets::HelloPacket& hello,
                                    const std::vector<int32_t>& ranks_of_process,
                                    Clock::time_point deadline) {
  return Greeting(listener, addresses, hello, ranks_of_process, deadline).Run();
}

}  // namespace smfree::cpu
