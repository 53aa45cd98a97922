// SPDX-License-Identifier: Apache-2.0
//
// From the operands and results of a custom call to the arrays of its phase. All custom calls begin
// with `token, position -> token`, which the platforms read. A phase's file has for each of its
// custom calls a function from the others, in the order of jax_smfree/_src/primitives.py:
//
//   Operands<...Arrays> ...Operands(buffers...)
//
// Its signature is what the handlers of all platforms are bound to.
#ifndef SMFREE_FFI_OPERANDS_H_
#define SMFREE_FFI_OPERANDS_H_

#include <cstdint>
#include <type_traits>
#include <utility>

#include "csrc/protocol/arrays.h"
#include "ffi/attributes.h"

namespace smfree {

using Rows = ffi::AnyBuffer;  // [*, hidden] in the group's dtype
using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;
template <typename Buffer>
using Out = ffi::Result<Buffer>;

inline const float* OrNull(const Floats& buffer) {
  return buffer.element_count() ? buffer.typed_data() : nullptr;
}
inline float* OrNull(Out<Floats>& buffer) {
  return buffer->element_count() ? buffer->typed_data() : nullptr;
}

template <typename Arrays>
struct Operands {
  int64_t tokens;  // T
  Rows rows;       // for CheckRows
  Arrays arrays;
};

template <typename Buffer>
struct Parameter {};

template <typename Binding, typename Buffer>
auto operator<<(Binding&& binding, Parameter<Buffer>) {
  using Ret = typename ffi::RetBinding<Buffer>::Ret;
  if constexpr (std::is_void_v<Ret>) {
    return std::move(binding).template Arg<Buffer>();
  } else {
    return std::move(binding).template Ret<Ret>();
  }
}

// `binding` and the parameters of an ...Operands function.
template <typename Binding, typename Arrays, typename... Buffers>
auto BindOperands(Binding&& binding, Operands<Arrays> (*)(Buffers...)) {
  return (std::move(binding) << ... << Parameter<Buffers>());
}

}  // namespace smfree

#endif  // SMFREE_FFI_OPERANDS_H_
