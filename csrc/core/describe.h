// SPDX-License-Identifier: Apache-2.0
//
// Words for errors.
#ifndef SMFREE_CSRC_PROTOCOL_DESCRIBE_H_
#define SMFREE_CSRC_PROTOCOL_DESCRIBE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "csrc/protocol/identity.h"

namespace smfree {

// The name that errors use for a call site, such as "model.py:31 in moe".
void RegisterCallSite(uint32_t call_site, std::string name);

// "forward", or the transforms of a derivation in the order of their application, such as
// "transpose" or "replay of transpose".
std::string DescribeDerivation(int32_t derivation);

// "model.py:31 in moe; lane 0, forward, number 12"; "model.py:31 in moe, call 2 of that line; …" where
// the program has several that are alike.
std::string DescribePoint(const Identity& identity);

// "combine number 11 (model.py:35 in moe; lane 0, forward)"
std::string DescribeOperation(const Identity& identity);

// "rank 3 in dispatch_send (model.py:31 in moe; lane 0, forward, number 12)"
std::string DescribeCall(const char* phase, int32_t rank, const Identity& identity);

// "0, 2, 3"
std::string JoinNumbers(const std::vector<int32_t>& numbers);

}  // namespace smfree

#endif  // SMFREE_CSRC_PROTOCOL_DESCRIBE_H_
