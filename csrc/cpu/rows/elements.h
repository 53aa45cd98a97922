// SPDX-License-Identifier: Apache-2.0
//
// How loops over the elements of rows load and store them: as float32. Plain loops, of which the
// compiler makes vectors. For source files of this folder alone.
#ifndef SMFREE_CSRC_CPU_ROWS_ELEMENTS_H_
#define SMFREE_CSRC_CPU_ROWS_ELEMENTS_H_

#include <cstdint>
#include <cstring>

#include "csrc/cpu/rows/floats.h"
#include "csrc/cpu/rows/fp8.h"

// Makes one version of a plain function per vector width; the loader chooses. Not under sanitizers,
// whose runtime is not up yet at that time.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define SMFREE_VECTORISED \
  __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define SMFREE_VECTORISED
#endif

namespace smfree::cpu {

// Elements whose bits are an Integer. Rows need not hold objects of that type, hence the copies.
template <typename Integer, float (*From)(uint32_t), uint32_t (*To)(float)>
struct ElementsAs {
  using Element = Integer;
  SMFREE_INLINE static float Load(const Element* from) {
    Element bits;
    std::memcpy(&bits, from, sizeof(bits));
    return From(bits);
  }
  SMFREE_INLINE static void Store(Element* to, float value) {
    const auto bits = static_cast<Element>(To(value));
    std::memcpy(to, &bits, sizeof(bits));
  }
};

using AsF32 = ElementsAs<uint32_t, FromFloat32, ToFloat32>;
using AsBF16 = ElementsAs<uint16_t, FromBFloat16, ToBFloat16>;
using AsF16 = ElementsAs<uint16_t, FromFloat16, ToFloat16>;
using AsE4M3 = ElementsAs<uint8_t, FromE4M3, ToE4M3>;
using AsE5M2 = ElementsAs<uint8_t, FromE5M2, ToE5M2>;

template <typename As>
SMFREE_INLINE const typename As::Element* ElementsOf(const void* row) {
  return static_cast<const typename As::Element*>(row);
}

}  // namespace smfree::cpu

#endif  // SMFREE_CSRC_CPU_ROWS_ELEMENTS_H_
