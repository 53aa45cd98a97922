// SPDX-License-Identifier: Apache-2.0
//
// Compiled calls: the custom calls of compiled programs, and names for them that are equal in all
// processes of a launch.
//
// Two calls of one layer are alike in all that they say of themselves, and if no data orders them,
// ranks run them in different orders. What tells them apart is which call of the compiled program
// each one is. All processes compile the same program, and XLA creates its calls in the order of
// its schedule, so a call is named by its index among the alike ones of its program (Instance). What
// has to be found out is which calls are one program, since a process may compile others besides:
//
//   * XLA creates the calls of a program on one thread, while somebody waits for its compilation.
//     JAX tells when that begins and ends (CompilationBegins, CompilationEnds), on the thread that
//     waits. From jax 0.11 on, this is also the thread that creates the calls. Before, that is one
//     of a pool, and any compilation under way may be the one it works for.
//   * A program runs when it is complete, so whoever asks for a name completes it.
//
// If processes should group calls differently nevertheless, the names of alike calls differ in
// `program`, no message is taken for another one, and the receives end with their deadline. A
// program without alike calls does not depend on the grouping.
#ifndef SMFREE_CSRC_CPU_EXCHANGE_COMPILED_CALLS_H_
#define SMFREE_CSRC_CPU_EXCHANGE_COMPILED_CALLS_H_

#include <cstdint>
#include <memory>
#include <tuple>

#include "csrc/protocol/identity.h"

namespace smfree::cpu {

// What a call says of itself.
struct CallAttributes {
  enum class Makes : int32_t { kDispatch, kCombine, kToken };

  int64_t group = 0;
  int32_t lane = 0;
  int32_t derivation = 0;
  uint32_t call_site = 0;
  Makes makes = Makes::kDispatch;

  auto tied() const { return std::tie(group, lane, derivation, call_site, makes); }
  friend bool operator<(const CallAttributes& a, const CallAttributes& b) {
    return a.tied() < b.tied();
  }
};

// One custom call, shared by the devices of the process. All functions are safe to call from any
// thread.
class CompiledCall {
 public:
  // Joins the program that is being compiled on this thread.
  explicit CompiledCall(const CallAttributes& attributes);
  ~CompiledCall();
  CompiledCall(const CompiledCall&) = delete;
  CompiledCall& operator=(const CompiledCall&) = delete;

  // Completes the program.
  Instance instance() const;
  // The name of the sequence that begins with this call in a run; not 0, and within Token's limit.
  uint64_t Sequence(int64_t run_id) const;

 private:
  class Program;
  std::shared_ptr<Program> Join();

  const CallAttributes attributes_;
  const std::shared_ptr<Program> program_;
  Instance instance_;  // set when the program is completed
};

// A compilation that this thread waits for.
void CompilationBegins();
void CompilationEnds();

}  // namespace smfree::cpu

#endif  // SMFREE_CSRC_CPU_EXCHANGE_COMPILED_CALLS_H_
