// SPDX-License-Identifier: Apache-2.0
#include "csrc/cuda/network/exit_of_thread.h"

#include <dlfcn.h>
#include <elf.h>
#include <execinfo.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>

namespace smfree::cuda {
namespace {

const void* library = nullptr;  // where it is loaded

// Where the file with `address` is loaded; null if there is none.
const void* FileWith(const void* address) {
  Dl_info info;
  return dladdr(address, &info) != 0 ? info.dli_fbase : nullptr;
}

// Whether the library has started the calling thread: its first function is the library's, but for
// those of C's and C++'s own, which may be in three files.
bool IsOfLibrary() {
  const void* const of_language[] = {FileWith(dlsym(RTLD_DEFAULT, "exit")),
                                     FileWith(dlsym(RTLD_DEFAULT, "pthread_create")),
                                     FileWith(dlsym(RTLD_DEFAULT, "__cxa_throw"))};
  constexpr int kMostCalls = 64;
  void* calls[kMostCalls];
  for (int i = backtrace(calls, kMostCalls) - 1; i >= 0; --i) {
    const void* const file = FileWith(calls[i]);
    const auto is_file = [file](const void* other) { return file == other; };
    if (std::none_of(std::begin(of_language), std::end(of_language), is_file)) {
      return file == library;
    }
  }
  return false;
}

[[noreturn]] void StopOrExit(int status) {
  if (!IsOfLibrary()) std::exit(status);
  // The handler that was registered last runs first.
  (void)on_exit(
      [](int status_of_process, void*) {
        (void)std::fflush(nullptr);
        _exit(status_of_process);
      },
      nullptr);
  while (true) (void)pause();
}

// An entry of the dynamic section of a loaded file; 0 if there is none.
ElfW(Addr) Entry(const link_map& file, ElfW(Sxword) tag) {
  for (const ElfW(Dyn)* entry = file.l_ld; entry->d_tag != DT_NULL; ++entry) {
    if (entry->d_tag == tag) return entry->d_un.d_ptr;
  }
  return 0;
}

// Makes the word at `at` call StopOrExit. Its page is read-only where all calls were bound at once.
bool Redirect(uintptr_t at) {
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  if (mprotect(reinterpret_cast<void*>(at / page * page), page, PROT_READ | PROT_WRITE) != 0) {
    return false;
  }
  *reinterpret_cast<void (**)(int)>(at) = &StopOrExit;
  return true;
}

}  // namespace

bool StopThreadsThatExit(const void* function) {
  Dl_info info;
  link_map* file = nullptr;
  if (dladdr1(function, &info, reinterpret_cast<void**>(&file), RTLD_DL_LINKMAP) == 0) {
    return false;
  }
  library = info.dli_fbase;
  const auto* const symbols = reinterpret_cast<const ElfW(Sym)*>(Entry(*file, DT_SYMTAB));
  const auto* const names = reinterpret_cast<const char*>(Entry(*file, DT_STRTAB));
  bool found = false;
  // Of functions whose address is taken, and of those that are called.
  constexpr struct { ElfW(Sxword) table, bytes; } kTables[] = {{DT_RELA, DT_RELASZ},
                                                               {DT_JMPREL, DT_PLTRELSZ}};
  for (const auto& [table, bytes] : kTables) {
    const auto* const relocations = reinterpret_cast<const ElfW(Rela)*>(Entry(*file, table));
    for (size_t i = 0; i < Entry(*file, bytes) / sizeof(ElfW(Rela)); ++i) {
      const char* const name = names + symbols[ELF64_R_SYM(relocations[i].r_info)].st_name;
      if (std::strcmp(name, "exit") != 0) continue;
      found = Redirect(file->l_addr + relocations[i].r_offset) || found;
    }
  }
  return found;
}

}  // namespace smfree::cuda
