// SPDX-License-Identifier: Apache-2.0
//
// Stands in for libgdrapi.so.2 where the symmetric heap is in host memory. NVSHMEM's network
// transports apply signals through a mapping of the heap that the CPU can write, which they ask
// GDRCopy for. With NVSHMEM_HEAP_KIND=SYSMEM the heap is such memory itself, so a mapping of it is
// its own address, and neither a kernel module nor a network card is needed.
//
// The types are those of gdrapi.h, as far as NVSHMEM looks into them.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <mutex>

struct gdr {};
struct gdr_mh_s {
  unsigned long h;
};
struct gdr_info {
  uint64_t va, mapped_size;
  uint32_t page_size;
  uint64_t tm_cycles;
  uint32_t cycles_per_ms;
  unsigned mapped : 1, wc_mapping : 1;
};

namespace {

constexpr int kNoMemory = 12;  // ENOMEM
constexpr uint32_t kPageBytes = 65536;  // of GPUs, which NVSHMEM rounds to

struct Pinned {
  unsigned long address;
  size_t bytes;
} pinned[4096];
unsigned long count = 0;
std::mutex mutex;
gdr one;

}  // namespace

extern "C" {

gdr* gdr_open() { return &one; }
int gdr_close(gdr*) { return 0; }

int gdr_pin_buffer(gdr*, unsigned long address, size_t bytes, uint64_t, uint32_t,
                   gdr_mh_s* handle) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (count == sizeof(pinned) / sizeof(pinned[0])) return kNoMemory;
  pinned[count] = {address, bytes};
  handle->h = ++count;
  return 0;
}
int gdr_unpin_buffer(gdr*, gdr_mh_s) { return 0; }

int gdr_get_info(gdr*, gdr_mh_s handle, gdr_info* info) {
  const Pinned& it = pinned[handle.h - 1];
  *info = {it.address, it.bytes, kPageBytes, 0, 0, 1, 0};
  return 0;
}
int gdr_get_info_v2(gdr* g, gdr_mh_s handle, gdr_info* info) {
  return gdr_get_info(g, handle, info);
}

int gdr_map(gdr*, gdr_mh_s handle, void** address, size_t) {
  *address = reinterpret_cast<void*>(pinned[handle.h - 1].address);
  return 0;
}
int gdr_unmap(gdr*, gdr_mh_s, void*, size_t) { return 0; }

int gdr_copy_from_mapping(gdr_mh_s, void* to, const void* from, size_t bytes) {
  std::memcpy(to, from, bytes);
  return 0;
}
int gdr_copy_to_mapping(gdr_mh_s, const void* to, const void* from, size_t bytes) {
  std::memcpy(const_cast<void*>(to), from, bytes);
  return 0;
}

void gdr_runtime_get_version(int* major, int* minor) {
  *major = 2;
  *minor = 99;
}
int gdr_driver_get_version(gdr*, int* major, int* minor) {
  gdr_runtime_get_version(major, minor);
  return 0;
}

int gdr_get_attribute(gdr*, int, int* value) {
  *value = 0;
  return 0;
}
int gdr_get_callback_flag(gdr*, gdr_mh_s, int* flag) {
  *flag = 0;
  return 0;
}

}  // extern "C"
