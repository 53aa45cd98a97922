// SPDX-License-Identifier: Apache-2.0
//
// The extension module jax_smfree._native: groups, handlers as capsules, and sizes.
#include "ffi/module.h"

#include <nanobind/stl/string.h>

#include <stdexcept>
#include <string>

#include "csrc/protocol/describe.h"
#include "csrc/protocol/layout.h"

namespace smfree {

void ThrowIfFailed(const Status& status) {
  if (!status.ok()) throw std::runtime_error(status.message());
}

DType DTypeOf(const std::string& name) {
  if (name == "float32") return DType::kF32;
  if (name == "bfloat16") return DType::kBF16;
  if (name == "float16") return DType::kF16;
  throw std::invalid_argument("no such dtype: " + name);
}

nb::capsule Handler(XLA_FFI_Error* (*handler)(XLA_FFI_CallFrame*)) {
  return nb::capsule(reinterpret_cast<void*>(handler), "xla._CUSTOM_CALL_TARGET");
}

namespace {

LayoutConfig MakeLayoutConfig(int32_t num_ranks, int32_t ranks_per_node, int32_t num_experts,
                              int32_t top_k, int32_t num_lanes, int32_t itemsize, int64_t hidden,
                              int64_t max_tokens, bool differentiable, bool hierarchical) {
  return {num_ranks, ranks_per_node, num_experts, top_k,          num_lanes,
          itemsize,  hidden,         max_tokens,  differentiable, hierarchical};
}

}  // namespace
}  // namespace smfree

NB_MODULE(_native, m) {
  using namespace smfree;  // NOLINT: the module is this namespace's face
  // The registry and JAX's caches outlive the interpreter's order of destruction.
  nb::set_leak_warnings(false);

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
  m.def("register_call_site", &RegisterCallSite, nb::arg("call_site"), nb::arg("name"));

  nb::class_<LayoutConfig>(m, "LayoutConfig")
      .def(nb::new_(&MakeLayoutConfig), nb::kw_only(), nb::arg("num_ranks"),
           nb::arg("ranks_per_node"), nb::arg("num_experts"), nb::arg("top_k"),
           nb::arg("num_lanes"), nb::arg("itemsize"), nb::arg("hidden"), nb::arg("max_tokens"),
           nb::arg("differentiable"), nb::arg("hierarchical"));
  m.def("rdma_size_hint", &RdmaSizeHint, nb::arg("layout_config"));
  m.def("nvl_size_hint", &NvlSizeHint, nb::arg("layout_config"));
  m.def("max_recv_rows", &MaxRecvRows, nb::arg("num_ranks"), nb::arg("tokens"), nb::arg("top_k"),
        nb::arg("local_experts"), nb::arg("expert_alignment"));
}
