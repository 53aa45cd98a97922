// SPDX-License-Identifier: Apache-2.0
//
// Groups across forked processes. The test process itself must not start a thread before it forks.
#ifndef SMFREE_TESTS_CPP_CPU_PROCESSES_H_
#define SMFREE_TESTS_CPP_CPU_PROCESSES_H_

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "tests/cpp/check.h"
#include "tests/cpp/cpu_ranks.h"

namespace smfree::cpu::test {

constexpr int32_t kMaxProcesses = 3;

// What the processes of one test share: their addresses, and points that all have reached.
struct Shared {
  char address[kMaxProcesses][64];
  std::atomic<int32_t> listening, reached[4];
};

// One process of a group: its view of it.
struct Member {
  Member(Shared& shared_in, int32_t process_in, std::vector<int32_t> process_of_rank_in)
      : shared(shared_in), process(process_in), process_of_rank(std::move(process_of_rank_in)) {
    num_processes = process_of_rank.back() + 1;
  }

  // `once_listening` is called when all listen and nobody has connected.
  Status Join(const GroupConfig& config, const std::string& cookie = "secret",
              int64_t group_id = 1, const std::function<void()>& once_listening = [] {}) {
    auto created = Group::Create(group_id, 0, config, process_of_rank, process, cookie);
    if (!created.ok()) return created.status();
    group = created.value();
    std::strcpy(shared.address[process], group->address().c_str());
    Reach(shared.listening);
    once_listening();
    return group->Connect({shared.address, shared.address + num_processes});
  }
  // Comes back when all processes of the group have come.
  void Reach(std::atomic<int32_t>& point) {
    ++point;
    CHECK(WaitFor([&] { return point >= num_processes; }));
  }
  std::vector<int32_t> LocalRanks() const {
    std::vector<int32_t> ranks;
    for (size_t rank = 0; rank < process_of_rank.size(); ++rank) {
      if (process_of_rank[rank] == process) ranks.push_back(static_cast<int32_t>(rank));
    }
    return ranks;
  }

  Shared& shared;
  const int32_t process;
  const std::vector<int32_t> process_of_rank;
  int32_t num_processes;
  std::shared_ptr<Group> group;
};

// Forks one process per process of the group and runs `body` in each, which exits with 1 if a check
// failed there. Returns the wait statuses.
inline std::vector<int> RunProcesses(const std::vector<int32_t>& process_of_rank,
                                     const std::function<void(Member&)>& body) {
  void* const memory =
      mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  auto* const shared = new (memory) Shared();
  const int32_t num_processes = process_of_rank.back() + 1;
  std::vector<pid_t> children;
  for (int32_t process = 0; process < num_processes; ++process) {
    std::fflush(nullptr);
    const pid_t child = fork();
    if (child == 0) {
      check::failures = 0;
      {
        Member member(*shared, process, process_of_rank);
        body(member);
      }
      std::exit(check::failures == 0 ? 0 : 1);  // with the group open, if the body left it so
    }
    children.push_back(child);
  }
  std::vector<int> statuses(children.size());
  for (size_t i = 0; i < children.size(); ++i) waitpid(children[i], &statuses[i], 0);

  // Nothing is left: no socket of theirs, no process.
  std::ifstream sockets("/proc/net/unix");
  for (std::string line; std::getline(sockets, line);) {
    for (const pid_t child : children) {
      CHECK(line.find("smfree-" + std::to_string(child) + "-") == std::string::npos);
    }
  }
  CHECK(waitpid(-1, nullptr, WNOHANG) == -1 && errno == ECHILD);
  munmap(memory, sizeof(Shared));
  return statuses;
}

}  // namespace smfree::cpu::test

#endif  // SMFREE_TESTS_CPP_CPU_PROCESSES_H_
