// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/processes/system_error.h"

#include <sys/resource.h>

#include <cerrno>
#include <cstring>

namespace smfree::cpu {

bool IsOutOfDescriptors(int error) { return error == EMFILE || error == ENFILE; }

Status SystemError(const std::string& what, int error) {
  std::string text = what + " failed: " + std::strerror(error);
  if (error == EMFILE) {
    rlimit limit{};
    getrlimit(RLIMIT_NOFILE, &limit);
    text += ". This process may have " + std::to_string(limit.rlim_cur) +
            " file descriptors, and has them. Fix: raise the limit (ulimit -n, or LimitNOFILE of "
            "the service), or close groups and files that are not needed: a group takes one for "
            "each other process, and one for each 256 MiB of rows in flight of each process";
  } else if (error == ENFILE) {
    text += ". Fix: raise the limit of open files of this host (sysctl fs.file-max)";
  }
  return Status(FaultKind::kSystem, text);
}

}  // namespace smfree::cpu
