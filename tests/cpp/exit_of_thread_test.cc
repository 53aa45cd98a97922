// SPDX-License-Identifier: Apache-2.0
#include "csrc/cuda/network/exit_of_thread.h"

#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "tests/cpp/check.h"

namespace {

using Exits = void (*)(int status);

// The exit code of a process that does that with the library.
template <typename Body>
int ExitCodeOf(const Body& body) {
  (void)std::fflush(stdout);  // or the child would print it, too
  const pid_t child = fork();
  if (child == 0) {
    void* const library = dlopen(SMFREE_LIBRARY_THAT_EXITS, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) _exit(100);
    body([&](const char* name) { return reinterpret_cast<Exits>(dlsym(library, name)); });
    std::exit(101);
  }
  int status = 0;
  return waitpid(child, &status, 0) == child && WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

bool Stops(Exits function) {
  return smfree::cuda::StopThreadsThatExit(reinterpret_cast<const void*>(function));
}

TEST(ItsThreadEndsTheProcess) {
  CHECK_EQ(ExitCodeOf([](const auto& find) { find("ExitOnThreadOfItsOwn")(3); }), 3);
}

TEST(ItsThreadStopsAndTheProcessGoesOn) {
  const int code = ExitCodeOf([](const auto& find) {
    const Exits exits = find("ExitOnThreadOfItsOwn");
    if (!Stops(exits)) _exit(102);
    std::atexit([] { _exit(103); });  // would be a destructor that others need
    std::thread([exits] { exits(3); }).detach();
    std::this_thread::sleep_for(std::chrono::milliseconds(500));
    std::exit(7);
  });
  CHECK_EQ(code, 7);
}

TEST(AThreadOfOthersEndsTheProcessAsBefore) {
  const int code = ExitCodeOf([](const auto& find) {
    const Exits exits = find("ExitOnCallingThread");
    if (!Stops(exits)) _exit(102);
    std::thread([exits] {
      exits(3);
      _exit(104);  // so that the call above is no jump, which leaves no trace of this function
    }).join();
  });
  CHECK_EQ(code, 3);
}

}  // namespace

TEST_MAIN()
