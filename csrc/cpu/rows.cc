// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/rows.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "csrc/cpu/floats.h"

// One version per vector width, chosen when the library is loaded. Not under sanitizers, whose
// runtime is not up yet at that time.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define SMFREE_VECTORISED \
  __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define SMFREE_VECTORISED
#endif
#define SMFREE_INLINE inline __attribute__((always_inline))

namespace smfree::cpu {
namespace {

template <typename T>
SMFREE_INLINE void Scale(float* __restrict sum, const void* row, float w, int64_t n) {
  const T* const x = static_cast<const T*>(row);
  for (int64_t i = 0; i < n; ++i) sum[i] = w * ToFloat(x[i]);
}

template <typename T>
SMFREE_INLINE void Add(float* __restrict sum, const void* row, float w, int64_t n) {
  const T* const x = static_cast<const T*>(row);
  for (int64_t i = 0; i < n; ++i) sum[i] += w * ToFloat(x[i]);
}

template <typename T>
SMFREE_INLINE void Round(void* out, const float* sum, int64_t n) {
  T* const __restrict x = static_cast<T*>(out);
  for (int64_t i = 0; i < n; ++i) x[i] = FromFloat<T>(sum[i]);
}

template <typename T>
SMFREE_INLINE float ScaleAndDot(void* out, const void* row, const void* y, float w, int64_t n) {
  constexpr int64_t kLanes = 32;
  T* const __restrict scaled = static_cast<T*>(out);
  const T* const x = static_cast<const T*>(row);
  const T* const z = static_cast<const T*>(y);
  float sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const float value = ToFloat(x[i + lane]);
      sums[lane] += value * ToFloat(z[i + lane]);
      scaled[i + lane] = FromFloat<T>(w * value);
    }
  }
  for (int64_t lane = 0; i < n; ++i, ++lane) {
    const float value = ToFloat(x[i]);
    sums[lane] += value * ToFloat(z[i]);
    scaled[i] = FromFloat<T>(w * value);
  }
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  return sums[0];
}

}  // namespace

// Attributes apply to plain functions only, hence the list.
#define SMFREE_KERNELS(T)                                                                         \
  SMFREE_VECTORISED void Scale##T(float* sum, const void* row, float w, int64_t n) {              \
    Scale<T>(sum, row, w, n);                                                                     \
  }                                                                                               \
  SMFREE_VECTORISED void Add##T(float* sum, const void* row, float w, int64_t n) {                \
    Add<T>(sum, row, w, n);                                                                       \
  }                                                                                               \
  SMFREE_VECTORISED void Round##T(void* out, const float* sum, int64_t n) { Round<T>(out, sum, n); } \
  SMFREE_VECTORISED float ScaleAndDot##T(void* out, const void* row, const void* y, float w,      \
                                         int64_t n) {                                             \
    return ScaleAndDot<T>(out, row, y, w, n);                                                     \
  }                                                                                               \
  constexpr RowKernels kKernels##T = {&Scale##T, &Add##T, &Round##T, &ScaleAndDot##T};

SMFREE_KERNELS(float)
SMFREE_KERNELS(BFloat16)
SMFREE_KERNELS(Float16)

const RowKernels& KernelsFor(DType dtype) {
  switch (dtype) {
    case DType::kF32: return kKernelsfloat;
    case DType::kBF16: return kKernelsBFloat16;
    case DType::kF16: break;
  }
  return kKernelsFloat16;
}

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
  const RowKernels& kernels = KernelsFor(dtype);
  constexpr int64_t kPiece = 2048;  // the sums stay in the innermost cache
  alignas(64) float sum[kPiece];
  for (int64_t begin = 0; begin < n; begin += kPiece) {
    const int64_t count = std::min(kPiece, n - begin);
    const int64_t offset = begin * item_bytes;
    kernels.scale(sum, terms[0].row + offset, terms[0].weight, count);
    for (int64_t term = 1; term < num_terms; ++term) {
      kernels.add(sum, terms[term].row + offset, terms[term].weight, count);
    }
    kernels.round(out + offset, sum, count);
  }
}

void FillNaN(DType dtype, std::byte* out, int64_t n) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  switch (dtype) {
    case DType::kF32: return std::fill_n(reinterpret_cast<float*>(out), n, nan), void();
    case DType::kBF16:
      return std::fill_n(reinterpret_cast<BFloat16*>(out), n, FromFloat<BFloat16>(nan)), void();
    case DType::kF16:
      return std::fill_n(reinterpret_cast<Float16*>(out), n, FromFloat<Float16>(nan)), void();
  }
}

}  // namespace smfree::cpu
