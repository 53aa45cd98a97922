// SPDX-License-Identifier: Apache-2.0
//
// Operations that ranks have sent and not received: what they are, and how much lies unread.
#ifndef SMFREE_CSRC_CPU_EXCHANGE_UNRECEIVED_H_
#define SMFREE_CSRC_CPU_EXCHANGE_UNRECEIVED_H_

#include <cstdint>
#include <map>
#include <string>

#include "csrc/protocol/identity.h"

namespace smfree::cpu {

class Unreceived {
 public:
  // A rank sent the operation, and has received `bytes` of messages at that point.
  void Add(const Identity& sent, int64_t bytes);

  int64_t count() const { return count_; }
  // "4 operations, of which 120.0 MB lie unread here: 4 times dispatch (model.py:31 in moe; ...)"
  std::string Describe() const;

 private:
  std::map<std::string, int64_t> times_;  // by the call
  int64_t count_ = 0, bytes_ = 0;
};

}  // namespace smfree::cpu

#endif  // SMFREE_CSRC_CPU_EXCHANGE_UNRECEIVED_H_
