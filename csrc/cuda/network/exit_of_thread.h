// SPDX-License-Identifier: Apache-2.0
//
// A library that calls exit() on a thread of its own, as NVSHMEM does on the one that talks to the
// network where a put fails: the peer's process may have died. Then destructors run beside all
// other threads, and the process ends, or crashes, before anybody has said which rank is missing.
#ifndef SMFREE_CSRC_CUDA_NETWORK_EXIT_OF_THREAD_H_
#define SMFREE_CSRC_CUDA_NETWORK_EXIT_OF_THREAD_H_

namespace smfree::cuda {

// From now on such a thread stops instead, for good. The process goes on, and ends without running
// destructors, with the exit code that it would have had: some of them would wait for that thread.
// On other threads the library ends the process as before.
//
// `function` is any function of the library, which has to be an ELF file with relocations for calls.
// False if there is none for exit(); then nothing is changed.
bool StopThreadsThatExit(const void* function);

}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_NETWORK_EXIT_OF_THREAD_H_
