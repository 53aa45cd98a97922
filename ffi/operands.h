// SPDX-License-Identifier: Apache-2.0
//
// From the operands and results of a custom call to the arrays of its phase. All custom calls begin
// with `token, position -> token`, which the platforms read. A phase's file has for each of its
// custom calls a function from the others, in the order of jax_smfree/_src/primitives.py:
//
//   Operands<...Arrays> ...Operands(attributes, buffers...)
//
// Its signature is what the handlers of all platforms are bound to. The leaves of rows come last.
#ifndef SMFREE_FFI_OPERANDS_H_
#define SMFREE_FFI_OPERANDS_H_

#include <cstdint>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>

#include "csrc/protocol/arrays.h"
#include "csrc/protocol/group_config.h"
#include "ffi/attributes.h"

namespace smfree {

using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;
template <typename Buffer>
using Out = ffi::Result<Buffer>;
// Any number of arrays [*, width].
using LeavesIn = ffi::RemainingArgs;
using LeavesOut = ffi::RemainingRets;

inline const float* OrNull(const Floats& buffer) {
  return buffer.element_count() ? buffer.typed_data() : nullptr;
}
inline float* OrNull(Out<Floats>& buffer) {
  return buffer->element_count() ? buffer->typed_data() : nullptr;
}

// The arrays of a phase; `wrong`: why they are none, in which case they are not to be used.
template <typename Arrays>
struct Operands {
  Arrays arrays;
  std::optional<Ints> received;  // [B,K], where the operation has it
  int64_t stride = 0;            // of rows in a message
  std::string wrong;
};

// Rows, how many of them there are in an array, and what is wrong with them.
template <typename Rows>
struct LeavesOf {
  Rows rows;
  int64_t count = 0;
  std::string wrong;
};
// What an operation does with rows; it computes with floats alone.
enum class Use { kCarry, kCompute };
LeavesOf<RowsIn> RowsOf(const Attributes& attributes, const LeavesIn& leaves, Use use);
LeavesOf<RowsOut> RowsOf(const Attributes& attributes, const LeavesOut& leaves, Use use);
// What is wrong with either, or with `in` where it is not rows like `out`.
std::string WrongOfPair(const LeavesOf<RowsIn>& in, const LeavesOf<RowsOut>& out);

// Whether rows fit into the messages of a group, and received rows are numbered as in one.
Status CheckShapes(const GroupConfig& config, int64_t tokens, int64_t stride,
                   const std::optional<Ints>& received, const std::string& wrong);
template <typename Arrays>
Status CheckShapes(const GroupConfig& config, const Attributes& attributes,
                   const Operands<Arrays>& operands) {
  return CheckShapes(config, attributes.tokens, operands.stride, operands.received,
                     operands.wrong);
}

template <typename Buffer>
struct Parameter {};

template <typename Binding, typename Buffer>
auto operator<<(Binding&& binding, Parameter<Buffer>) {
  using Ret = typename ffi::RetBinding<Buffer>::Ret;
  if constexpr (std::is_same_v<Buffer, LeavesIn>) {
    return std::move(binding).RemainingArgs();
  } else if constexpr (std::is_same_v<Buffer, LeavesOut>) {
    return std::move(binding).RemainingRets();
  } else if constexpr (std::is_void_v<Ret>) {
    return std::move(binding).template Arg<Buffer>();
  } else {
    return std::move(binding).template Ret<Ret>();
  }
}

// `binding` and the parameters of an ...Operands function.
template <typename Binding, typename Arrays, typename... Buffers>
auto BindOperands(Binding&& binding, Operands<Arrays> (*)(const Attributes&, Buffers...)) {
  return (std::move(binding) << ... << Parameter<Buffers>());
}

}  // namespace smfree

#endif  // SMFREE_FFI_OPERANDS_H_
