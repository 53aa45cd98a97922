// SPDX-License-Identifier: Apache-2.0
//
// NVSHMEM, for groups with a process per GPU: its world, which is all processes of the job, and
// memory at the same offset of a heap on each of them.
//
// The host library is looked up, not linked: the package works without it, and a process has one
// copy, which XLA may have loaded, and initialised, before.
#ifndef SMFREE_CSRC_CUDA_NETWORK_NVSHMEM_H_
#define SMFREE_CSRC_CUDA_NETWORK_NVSHMEM_H_

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "csrc/core/status.h"

namespace smfree::cuda {

class Nvshmem {
 public:
  // The one of this process. `library` is the path of libnvshmem_host.so.3, for a process that has
  // not loaded it yet. Fails if there is none, or one of another major version.
  static StatusOr<Nvshmem*> Get(const std::string& library);

  // What the first process of the world gives to the others.
  StatusOr<std::string> NewUniqueId() const;

  // Joins the world as process `me` of `processes`, with the GPU `device`; collective. Where XLA
  // has initialised NVSHMEM, checks that its world is this one. NVSHMEM ends the process where it
  // finds no way from GPU to GPU.
  Status Join(const std::string& unique_id, int32_t me, int32_t processes, int32_t device);

  // Collective over the world: all processes get as many bytes, at the same offset of their heaps.
  // nullptr if one of them has too little memory. For good: see memory_nvshmem.h.
  char* Allocate(size_t bytes) const;
  // Where this process reaches that offset in the heap of `process`; nullptr if not by NVLink.
  char* At(char* memory, int32_t process) const;

  // Lets the kernels of a module, which was linked with the device library, call NVSHMEM.
  Status InitModule(CUmodule module) const;

  // Work on a stream of the GPU's primary context, which is current. Addresses are those of this
  // process, for the same offset in the heap of `process`. NVSHMEM ends the process where a call
  // fails.
  //
  // Copies bytes there; when they have been delivered, sets `word` there to `value`.
  void PutThenSet(char* to, const char* from, size_t bytes, char* word, uint64_t value,
                  int32_t process, cudaStream_t stream) const;
  void Set(char* word, uint64_t value, int32_t process, cudaStream_t stream) const;
  // What stands behind it on the stream starts when all that stands before it has been delivered.
  void Quiet(cudaStream_t stream) const;

 private:
  struct Library;
  explicit Nvshmem(const Library& library) : library_(library) {}

  const Library& library_;
};

}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_NETWORK_NVSHMEM_H_
