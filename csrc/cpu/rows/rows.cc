// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/rows/rows.h"

#include <algorithm>
#include <cstring>
#include <limits>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "csrc/cpu/rows/floats.h"

// One version per vector width, chosen when the library is loaded. Not under sanitizers, whose
// runtime is not up yet at that time.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define SMFREE_VECTORISED \
  __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define SMFREE_VECTORISED
#endif

namespace smfree::cpu {
namespace {

// Vectors of one cache line of floats; the compiler cuts them into what the processor has.
constexpr int64_t kWidth = 16;
typedef float Floats __attribute__((vector_size(kWidth * 4)));
typedef uint32_t Words __attribute__((vector_size(kWidth * 4)));
typedef uint16_t Halves __attribute__((vector_size(kWidth * 2)));

// How elements of each dtype are loaded and stored, one (F, U = float, uint32_t) or kWidth at a
// time.
struct AsF32 {
  using Element = float;
  template <typename F, typename U>
  SMFREE_INLINE static F Load(const Element* from) {
    F value;
    std::memcpy(&value, from, sizeof(value));
    return value;
  }
  template <typename F, typename U>
  SMFREE_INLINE static void Store(Element* to, F value) {
    std::memcpy(to, &value, sizeof(value));
  }
};

template <typename U>
struct HalfOf {
  using Type = Halves;
};
template <>
struct HalfOf<uint32_t> {
  using Type = uint16_t;
};

template <typename U>
SMFREE_INLINE U Widen(const uint16_t* from) {
  typename HalfOf<U>::Type halves;
  std::memcpy(&halves, from, sizeof(halves));
  if constexpr (sizeof(U) == 4) {
    return halves;
  } else {
    return __builtin_convertvector(halves, U);
  }
}

template <typename U>
SMFREE_INLINE void Narrow(uint16_t* to, U words) {
  typename HalfOf<U>::Type halves;
  if constexpr (sizeof(U) == 4) {
    halves = static_cast<uint16_t>(words);
  } else {
    halves = __builtin_convertvector(words, Halves);
  }
  std::memcpy(to, &halves, sizeof(halves));
}

struct AsBF16 {
  using Element = uint16_t;
  template <typename F, typename U>
  SMFREE_INLINE static F Load(const Element* from) {
    return FromBFloat16<F, U>(Widen<U>(from));
  }
  template <typename F, typename U>
  SMFREE_INLINE static void Store(Element* to, F value) {
    Narrow<U>(to, ToBFloat16<F, U>(value));
  }
};

struct AsF16 {
  using Element = uint16_t;
  template <typename F, typename U>
  SMFREE_INLINE static F Load(const Element* from) {
    return FromFloat16<F, U>(Widen<U>(from));
  }
  template <typename F, typename U>
  SMFREE_INLINE static void Store(Element* to, F value) {
    Narrow<U>(to, ToFloat16<F, U>(value));
  }
};

template <typename As>
SMFREE_INLINE const typename As::Element* ElementsOf(const void* row) {
  return static_cast<const typename As::Element*>(row);
}

// All terms of kWidth elements at a time: the reads of the rows overlap, and no sum is ever stored.
template <typename As>
SMFREE_INLINE void Sum(void* out, const WeightedRow* terms, int64_t num_terms, int64_t n) {
  auto* const sums = static_cast<typename As::Element*>(out);
  const auto add_up = [&](auto zero, auto word, int64_t i) __attribute__((always_inline)) {
    using F = decltype(zero);
    using U = decltype(word);
    F sum = As::template Load<F, U>(ElementsOf<As>(terms[0].row) + i) * terms[0].weight;
    for (int64_t term = 1; term < num_terms; ++term) {
      sum += As::template Load<F, U>(ElementsOf<As>(terms[term].row) + i) * terms[term].weight;
    }
    As::template Store<F, U>(sums + i, sum);
  };
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) add_up(Floats{}, Words{}, i);
  for (; i < n; ++i) add_up(float{}, uint32_t{}, i);
}

template <typename As>
SMFREE_INLINE float ScaleAndDot(void* out, const void* row, const void* y, float w, int64_t n) {
  auto* const scaled = static_cast<typename As::Element*>(out);
  Floats sums{};
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const Floats x = As::template Load<Floats, Words>(ElementsOf<As>(row) + i);
    sums += x * As::template Load<Floats, Words>(ElementsOf<As>(y) + i);
    As::template Store<Floats, Words>(scaled + i, x * w);
  }
  for (int64_t lane = 0; i < n; ++i, ++lane) {
    const float x = As::template Load<float, uint32_t>(ElementsOf<As>(row) + i);
    sums[lane] += x * As::template Load<float, uint32_t>(ElementsOf<As>(y) + i);
    As::template Store<float, uint32_t>(scaled + i, x * w);
  }
  for (int64_t half = kWidth / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  return sums[0];
}

}  // namespace

// Of n elements; sum: out = sum of the terms.
struct Kernels {
  void (*sum)(void* out, const WeightedRow* terms, int64_t num_terms, int64_t n);
  float (*scale_and_dot)(void* out, const void* row, const void* y, float w, int64_t n);
};

// The attribute applies to plain functions only, hence the list.
#define SMFREE_KERNELS(As)                                                                    \
  SMFREE_VECTORISED void Sum##As(void* out, const WeightedRow* terms, int64_t num_terms,      \
                                 int64_t n) {                                                 \
    Sum<As>(out, terms, num_terms, n);                                                        \
  }                                                                                           \
  SMFREE_VECTORISED float ScaleAndDot##As(void* out, const void* row, const void* y, float w, \
                                          int64_t n) {                                        \
    return ScaleAndDot<As>(out, row, y, w, n);                                                \
  }                                                                                           \
  constexpr Kernels k##As = {&Sum##As, &ScaleAndDot##As};

SMFREE_KERNELS(AsF32)
SMFREE_KERNELS(AsBF16)
SMFREE_KERNELS(AsF16)

namespace {

const Kernels& KernelsFor(DType dtype) {
  switch (dtype) {
    case DType::kF32: return kAsF32;
    case DType::kBF16: return kAsBF16;
    case DType::kF16: break;
  }
  return kAsF16;
}

}  // namespace

Writes WritesFor(int64_t bytes) {
  // What is left of the last-level cache for one purpose, beside what a program computes with. The
  // C library's idea of the size is off by the number of cores on some machines.
  constexpr int64_t kCacheShare = 8 << 20;
  return bytes > kCacheShare ? Writes::kStreaming : Writes::kCached;
}

#if defined(__SSE2__)

void CopyRow(std::byte* out, const std::byte* row, int64_t bytes, Writes writes) {
  constexpr int64_t kLine = 64;
  // Only whole lines are streamed: a part of one costs a read and a write of memory by itself.
  const int64_t head = std::min<int64_t>(bytes, -reinterpret_cast<intptr_t>(out) & (kLine - 1));
  const int64_t lines = writes == Writes::kStreaming ? (bytes - head) / kLine : 0;
  if (lines == 0) {
    std::memcpy(out, row, static_cast<size_t>(bytes));
    return;
  }
  std::memcpy(out, row, static_cast<size_t>(head));
  const auto* from = reinterpret_cast<const __m128i*>(row + head);
  auto* to = reinterpret_cast<__m128i*>(out + head);
  for (int64_t line = 0; line < lines; ++line, from += 4, to += 4) {
    const __m128i a = _mm_loadu_si128(from), b = _mm_loadu_si128(from + 1);
    const __m128i c = _mm_loadu_si128(from + 2), d = _mm_loadu_si128(from + 3);
    _mm_stream_si128(to, a);
    _mm_stream_si128(to + 1, b);
    _mm_stream_si128(to + 2, c);
    _mm_stream_si128(to + 3, d);
  }
  const int64_t done = head + lines * kLine;
  std::memcpy(out + done, row + done, static_cast<size_t>(bytes - done));
}

void FinishWrites(Writes writes) {
  if (writes == Writes::kStreaming) _mm_sfence();
}

#else

void CopyRow(std::byte* out, const std::byte* row, int64_t bytes, Writes) {
  std::memcpy(out, row, static_cast<size_t>(bytes));
}

void FinishWrites(Writes) {}

#endif

// Never streaming: it reads more than it writes, and what it writes is read again soon.
void SumRows(DType dtype, std::byte* out, const WeightedRow* terms, int64_t num_terms, int64_t n) {
  const int64_t item_bytes = ItemBytes(dtype);
  if (num_terms == 0) {
    std::memset(out, 0, static_cast<size_t>(n * item_bytes));
    return;
  }
  if (num_terms == 1 && terms[0].weight == 1.0f) {  // the same bits, without the detour
    std::memcpy(out, terms[0].row, static_cast<size_t>(n * item_bytes));
    return;
  }
  KernelsFor(dtype).sum(out, terms, num_terms, n);
}

float ScaleRowAndDot(DType dtype, std::byte* out, std::byte* scaled, const std::byte* row,
                     const std::byte* y, float w, int64_t n, Writes writes) {
  const Kernels& kernels = KernelsFor(dtype);
  if (writes == Writes::kCached) return kernels.scale_and_dot(out, row, y, w, n);
  const float product = kernels.scale_and_dot(scaled, row, y, w, n);
  CopyRow(out, scaled, n * ItemBytes(dtype), writes);
  return product;
}

void FillNaN(DType dtype, std::byte* out, int64_t n) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  switch (dtype) {
    case DType::kF32: std::fill_n(reinterpret_cast<float*>(out), n, nan); return;
    case DType::kBF16: std::fill_n(reinterpret_cast<uint16_t*>(out), n, uint16_t{0x7fc0}); return;
    case DType::kF16: std::fill_n(reinterpret_cast<uint16_t*>(out), n, uint16_t{0x7e00}); return;
  }
}

}  // namespace smfree::cpu
