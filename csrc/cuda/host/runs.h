// SPDX-License-Identifier: Apache-2.0
//
// Which runs of programs a group takes part in when it has failed: those that began before, to
// their end, and no others.
//
// The phases of a run that has begun are launched also after a fault, and do nothing but poison
// their outputs. Were one of them refused, the run would end there on that device, while the others
// may have launched more of it: a collective, in which they would wait for this one for ever. So
// all ranks of a process get one answer for one run, whenever they ask.
#ifndef SMFREE_CSRC_CUDA_HOST_RUNS_H_
#define SMFREE_CSRC_CUDA_HOST_RUNS_H_

#include <cstdint>
#include <limits>
#include <mutex>

namespace smfree::cuda {

class Runs {
 public:
  // Whether the phases of `run` are launched. Runs that began later have greater numbers, and
  // `failed()` stays true once it was.
  template <typename Failed>
  bool Admit(int64_t run, const Failed& failed) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (run > last_ && !failed()) last_ = run;
    return run <= last_;
  }

 private:
  std::mutex mutex_;
  int64_t last_ = std::numeric_limits<int64_t>::min();  // that was admitted
};

}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_HOST_RUNS_H_
