// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/exchange/compiled_calls.h"

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <set>
#include <utility>
#include <vector>

#include "csrc/protocol/token.h"

namespace smfree::cpu {
namespace {

// FNV-1a over 64-bit words: the same in all processes.
class Hash {
 public:
  Hash& operator<<(uint64_t word) {
    for (int shift = 0; shift < 64; shift += 8) {
      state_ = (state_ ^ ((word >> shift) & 0xff)) * 0x100000001b3;
    }
    return *this;
  }
  Hash& operator<<(const CallAttributes& call) {
    return *this << static_cast<uint64_t>(call.group) << static_cast<uint64_t>(call.lane)
                 << static_cast<uint64_t>(call.derivation) << call.call_site
                 << static_cast<uint64_t>(call.makes);
  }
  // 1 to limit - 1.
  uint64_t Below(uint64_t limit) const { return 1 + (state_ ^ (state_ >> 32)) % (limit - 1); }

 private:
  uint64_t state_ = 0xcbf29ce484222325;
};

struct Compilations {
  std::mutex mutex;
  int64_t last = 0;
  std::set<int64_t> under_way;
};

Compilations& AllCompilations() {
  static Compilations& compilations = *new Compilations;  // leaked: see threads.h
  return compilations;
}

thread_local int64_t awaited_here = 0;  // 0: none

}  // namespace

class CompiledCall::Program {
 public:
  // `compilations`: one of them creates the program; none if JAX told of none.
  explicit Program(std::set<int64_t> compilations) : compilations_(std::move(compilations)) {}

  // Whether calls that are created now, on the same thread, belong to it.
  bool GoesOn(const std::set<int64_t>& under_way) const {
    const auto goes_on = [&](int64_t id) { return under_way.count(id) > 0; };
    return !complete_ && (compilations_.empty() || std::any_of(compilations_.begin(),
                                                               compilations_.end(), goes_on));
  }

  // False if it is complete.
  bool Add(CompiledCall* call) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!complete_) calls_.push_back(call);
    return !complete_;
  }

  // Called when a compilation failed, if the program is not complete.
  void Remove(CompiledCall* call) {
    const std::lock_guard<std::mutex> lock(mutex_);
    calls_.erase(std::remove(calls_.begin(), calls_.end(), call), calls_.end());
  }

  void Complete() {
    if (complete_.load(std::memory_order_acquire)) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    Hash all;
    std::map<CallAttributes, std::vector<CompiledCall*>> alike;
    for (CompiledCall* call : calls_) {
      all << call->attributes_;
      alike[call->attributes_].push_back(call);
    }
    const auto hash = static_cast<uint32_t>(all.Below(Token::kExact));
    for (const auto& [attributes, calls] : alike) {
      uint32_t ordinal = 0;
      for (CompiledCall* call : calls) {
        call->instance_ = {ordinal++, calls.size() > 1 ? hash : 0};
      }
    }
    calls_.clear();
    complete_.store(true, std::memory_order_release);  // pairs with the load above
  }

 private:
  const std::set<int64_t> compilations_;
  std::atomic<bool> complete_{false};
  std::mutex mutex_;
  std::vector<CompiledCall*> calls_;  // in the order of their creation; none once complete
};

std::shared_ptr<CompiledCall::Program> CompiledCall::Join() {
  thread_local std::shared_ptr<Program> program;
  Compilations& compilations = AllCompilations();
  const std::lock_guard<std::mutex> lock(compilations.mutex);
  while (!program || !program->GoesOn(compilations.under_way) || !program->Add(this)) {
    program = std::make_shared<Program>(
        awaited_here != 0 ? std::set<int64_t>{awaited_here} : compilations.under_way);
  }
  return program;
}

CompiledCall::CompiledCall(const CallAttributes& attributes)
    : attributes_(attributes), program_(Join()) {}

CompiledCall::~CompiledCall() { program_->Remove(this); }

Instance CompiledCall::instance() const {
  program_->Complete();
  return instance_;
}

uint64_t CompiledCall::Sequence(int64_t run_id) const {
  const Instance mine = instance();
  Hash hash;
  hash << static_cast<uint64_t>(run_id) << attributes_ << mine.ordinal << mine.program;
  return hash.Below(Token::kLimit);
}

void CompilationBegins() {
  Compilations& compilations = AllCompilations();
  const std::lock_guard<std::mutex> lock(compilations.mutex);
  awaited_here = ++compilations.last;
  compilations.under_way.insert(awaited_here);
}

void CompilationEnds() {
  Compilations& compilations = AllCompilations();
  const std::lock_guard<std::mutex> lock(compilations.mutex);
  compilations.under_way.erase(awaited_here);
  awaited_here = 0;
}

}  // namespace smfree::cpu
