// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/rows/rows.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "csrc/cpu/rows/elements.h"

namespace smfree::cpu {
namespace {

// sums = [sums +] weight * row
template <typename As>
SMFREE_INLINE void Add(float* __restrict sums, const void* __restrict row, float weight, bool first,
                       int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float term = As::Load(ElementsOf<As>(row) + i) * weight;
    sums[i] = first ? term : sums[i] + term;
  }
}

template <typename As>
SMFREE_INLINE void Round(void* __restrict out, const float* __restrict sums, int64_t n) {
  auto* const row = static_cast<typename As::Element*>(out);
  for (int64_t i = 0; i < n; ++i) As::Store(row + i, sums[i]);
}

}  // namespace

// Functions over n elements.
struct Kernels {
  int64_t item_bytes;
  void (*add)(float* sums, const void* row, float weight, bool first, int64_t n);
  void (*round)(void* out, const float* sums, int64_t n);
};

// The attribute applies to plain functions only, hence the list.
#define SMFREE_KERNELS(As)                                                               \
  SMFREE_VECTORISED void Add##As(float* sums, const void* row, float weight, bool first, \
                                 int64_t n) {                                            \
    first ? Add<As>(sums, row, weight, true, n) : Add<As>(sums, row, weight, false, n);  \
  }                                                                                      \
  SMFREE_VECTORISED void Round##As(void* out, const float* sums, int64_t n) {            \
    Round<As>(out, sums, n);                                                             \
  }                                                                                      \
  constexpr Kernels k##As = {sizeof(As::Element), &Add##As, &Round##As};

SMFREE_KERNELS(AsF32)
SMFREE_KERNELS(AsBF16)
SMFREE_KERNELS(AsF16)
SMFREE_KERNELS(AsE4M3)
SMFREE_KERNELS(AsE5M2)

namespace {

const Kernels& KernelsFor(DType dtype) {
  switch (dtype) {
    case DType::kF32: return kAsF32;
    case DType::kBF16: return kAsBF16;
    case DType::kF16: return kAsF16;
    case DType::kE4M3: return kAsE4M3;
    case DType::kE5M2: return kAsE5M2;
    case DType::kOther: break;
  }
  std::abort();  // nothing computes with such elements
}

// Elements that are computed with at a time: their floats stay in the nearest cache.
constexpr int64_t kBlock = 512;
// Partial sums of a product of rows.
constexpr int64_t kProducts = 16;
static_assert(kBlock % kProducts == 0, "blocks begin with the first of the products");

}  // namespace

// products += x * y, by index mod kProducts; and x *= w.
SMFREE_VECTORISED void DotAndScale(float* __restrict products, float* __restrict x,
                                   const float* __restrict y, float w, int64_t n) {
  int64_t i = 0;
  for (; i + kProducts <= n; i += kProducts) {
    for (int64_t p = 0; p < kProducts; ++p) products[p] += x[i + p] * y[i + p];
  }
  for (int64_t p = 0; i + p < n; ++p) products[p] += x[i + p] * y[i + p];
  for (i = 0; i < n; ++i) x[i] *= w;
}

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
  const Kernels& kernels = KernelsFor(dtype);
  const auto bytes = static_cast<size_t>(n * kernels.item_bytes);
  if (num_terms == 0) {
    std::memset(out, 0, bytes);
  } else if (num_terms == 1 && terms[0].weight == 1.0f) {  // the same bits, without the detour
    std::memcpy(out, terms[0].row, bytes);
  } else {
    float sums[kBlock];
    for (int64_t begin = 0; begin < n; begin += kBlock) {
      const int64_t count = std::min(kBlock, n - begin);
      const int64_t offset = begin * kernels.item_bytes;
      for (int64_t term = 0; term < num_terms; ++term) {
        kernels.add(sums, terms[term].row + offset, terms[term].weight, term == 0, count);
      }
      kernels.round(out + offset, sums, count);
    }
  }
}

void AddRow(DType dtype, float* sums, const WeightedRow& term, bool first, int64_t n) {
  KernelsFor(dtype).add(sums, term.row, term.weight, first, n);
}

void RoundRow(DType dtype, std::byte* out, const float* sums, int64_t n) {
  KernelsFor(dtype).round(out, sums, n);
}

float ScaleRowAndDot(DType dtype, std::byte* out, std::byte* scaled, const std::byte* row,
                     const std::byte* y, float w, int64_t n, Writes writes) {
  const Kernels& kernels = KernelsFor(dtype);
  std::byte* const to = writes == Writes::kCached ? out : scaled;
  float products[kProducts] = {};
  float wide_row[kBlock], wide_y[kBlock];
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t count = std::min(kBlock, n - begin);
    const int64_t offset = begin * kernels.item_bytes;
    kernels.add(wide_row, row + offset, 1.0f, /*first=*/true, count);
    kernels.add(wide_y, y + offset, 1.0f, /*first=*/true, count);
    DotAndScale(products, wide_row, wide_y, w, count);
    kernels.round(to + offset, wide_row, count);
  }
  if (to != out) CopyRow(out, scaled, n * kernels.item_bytes, writes);
  for (int64_t half = kProducts / 2; half > 0; half /= 2) {
    for (int64_t p = 0; p < half; ++p) products[p] += products[p + half];
  }
  return products[0];
}

}  // namespace smfree::cpu
