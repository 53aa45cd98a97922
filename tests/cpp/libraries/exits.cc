// SPDX-License-Identifier: Apache-2.0
//
// A library that ends the process, for exit_of_thread_test.
#include <cstdlib>
#include <thread>

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED void ExitOnCallingThread(int status) { std::exit(status); }
EXPORTED void ExitOnThreadOfItsOwn(int status) {
  std::thread([status] { ExitOnCallingThread(status); }).join();
}
