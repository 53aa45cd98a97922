// SPDX-License-Identifier: Apache-2.0
#ifndef SMFREE_CSRC_CPU_PROCESSES_SYSTEM_ERROR_H_
#define SMFREE_CSRC_CPU_PROCESSES_SYSTEM_ERROR_H_

#include <string>

#include "csrc/core/status.h"

namespace smfree::cpu {

// A system call that failed with errno `error`, and the cure if one is known. `what` begins the
// sentence, such as "listening on an abstract Unix socket".
Status SystemError(const std::string& what, int error);

// Whether there are no file descriptors left, in this process or on this host.
bool IsOutOfDescriptors(int error);

}  // namespace smfree::cpu

#endif  // SMFREE_CSRC_CPU_PROCESSES_SYSTEM_ERROR_H_
