// SPDX-License-Identifier: Apache-2.0
//
// The kinds of rows that kernels are made for, and what a warp does with a row of each. All kinds
// have the same functions, so that a kernel is a template over them:
//
//   PlainRows<T>      one leaf that travels as it is, in words of 16 bytes
//   QuantisedRows<T>  one leaf that is quantised on the wire
//   MixedRows         any other: several leaves, floats of 8 bits, integers, any width
//
// A row is cut into op.pieces, each for one warp. Arrays of the program are given with the number
// of a row, rows of messages by where they begin.
#ifndef SMFREE_CSRC_CUDA_KERNELS_ROW_KINDS_CUH_
#define SMFREE_CSRC_CUDA_KERNELS_ROW_KINDS_CUH_

#include <cstdint>
#include <type_traits>

#include "csrc/cuda/kernels/quantised.cuh"
#include "csrc/cuda/kernels/rows.cuh"

namespace smfree::cuda {

// A row of a message, as bytes.
__device__ inline void CopyMessageRow(const OperationParams& op, int32_t piece, const char* row,
                                      char* const* to, int32_t count) {
  CopyRow<uint4>(Words(op.stride, sizeof(uint4), piece, op.pieces), row,
                 [&](int32_t i) { return to[i]; }, count);
}
__device__ inline void FillMessageRow(const OperationParams& op, int32_t piece, char* row,
                                      uint32_t bytes) {
  FillRow<uint4>(Words(op.stride, sizeof(uint4), piece, op.pieces), row, bytes);
}

// What all kinds with one leaf share: the leaf's row is the row, in messages too.
struct OneLeaf {
  template <typename Pointer>
  __device__ static auto Row(const OperationParams& op, const RowArrays<Pointer*>& x, int32_t n) {
    using Byte = std::conditional_t<std::is_const_v<Pointer>, const char, char>;
    return static_cast<Byte*>(x.leaves[0]) + n * op.row_bytes;
  }
  // One of the terms of SumToMessage.
  __device__ static Term TermOf(const OperationParams& op, const RowsIn& y, int32_t n,
                                float weight) {
    return {Row(op, y, n), weight, n};
  }
  __device__ static void FindTargets(const OperationParams& op, const RowsOut& x,
                                     const int32_t* copies, char** targets, int32_t count) {
    const auto warp_lane = static_cast<int32_t>(threadIdx.x % kWarp);
    if (warp_lane < count) targets[warp_lane] = Row(op, x, copies[warp_lane]);
    __syncwarp();
  }
  __device__ static void Fill(const OperationParams& op, int32_t piece, int32_t pieces,
                              const RowsOut& x, int32_t n, uint32_t bytes) {
    FillRow<uint4>(Words(op.row_bytes, sizeof(uint4), piece, pieces), Row(op, x, n), bytes);
  }
};

template <typename T>
struct PlainRows : OneLeaf {
  using Codec = Plain<T, uint4>;
  __device__ static Words Cut(const OperationParams& op, int32_t piece) {
    return Words(op.row_bytes, sizeof(uint4), piece, op.pieces);
  }

  // Row t of x to the messages at to[0 … count).
  __device__ static void Pack(const OperationParams& op, int32_t piece, const RowsIn& x, int32_t t,
                              char* const* to, int32_t count) {
    CopyRow<uint4>(Cut(op, piece), Row(op, x, t), [&](int32_t i) { return to[i]; }, count);
  }
  // A row of a message to rows copies[0 … count) of x. There is room for so many targets.
  __device__ static void Unpack(const OperationParams& op, int32_t piece, const char* row,
                                const RowsOut& x, const int32_t* copies, char** targets,
                                int32_t count) {
    FindTargets(op, x, copies, targets, count);
    CopyRow<uint4>(Cut(op, piece), row, [&](int32_t i) { return targets[i]; }, count);
  }
  // Row n of x = weight * the row of a message; this thread's part of its inner product with row n
  // of y. By one warp.
  __device__ static float UnpackWeighted(const OperationParams& op, const char* row,
                                         const RowsIn& y, float weight, const RowsOut& x,
                                         int32_t n) {
    float dot = 0.0f;
    ScaleRowAndDot(Codec{}, Codec{}, Cut(op, 0), Row(op, x, n), row, Row(op, y, n), weight, dot);
    return dot;
  }
  // The row of a message = the sum of terms, at least one, that are rows of the program.
  __device__ static void SumToMessage(const OperationParams& op, int32_t piece, const RowsIn&,
                                      const Term* terms, int32_t count, char* out) {
    SumMessages(op, piece, {}, terms, count, out);
  }
  // The same of terms that are rows of messages.
  __device__ static void SumMessages(const OperationParams& op, int32_t piece, const RowFormat&,
                                     const Term* terms, int32_t count, char* out) {
    SumRows(Codec{}, Codec{}, Cut(op, piece), out, terms, count,
            [](const Term& term) { return term.row; }, nullptr);
  }
  // Row t of out = the sum of such terms, and row t of `add`, if it has leaves; of one of these at
  // least. There is room for one more term.
  __device__ static void SumToProgram(const OperationParams& op, int32_t piece, const RowsIn& add,
                                      const RowsOut& out, int32_t t, Term* terms, int32_t count) {
    if (add.format.count > 0) {
      if (threadIdx.x % kWarp == 0) terms[count] = TermOf(op, add, t, 1.0f);
      __syncwarp();
      ++count;
    }
    SumRows(Codec{}, Codec{}, Cut(op, piece), Row(op, out, t), terms, count,
            [](const Term& term) { return term.row; }, nullptr);
  }
};

// visit(codec) for the quantised leaf.
template <typename T, typename Visit>
__device__ void VisitQuantised(const Leaf& leaf, const Quantisation& quantisation,
                               const Visit& visit) {
  if (quantisation.values == DType::kE4M3) {
    visit(Quantised<T, DType::kE4M3>(leaf, quantisation));
  } else {
    visit(Quantised<T, DType::kE5M2>(leaf, quantisation));
  }
}

template <typename T>
struct QuantisedRows : OneLeaf {
  using InProgram = Plain<T, uint4>;
  template <typename Visit>
  __device__ static void VisitLeaf(const OperationParams& op, int32_t piece,
                                   const RowFormat& format, const Visit& visit) {
    VisitQuantised<T>(format.leaves[0], format.quantisation, [&](const auto& codec) {
      visit(codec, codec.Cut(format.leaves[0], piece, op.pieces));
    });
  }

  __device__ static void Pack(const OperationParams& op, int32_t piece, const RowsIn& x, int32_t t,
                              char* const* to, int32_t count) {
    VisitLeaf(op, piece, x.format, [&](const auto& codec, const Words& words) {
      QuantiseRow(codec, words, Row(op, x, t), [&](int32_t i) { return to[i]; }, count);
    });
  }
  __device__ static void Unpack(const OperationParams& op, int32_t piece, const char* row,
                                const RowsOut& x, const int32_t* copies, char** targets,
                                int32_t count) {
    FindTargets(op, x, copies, targets, count);
    VisitLeaf(op, piece, x.format, [&](const auto& codec, const Words& words) {
      DequantiseRow(codec, words, row, [&](int32_t i) { return targets[i]; }, count);
    });
  }
  __device__ static float UnpackWeighted(const OperationParams& op, const char* row,
                                         const RowsIn& y, float weight, const RowsOut& x,
                                         int32_t n) {
    float dot = 0.0f;
    VisitLeaf(op, 0, x.format, [&](const auto& codec, const Words& words) {
      ScaleRowAndDot(codec, InProgram{}, words, Row(op, x, n), row, Row(op, y, n), weight, dot);
    });
    return dot;
  }
  __device__ static void SumToMessage(const OperationParams& op, int32_t piece, const RowsIn& y,
                                      const Term* terms, int32_t count, char* out) {
    VisitLeaf(op, piece, y.format, [&](const auto& codec, const Words& words) {
      SumRows(InProgram{}, codec, words, out, terms, count,
              [](const Term& term) { return term.row; }, nullptr);
    });
  }
  __device__ static void SumMessages(const OperationParams& op, int32_t piece,
                                     const RowFormat& format, const Term* terms, int32_t count,
                                     char* out) {
    VisitLeaf(op, piece, format, [&](const auto& codec, const Words& words) {
      SumRows(codec, codec, words, out, terms, count, [](const Term& term) { return term.row; },
              nullptr);
    });
  }
  __device__ static void SumToProgram(const OperationParams& op, int32_t piece, const RowsIn& add,
                                      const RowsOut& out, int32_t t, Term* terms, int32_t count) {
    const char* const added = add.format.count > 0 ? Row(op, add, t) : nullptr;
    VisitLeaf(op, piece, out.format, [&](const auto& codec, const Words& words) {
      SumRows(codec, InProgram{}, words, Row(op, out, t), terms, count,
              [](const Term& term) { return term.row; }, added);
    });
  }
};

// Calls `work`, which has all it needs by value. Not inlined: a kernel that has a case for every
// dtype would keep too much in registers.
template <typename Work>
__device__ __noinline__ auto Apart(const Work work) {
  return work();
}

struct MixedRows {
  // visit(word) with the widest word that the rows of a leaf are multiples of.
  template <typename Visit>
  __device__ static void VisitWord(int64_t row_bytes, const Visit& visit) {
    if (row_bytes % 16 == 0) return visit(uint4{});
    if (row_bytes % 4 == 0) return visit(uint32_t{});
    return row_bytes % 2 == 0 ? visit(uint16_t{}) : visit(uint8_t{});
  }
  template <typename Visit>
  __device__ static void VisitQuantisedLeaf(const Leaf& leaf, const Quantisation& quantisation,
                                            const Visit& visit) {
    switch (leaf.dtype) {
      case DType::kF32: return VisitQuantised<float>(leaf, quantisation, visit);
      case DType::kBF16: return VisitQuantised<__nv_bfloat16>(leaf, quantisation, visit);
      default: return VisitQuantised<__half>(leaf, quantisation, visit);
    }
  }
  // visit(codec) for a leaf of floats that travels as it is.
  template <typename Visit>
  __device__ static void VisitPlainLeaf(const Leaf& leaf, const Visit& visit) {
    const bool wide = leaf.bytes() % 16 == 0;
    switch (leaf.dtype) {
      case DType::kF32:
        return wide ? visit(Plain<float, uint4>{}) : visit(Plain<float, uint32_t>{});
      case DType::kBF16:
        return wide ? visit(Plain<__nv_bfloat16, uint4>{})
                    : visit(Plain<__nv_bfloat16, uint16_t>{});
      case DType::kF16:
        return wide ? visit(Plain<__half, uint4>{}) : visit(Plain<__half, uint16_t>{});
      case DType::kE4M3:
        return wide ? visit(Plain<Float8<DType::kE4M3>, uint2>{})
                    : visit(Plain<Float8<DType::kE4M3>, uint8_t>{});
      case DType::kE5M2:
        return wide ? visit(Plain<Float8<DType::kE5M2>, uint2>{})
                    : visit(Plain<Float8<DType::kE5M2>, uint8_t>{});
      case DType::kOther: return;  // is never computed with
    }
  }
  // visit(leaf number, in messages, in the program) with the codecs of each leaf.
  template <typename Visit>
  __device__ static void ForEachLeaf(const RowFormat& format, const Visit& visit) {
    for (int32_t l = 0; l < format.count; ++l) {
      const Leaf& leaf = format.leaves[l];
      if (leaf.quantised) {
        VisitQuantisedLeaf(leaf, format.quantisation, [&](const auto codec) {
          visit(l, codec, typename std::decay_t<decltype(codec)>::InProgram{});
        });
      } else {
        VisitPlainLeaf(leaf, [&](const auto codec) { visit(l, codec, codec); });
      }
    }
  }

  // Row n of a leaf, for n that are known later.
  template <typename Byte>
  struct LeafRows {
    Byte* rows;
    int64_t row_bytes;
    __device__ Byte* operator()(int32_t n) const { return rows + n * row_bytes; }
  };
  __device__ static LeafRows<const char> RowsOf(const RowsIn& x, int32_t l) {
    return {static_cast<const char*>(x.leaves[l]), x.format.leaves[l].bytes()};
  }
  __device__ static LeafRows<char> RowsOf(const RowsOut& x, int32_t l) {
    return {static_cast<char*>(x.leaves[l]), x.format.leaves[l].bytes()};
  }

  __device__ static Term TermOf(const OperationParams&, const RowsIn&, int32_t n, float weight) {
    return {nullptr, weight, n};
  }
  __device__ static void Fill(const OperationParams&, int32_t piece, int32_t pieces,
                              const RowsOut& x, int32_t n, uint32_t bytes) {
    for (int32_t l = 0; l < x.format.count; ++l) {
      const auto rows = RowsOf(x, l);
      VisitWord(rows.row_bytes, [&](auto word) {
        FillRow<decltype(word)>(Words(rows.row_bytes, sizeof(word), piece, pieces), rows(n),
                                bytes);
      });
    }
  }

  __device__ static void Pack(const OperationParams& op, int32_t piece, const RowsIn& x, int32_t t,
                              char* const* to, int32_t count) {
    for (int32_t l = 0; l < x.format.count; ++l) {
      const Leaf& leaf = x.format.leaves[l];
      const char* const from = RowsOf(x, l)(t);
      const auto to_row = [to, offset = leaf.offset](int32_t i) { return to[i] + offset; };
      if (leaf.quantised) {
        VisitQuantisedLeaf(leaf, x.format.quantisation, [&](const auto codec) {
          const Words words = codec.Cut(leaf, piece, op.pieces);
          Apart([=] { QuantiseRow(codec, words, from, to_row, count); });
        });
      } else {
        VisitWord(leaf.bytes(), [&](auto word) {
          CopyRow<decltype(word)>(Words(leaf.bytes(), sizeof(word), piece, op.pieces), from,
                                  to_row, count);
        });
      }
    }
  }
  __device__ static void Unpack(const OperationParams& op, int32_t piece, const char* row,
                                const RowsOut& x, const int32_t* copies, char** targets,
                                int32_t count) {
    const auto warp_lane = static_cast<int32_t>(threadIdx.x % kWarp);
    for (int32_t l = 0; l < x.format.count; ++l) {
      const Leaf& leaf = x.format.leaves[l];
      const char* const from = row + leaf.offset;
      __syncwarp();
      if (warp_lane < count) targets[warp_lane] = RowsOf(x, l)(copies[warp_lane]);
      __syncwarp();
      const auto to_row = [targets](int32_t i) { return targets[i]; };
      if (leaf.quantised) {
        VisitQuantisedLeaf(leaf, x.format.quantisation, [&](const auto codec) {
          const Words words = codec.Cut(leaf, piece, op.pieces);
          Apart([=] { DequantiseRow(codec, words, from, to_row, count); });
        });
      } else {
        VisitWord(leaf.bytes(), [&](auto word) {
          CopyRow<decltype(word)>(Words(leaf.bytes(), sizeof(word), piece, op.pieces), from,
                                  to_row, count);
        });
      }
    }
  }
  __device__ static float UnpackWeighted(const OperationParams& op, const char* row,
                                         const RowsIn& y, float weight, const RowsOut& x,
                                         int32_t n) {
    float dot = 0.0f;
    ForEachLeaf(x.format, [&](int32_t l, const auto in_message, const auto in_program) {
      const Words words = in_message.Cut(x.format.leaves[l], 0, op.pieces);
      char* const out = RowsOf(x, l)(n);
      const char* const factors = RowsOf(y, l)(n);
      const char* const from = row + x.format.leaves[l].offset;
      dot = Apart([=] {
        float sum = dot;
        ScaleRowAndDot(in_message, in_program, words, out, from, factors, weight, sum);
        return sum;
      });
    });
    return dot;
  }
  __device__ static void SumToMessage(const OperationParams& op, int32_t piece, const RowsIn& y,
                                      const Term* terms, int32_t count, char* out) {
    ForEachLeaf(y.format, [&](int32_t l, const auto in_message, const auto in_program) {
      const Words words = in_message.Cut(y.format.leaves[l], piece, op.pieces);
      char* const to = out + y.format.leaves[l].offset;
      const auto rows = RowsOf(y, l);
      Apart([=] {
        SumRows(in_program, in_message, words, to, terms, count,
                [=](const Term& term) { return rows(term.n); }, nullptr);
      });
    });
  }
  __device__ static void SumMessages(const OperationParams& op, int32_t piece,
                                     const RowFormat& format, const Term* terms, int32_t count,
                                     char* out) {
    ForEachLeaf(format, [&](int32_t l, const auto in_message, const auto) {
      const Words words = in_message.Cut(format.leaves[l], piece, op.pieces);
      const int32_t offset = format.leaves[l].offset;
      Apart([=] {
        SumRows(in_message, in_message, words, out + offset, terms, count,
                [=](const Term& term) { return term.row + offset; }, nullptr);
      });
    });
  }
  __device__ static void SumToProgram(const OperationParams& op, int32_t piece, const RowsIn& add,
                                      const RowsOut& out, int32_t t, const Term* terms,
                                      int32_t count) {
    ForEachLeaf(out.format, [&](int32_t l, const auto in_message, const auto in_program) {
      const Words words = in_message.Cut(out.format.leaves[l], piece, op.pieces);
      const int32_t offset = out.format.leaves[l].offset;
      char* const to = RowsOf(out, l)(t);
      const char* const added = add.format.count > 0 ? RowsOf(add, l)(t) : nullptr;
      Apart([=] {
        SumRows(in_message, in_program, words, to, terms, count,
                [=](const Term& term) { return term.row + offset; }, added);
      });
    });
  }
};

// pick(kind) returns a kernel; this, the one for rows of a format. It copies plain rows, of
// whatever dtype.
template <typename Pick>
auto CopyKernelFor(const RowFormat& format, const Pick& pick) {
  const Leaf& leaf = format.leaves[0];
  const bool one = format.count == 1;
  if (one && !leaf.quantised && leaf.bytes() % 16 == 0) return pick(PlainRows<float>{});
  if (one && leaf.quantised && leaf.dtype == DType::kF32) return pick(QuantisedRows<float>{});
  if (one && leaf.quantised && leaf.dtype == DType::kBF16) {
    return pick(QuantisedRows<__nv_bfloat16>{});
  }
  return one && leaf.quantised ? pick(QuantisedRows<__half>{}) : pick(MixedRows{});
}

// The same of kernels that compute with plain rows.
template <typename Pick>
auto KernelFor(const RowFormat& format, const Pick& pick) {
  const Leaf& leaf = format.leaves[0];
  const bool plain = format.count == 1 && !leaf.quantised && leaf.bytes() % 16 == 0;
  if (plain && leaf.dtype == DType::kBF16) return pick(PlainRows<__nv_bfloat16>{});
  if (plain && leaf.dtype == DType::kF16) return pick(PlainRows<__half>{});
  return plain && leaf.dtype != DType::kF32 ? pick(MixedRows{}) : CopyKernelFor(format, pick);
}

// All kernels that these can return.
template <typename Pick>
cudaError_t LoadCopyKernelsFor(const Pick& pick, size_t dynamic_shared_bytes = 0) {
  const auto kernel = [&](auto rows) { return Kernel(pick(rows), dynamic_shared_bytes); };
  return LoadKernels({kernel(PlainRows<float>{}), kernel(QuantisedRows<float>{}),
                      kernel(QuantisedRows<__nv_bfloat16>{}), kernel(QuantisedRows<__half>{}),
                      kernel(MixedRows{})});
}
template <typename Pick>
cudaError_t LoadKernelsFor(const Pick& pick) {
  const cudaError_t error = LoadCopyKernelsFor(pick);
  if (error != cudaSuccess) return error;
  return LoadKernels({Kernel(pick(PlainRows<__nv_bfloat16>{})), Kernel(pick(PlainRows<__half>{}))});
}

}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_KERNELS_ROW_KINDS_CUH_
