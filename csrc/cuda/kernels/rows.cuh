// SPDX-License-Identifier: Apache-2.0
//
// A warp's work on one leaf of rows that travels as it is. It is read in words: of 16 bytes where
// its rows are multiples of that. Arithmetic is in float32, in a fixed order, without fused
// multiply-add, rounded once: the same bits as on the CPU.
//
// Rows of a message are written while the kernel runs, by another device or the copy engine: they
// are read through L2 (ld.cg), never through the read-only path.
//
// Functions that write several rows, or read them, ask a callable for row i of them.
#ifndef SMFREE_CSRC_CUDA_KERNELS_ROWS_CUH_
#define SMFREE_CSRC_CUDA_KERNELS_ROWS_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "csrc/cuda/kernels/float8.cuh"
#include "csrc/cuda/kernels/phase.cuh"

namespace smfree::cuda {

constexpr int32_t kUnroll = 4;  // words in flight per thread
// Where words are summed, one is, of so many terms at once: float32 sums take the registers.
constexpr int32_t kTermsAtOnce = 4;

__device__ inline float ToFloat(float v) { return v; }
__device__ inline float ToFloat(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline float ToFloat(__half v) { return __half2float(v); }
template <DType kValues>
__device__ float ToFloat(Float8<kValues> v) {
  return FloatsOf<kValues>(v.bits).x;
}
template <typename T>
__device__ T FromFloat(float v) {
  if constexpr (std::is_same_v<T, float>) {
    return v;
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(v);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(v);
  } else {
    return T::Rounded(v);
  }
}

// The elements of a word.
template <typename T, typename Word>
union Elements {
  static constexpr int32_t kCount = sizeof(Word) / sizeof(T);
  Word word;
  T element[kCount];
  __device__ Elements() {}
};

// The words of a leaf's row that this thread works on: of piece `piece` of `pieces`.
struct Words {
  int32_t begin, end;
  __device__ Words(int64_t row_bytes, int32_t word_bytes, int32_t piece, int32_t pieces) {
    // 32 bits suffice: a row has less than 2^31 bytes, and up to kWarps pieces.
    const auto words = static_cast<uint32_t>(row_bytes) / static_cast<uint32_t>(word_bytes);
    const auto at = [&](int32_t p) { return static_cast<int32_t>(words * p / pieces); };
    begin = at(piece) + static_cast<int32_t>(threadIdx.x % kWarp);
    end = at(piece + 1);
  }
  // The same, not cutting a group of `group` words.
  __device__ static Words OfGroups(int32_t words, int32_t group, int32_t piece, int32_t pieces) {
    Words cut(words / group, 1, piece, pieces);
    const auto warp_lane = static_cast<int32_t>(threadIdx.x % kWarp);
    cut.begin = (cut.begin - warp_lane) * group + warp_lane;
    cut.end *= group;
    return cut;
  }
};

// Each row of to(0 … count) = row.
template <typename Word, typename To>
__device__ void CopyRow(const Words& words, const char* row, const To& to, int32_t count) {
  for (int32_t v = words.begin; v < words.end; v += kUnroll * kWarp) {
    Word in[kUnroll];
#pragma unroll
    for (int32_t u = 0; u < kUnroll; ++u) {
      const int32_t at = v + u * kWarp;
      if (at < words.end) in[u] = __ldcg(reinterpret_cast<const Word*>(row) + at);
    }
    for (int32_t i = 0; i < count; ++i) {
#pragma unroll
      for (int32_t u = 0; u < kUnroll; ++u) {
        const int32_t at = v + u * kWarp;
        if (at < words.end) reinterpret_cast<Word*>(to(i))[at] = in[u];
      }
    }
  }
}

// What all bytes of a row become that has nothing, or nothing right, in it.
constexpr uint32_t kZeros = 0;
constexpr uint32_t kNaNs = ~0u;

template <typename Word>
__device__ Word Repeated(uint32_t bytes) {
  if constexpr (sizeof(Word) == 16) {
    return {bytes, bytes, bytes, bytes};
  } else {
    return static_cast<Word>(bytes);
  }
}

template <typename Word>
__device__ void FillRow(const Words& words, char* row, uint32_t bytes) {
  const Word word = Repeated<Word>(bytes);
  for (int32_t v = words.begin; v < words.end; v += kWarp) reinterpret_cast<Word*>(row)[v] = word;
}

// A codec says how a leaf is read and written, here or in quantised.cuh: Load and Store move a
// word, Values and Of tell what it means in float32. This one is of elements T in words Word,
// wherever they stand.
template <typename T, typename Word_>
struct Plain {
  using Element = T;
  using Word = Word_;
  static constexpr int32_t kCount = Elements<T, Word>::kCount;  // elements of a word
  static constexpr bool kByWholeWarp = false;                   // whether Of is

  __device__ static Words Cut(const Leaf& leaf, int32_t piece, int32_t pieces) {
    return Words(leaf.bytes(), sizeof(Word), piece, pieces);
  }
  __device__ static Word Load(const char* row, int32_t at) {
    return __ldcg(reinterpret_cast<const Word*>(row) + at);
  }
  __device__ static void Values(const Word& word, float (&values)[kCount]) {
    Elements<T, Word> in;
    in.word = word;
#pragma unroll
    for (int32_t e = 0; e < kCount; ++e) values[e] = ToFloat(in.element[e]);
  }
  __device__ static Word Of(const float (&values)[kCount]) {
    Elements<T, Word> rounded;
#pragma unroll
    for (int32_t e = 0; e < kCount; ++e) rounded.element[e] = FromFloat<T>(values[e]);
    return rounded.word;
  }
  __device__ static void Store(char* row, int32_t at, const Word& word) {
    reinterpret_cast<Word*>(row)[at] = word;
  }
};

struct Term {
  const char* row;
  float weight;
  int32_t n;  // of the program's arrays, where it is one of their rows
};

// out = sum of weight * row over the terms in their order, and `add`, a row of `Sum`, if it is not
// null; of one term at least, or `add`. The terms are read as `source` says, row_of(term); the sum
// is written as `sink` says.
template <typename Source, typename Sink, typename RowOf>
__device__ void SumRows(const Source& source, const Sink& sink, const Words& words, char* out,
                        const Term* terms, int32_t count, const RowOf& row_of, const char* add) {
  static_assert(Source::kCount == Sink::kCount);
  __builtin_assume(count > 0 || add != nullptr);
  const auto warp_lane = static_cast<int32_t>(threadIdx.x % kWarp);
  const int32_t end = Sink::kByWholeWarp ? words.end + warp_lane : words.end;
  for (int32_t v = words.begin; v < end; v += kWarp) {
    const bool inside = v < words.end;
    float sum[Sink::kCount];
    for (int32_t i = 0; i < count; i += kTermsAtOnce) {
      typename Source::Word in[kTermsAtOnce];
#pragma unroll
      for (int32_t j = 0; j < kTermsAtOnce; ++j) {
        if (i + j >= count) continue;
        const char* const row = row_of(terms[i + j]);
        if (inside) in[j] = source.Load(row, v);
      }
#pragma unroll
      for (int32_t j = 0; j < kTermsAtOnce; ++j) {
        if (i + j >= count) continue;
        const float weight = terms[i + j].weight;
        float values[Sink::kCount];
        source.Values(in[j], values);
#pragma unroll
        for (int32_t e = 0; e < Sink::kCount; ++e) {
          const float term = __fmul_rn(values[e], weight);
          sum[e] = i + j == 0 ? term : __fadd_rn(sum[e], term);
        }
      }
    }
    if (add != nullptr) {
      float values[Sink::kCount];
      if (inside) sink.Values(sink.Load(add, v), values);
#pragma unroll
      for (int32_t e = 0; e < Sink::kCount; ++e) {
        sum[e] = count == 0 ? values[e] : __fadd_rn(sum[e], values[e]);
      }
    }
    const typename Sink::Word rounded = sink.Of(sum);
    if (inside) sink.Store(out, v, rounded);
  }
}

// out = weight * row; adds this thread's part of <y, row> to `dot`. The row is read as `source`
// says, in the dtype of the leaf.
template <typename Source, typename Sink>
__device__ void ScaleRowAndDot(const Source& source, const Sink& sink, const Words& words,
                               char* out, const char* row, const char* y, float weight,
                               float& dot) {
  for (int32_t v = words.begin; v < words.end; v += kWarp) {
    const typename Source::Word in = source.Load(row, v);
    const typename Sink::Word other = sink.Load(y, v);
    float values[Sink::kCount], factors[Sink::kCount];
    source.Values(in, values);
    sink.Values(other, factors);
#pragma unroll
    for (int32_t e = 0; e < Sink::kCount; ++e) {
      if constexpr (!std::is_same_v<Source, Sink>) {
        values[e] = ToFloat(FromFloat<typename Sink::Element>(values[e]));
      }
      dot = __fadd_rn(dot, __fmul_rn(factors[e], values[e]));
      values[e] = __fmul_rn(values[e], weight);
    }
    sink.Store(out, v, sink.Of(values));
  }
}

// The sum over the threads of a warp, to all of them, by a butterfly.
__device__ inline float SumOverWarp(float value) {
  for (int32_t distance = kWarp / 2; distance > 0; distance /= 2) {
    value = __fadd_rn(value, __shfl_xor_sync(~0u, value, distance));
  }
  return value;
}

}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_KERNELS_ROWS_CUH_
