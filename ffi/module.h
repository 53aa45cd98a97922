// SPDX-License-Identifier: Apache-2.0
//
// The parts of the extension module, one per platform, and what they share.
#ifndef SMFREE_FFI_MODULE_H_
#define SMFREE_FFI_MODULE_H_

#include <nanobind/nanobind.h>

#include <cstdint>
#include <optional>
#include <string>

#include "csrc/core/stats.h"
#include "csrc/core/status.h"
#include "xla/ffi/api/ffi.h"

namespace smfree {

namespace nb = nanobind;

void ThrowIfFailed(const Status& status);
// None, or what is wrong.
std::optional<std::string> FaultOf(const Status& status);
nb::capsule Handler(XLA_FFI_Error* (*handler)(XLA_FFI_CallFrame*));

void BindCpu(nb::module_& m);
void BindCuda(nb::module_& m);

// By the name of the custom call: a handler, or a dict of them by stage.
nb::dict CpuTargets();
nb::dict CudaTargets();
// By name: the pair (type id, type info) of the state that sends keep.
nb::dict CpuTypes();

}  // namespace smfree

#endif  // SMFREE_FFI_MODULE_H_
