// SPDX-License-Identifier: Apache-2.0
#include "csrc/cuda/network/nvshmem.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cstring>
#include <mutex>

#include "csrc/cuda/memory/allocation.h"
#include "csrc/cuda/network/exit_of_thread.h"

namespace smfree::cuda {
namespace {

// The interface of NVSHMEM 3, first version of its structs, which say so in their first word.
constexpr int kMajorVersion = 3;
template <typename Struct>
constexpr int kVersionOf = (1 << 16) + static_cast<int>(sizeof(Struct));

struct UniqueId {
  int version = kVersionOf<UniqueId>;
  char internal[124] = {};
};
struct UniqueIdArgs {
  int version = kVersionOf<UniqueIdArgs>;
  UniqueId* id = nullptr;
  int my_rank = -1;
  int num_ranks = -1;
};
struct InitArgs {
  int version = kVersionOf<InitArgs>;
  UniqueIdArgs unique_id;
  char content[96] = {};
};
struct InitAttributes {
  int version = kVersionOf<InitAttributes>;
  void* mpi_comm = nullptr;
  InitArgs args;
};
static_assert(sizeof(UniqueId) == 128 && sizeof(UniqueIdArgs) == 24);
static_assert(sizeof(InitArgs) == 128 && sizeof(InitAttributes) == 144);
constexpr unsigned int kInitWithUniqueId = 1 << 3;
constexpr int kIsInitialized = 2;  // of the states, and more than it
constexpr int kSignalSet = 9;      // NVSHMEM_SIGNAL_SET

}  // namespace

struct Nvshmem::Library {
  void (*get_version)(int* major, int* minor, int* patch);
  int (*init_status)();
  int (*get_unique_id)(UniqueId* id);
  int (*set_attr_unique_id_args)(int my_rank, int num_ranks, const UniqueId* id,
                                 InitAttributes* attributes);
  int (*init_attr)(unsigned int flags, InitAttributes* attributes);
  int (*my_pe)();
  int (*n_pes)();
  void* (*malloc)(size_t bytes);
  void* (*ptr)(const void* address, int pe);
  void (*putmem_signal_on_stream)(void* to, const void* from, size_t bytes, uint64_t* word,
                                  uint64_t value, int op, int pe, cudaStream_t stream);
  void (*signal_op_on_stream)(uint64_t* word, uint64_t value, int op, int pe,
                              cudaStream_t stream);
  void (*quiet_on_stream)(cudaStream_t stream);
  int (*cumodule_init)(CUmodule module);
};

namespace {

constexpr char kSoname[] = "libnvshmem_host.so.3";

Status NoLibrary(const std::string& why) {
  return Status(FaultKind::kSystem,
                "NVSHMEM, which connects GPUs of several processes, cannot be used: " + why +
                    ". Fix: pip install nvidia-nvshmem-cu13 (or -cu12, as JAX's CUDA), version " +
                    std::to_string(kMajorVersion) +
                    "; or one process for all GPUs of a host.");
}

template <typename Function>
bool Find(void* handle, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(handle, name));
  return function != nullptr;
}

}  // namespace

StatusOr<Nvshmem*> Nvshmem::Get(const std::string& library) {
  static std::mutex& mutex = *new std::mutex;
  static Nvshmem* nvshmem = nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  if (nvshmem != nullptr) return nvshmem;
  void* handle = dlopen(kSoname, RTLD_NOW | RTLD_NOLOAD);
  if (handle == nullptr) {
    handle = dlopen(library.empty() ? kSoname : library.c_str(), RTLD_NOW | RTLD_GLOBAL);
  }
  if (handle == nullptr) return NoLibrary(dlerror());
  static Library found;
  if (!Find(handle, "nvshmemx_vendor_get_version_info", found.get_version) ||
      !Find(handle, "nvshmemx_init_status", found.init_status) ||
      !Find(handle, "nvshmemx_get_uniqueid", found.get_unique_id) ||
      !Find(handle, "nvshmemx_set_attr_uniqueid_args", found.set_attr_unique_id_args) ||
      !Find(handle, "nvshmemx_hostlib_init_attr", found.init_attr) ||
      !Find(handle, "nvshmem_my_pe", found.my_pe) || !Find(handle, "nvshmem_n_pes", found.n_pes) ||
      !Find(handle, "nvshmem_malloc", found.malloc) ||
      !Find(handle, "nvshmem_ptr", found.ptr) ||
      !Find(handle, "nvshmemx_putmem_signal_on_stream", found.putmem_signal_on_stream) ||
      !Find(handle, "nvshmemx_signal_op_on_stream", found.signal_op_on_stream) ||
      !Find(handle, "nvshmemx_quiet_on_stream", found.quiet_on_stream) ||
      !Find(handle, "nvshmemx_cumodule_init", found.cumodule_init)) {
    return NoLibrary(dlerror());
  }
  int major = 0, minor = 0, patch = 0;
  found.get_version(&major, &minor, &patch);
  if (major != kMajorVersion) {
    return NoLibrary("the library is of version " + std::to_string(major) + "." +
                     std::to_string(minor) + "." + std::to_string(patch));
  }
  // Deadlines tell of a peer that has died. The thread that meets it first would end the process.
  (void)StopThreadsThatExit(reinterpret_cast<const void*>(found.get_version));
  nvshmem = new Nvshmem(found);
  return nvshmem;
}

StatusOr<std::string> Nvshmem::NewUniqueId() const {
  UniqueId id;
  if (library_.get_unique_id(&id) != 0) {
    return Status(FaultKind::kSystem, "nvshmemx_get_uniqueid failed");
  }
  return std::string(reinterpret_cast<const char*>(&id), sizeof(id));
}

Status Nvshmem::Join(const std::string& unique_id, int32_t me, int32_t processes, int32_t device) {
  if (library_.init_status() < kIsInitialized) {
    UniqueId id;
    if (unique_id.size() != sizeof(id)) {
      return Status(FaultKind::kInvalidArgument,
                    "got an NVSHMEM unique id of " + std::to_string(unique_id.size()) +
                        " bytes, expected " + std::to_string(sizeof(id)) +
                        ": the processes have different versions of NVSHMEM");
    }
    std::memcpy(&id, unique_id.data(), sizeof(id));
    const DeviceScope scope(device);  // NVSHMEM takes the current device, for good
    InitAttributes attributes;
    if (library_.set_attr_unique_id_args(me, processes, &id, &attributes) != 0) {
      return Status(FaultKind::kSystem, "nvshmemx_set_attr_uniqueid_args failed for process " +
                                            std::to_string(me) + " of " +
                                            std::to_string(processes));
    }
    if (library_.init_attr(kInitWithUniqueId, &attributes) != 0) {
      return Status(FaultKind::kSystem, "NVSHMEM could not be initialised; NVSHMEM_DEBUG=INFO "
                                        "makes it say why");
    }
  }
  const int32_t pe = library_.my_pe(), pes = library_.n_pes();
  if (pe != me || pes != processes) {
    return Status(FaultKind::kSystem,
                  "NVSHMEM had been initialised before, with this process as " +
                      std::to_string(pe) + " of " + std::to_string(pes) + ", expected " +
                      std::to_string(me) + " of " + std::to_string(processes) +
                      ". Fix: leave xla_gpu_experimental_enable_nvshmem off, or let its world be "
                      "that of jax.distributed");
  }
  return {};
}

char* Nvshmem::Allocate(size_t bytes) const { return static_cast<char*>(library_.malloc(bytes)); }
char* Nvshmem::At(char* memory, int32_t process) const {
  return static_cast<char*>(library_.ptr(memory, process));
}

Status Nvshmem::InitModule(CUmodule module) const {
  if (library_.cumodule_init(module) == 0) return {};
  int major = 0, minor = 0, patch = 0;
  library_.get_version(&major, &minor, &patch);
  return Status(FaultKind::kSystem,
                "NVSHMEM " + std::to_string(major) + "." + std::to_string(minor) + "." +
                    std::to_string(patch) +
                    " does not take kernels that were built with the device library of " +
                    SMFREE_NVSHMEM_VERSION + ". Fix: build with the installed version, or "
                    "EpConfig(puts='host')");
}

namespace {

// NVSHMEM wants its calls one at a time. Those that wait for other processes must not be among
// them: another group may be what these wait for.
std::mutex& OneAtATime() {
  static std::mutex& mutex = *new std::mutex;
  return mutex;
}

}  // namespace

void Nvshmem::PutThenSet(char* to, const char* from, size_t bytes, char* word, uint64_t value,
                         int32_t process, cudaStream_t stream) const {
  const std::lock_guard<std::mutex> lock(OneAtATime());
  library_.putmem_signal_on_stream(to, from, bytes, reinterpret_cast<uint64_t*>(word), value,
                                   kSignalSet, process, stream);
}

void Nvshmem::Set(char* word, uint64_t value, int32_t process, cudaStream_t stream) const {
  const std::lock_guard<std::mutex> lock(OneAtATime());
  library_.signal_op_on_stream(reinterpret_cast<uint64_t*>(word), value, kSignalSet, process,
                               stream);
}

void Nvshmem::Quiet(cudaStream_t stream) const {
  const std::lock_guard<std::mutex> lock(OneAtATime());
  library_.quiet_on_stream(stream);
}

}  // namespace smfree::cuda
