// SPDX-License-Identifier: Apache-2.0
//
// What a model check says of its searches, and how it ends.
#ifndef SMFREE_TESTS_CPP_MODEL_EXPECTATIONS_H_
#define SMFREE_TESTS_CPP_MODEL_EXPECTATIONS_H_

#include <cstdio>
#include <cstring>

#include "tests/cpp/model_search.h"

namespace smfree::model {

inline int failures = 0;

inline void ExpectNothing(const Verdict& verdict) {
  if (verdict.violation == nullptr) return;
  std::printf("  FAILED: %s\n", verdict.violation);
  PrintTrace(verdict);
  ++failures;
}

inline void ExpectViolation(const Verdict& verdict, const char* violation) {
  std::printf("  found: %s\n", verdict.violation == nullptr ? "nothing" : verdict.violation);
  PrintTrace(verdict);
  if (verdict.violation == nullptr || std::strstr(verdict.violation, violation) == nullptr) {
    std::printf("  FAILED: expected to find: %s\n", violation);
    ++failures;
  }
}

// The exit status.
inline int Conclude() {
  std::printf("%s\n", failures == 0 ? "model check passed" : "model check FAILED");
  return failures == 0 ? 0 : 1;
}

}  // namespace smfree::model

#endif  // SMFREE_TESTS_CPP_MODEL_EXPECTATIONS_H_
