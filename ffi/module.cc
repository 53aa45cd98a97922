// SPDX-License-Identifier: Apache-2.0
//
// The extension module jax_smfree._native: groups, handlers as capsules, and sizes.
#include "ffi/module.h"

#include <nanobind/stl/string.h>

#include <stdexcept>
#include <string>

#include "csrc/core/describe.h"
#include "csrc/core/patience.h"
#include "csrc/protocol/group_config.h"
#include "csrc/protocol/layout.h"

namespace smfree {

void ThrowIfFailed(const Status& status) {
  if (!status.ok()) throw std::runtime_error(status.message());
}

std::optional<std::string> FaultOf(const Status& status) {
  if (status.ok()) return std::nullopt;
  return status.message();
}

nb::capsule Handler(XLA_FFI_Error* (*handler)(XLA_FFI_CallFrame*)) {
  return nb::capsule(reinterpret_cast<void*>(handler), "xla._CUSTOM_CALL_TARGET");
}

namespace {

void BindGroupConfig(nb::module_& m) {
  nb::class_<GroupConfig>(m, "GroupConfig")
      .def(nb::init<>())
      .def_rw("num_ranks", &GroupConfig::num_ranks)
      .def_rw("ranks_per_node", &GroupConfig::ranks_per_node)
      .def_rw("hierarchical", &GroupConfig::hierarchical)
      .def_rw("num_experts", &GroupConfig::num_experts)
      .def_rw("top_k", &GroupConfig::top_k)
      .def_rw("row_bytes", &GroupConfig::row_bytes)
      .def_rw("max_tokens", &GroupConfig::max_tokens)
      .def_rw("recv_capacity", &GroupConfig::recv_capacity)
      .def_rw("wire_capacity", &GroupConfig::wire_capacity)
      .def_rw("padded_groups", &GroupConfig::padded_groups)
      .def_rw("expert_alignment", &GroupConfig::expert_alignment)
      .def_rw("num_lanes", &GroupConfig::num_lanes)
      .def_rw("num_sets", &GroupConfig::num_sets)
      .def_prop_rw(
          "drop_overflow",
          [](const GroupConfig& config) { return config.overflow == Overflow::kDrop; },
          [](GroupConfig& config, bool drop) {
            config.overflow = drop ? Overflow::kDrop : Overflow::kError;
          })
      .def_rw("differentiable", &GroupConfig::differentiable)
      .def_rw("timeout_s", &GroupConfig::timeout_s)
      .def_rw("sm_push_bytes", &GroupConfig::sm_push_bytes)
      .def_rw("puts_on_device", &GroupConfig::puts_on_device);
}

}  // namespace
}  // namespace smfree

NB_MODULE(_native, m) {
  using namespace smfree;  // NOLINT: the module is this namespace's face
  // The registry and JAX's caches outlive the interpreter's order of destruction.
  nb::set_leak_warnings(false);

  BindGroupConfig(m);
  BindCpu(m);
  m.def("cpu_targets", &CpuTargets);
  m.def("cpu_types", &CpuTypes);
#ifdef SMFREE_CUDA
  m.attr("has_cuda") = true;
  BindCuda(m);
  m.def("cuda_targets", &CudaTargets);
#else
  m.attr("has_cuda") = false;
#endif
  m.attr("MAX_TIMEOUT_S") = kMaxTimeoutS;
  m.attr("MAX_LEAVES") = kMaxLeaves;
  m.attr("ROW_ALIGNMENT") = kRowAlignment;
  m.attr("LEAST_MAGNITUDE") = kLeastMagnitude;
  m.attr("MAKE_SECONDS") = kMakeSeconds;
  m.def("register_call_site", &RegisterCallSite, nb::arg("call_site"), nb::arg("name"));

  m.def("rdma_size_hint", &RdmaSizeHint, nb::arg("config"));
  m.def("nvl_size_hint", &NvlSizeHint, nb::arg("config"));
  m.def("rows_capacity", &RowsCapacity, nb::arg("config"), nb::arg("tokens"));
  m.def("wire_rows", &WireRows, nb::arg("config"), nb::arg("tokens"));
}
