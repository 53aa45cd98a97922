// SPDX-License-Identifier: Apache-2.0
//
// The extension module jax_smfree._native: groups, handlers as capsules, and sizes.
#include "ffi/module.h"

#include <nanobind/stl/string.h>

#include <stdexcept>
#include <string>

#include "csrc/protocol/describe.h"
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

DType DTypeOf(const std::string& name) {
  if (name == "float32") return DType::kF32;
  if (name == "bfloat16") return DType::kBF16;
  if (name == "float16") return DType::kF16;
  throw std::invalid_argument("no such dtype: " + name);
}

GroupConfig MakeGroupConfig(int32_t num_ranks, int32_t ranks_per_node, bool hierarchical,
                            int32_t num_experts, int32_t top_k, int64_t hidden, int64_t max_tokens,
                            const std::string& dtype, int64_t recv_capacity,
                            int32_t expert_alignment, int32_t num_lanes, bool drop_overflow,
                            bool differentiable, double timeout_s) {
  GroupConfig config;
  config.num_ranks = num_ranks;
  config.ranks_per_node = ranks_per_node;
  config.hierarchical = hierarchical;
  config.num_experts = num_experts;
  config.top_k = top_k;
  config.num_lanes = num_lanes;
  config.expert_alignment = expert_alignment;
  config.hidden = hidden;
  config.max_tokens = max_tokens;
  config.recv_capacity = recv_capacity;
  config.dtype = DTypeOf(dtype);
  config.overflow = drop_overflow ? Overflow::kDrop : Overflow::kError;
  config.differentiable = differentiable;
  config.timeout_s = timeout_s;
  return config;
}

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

  nb::class_<GroupConfig>(m, "GroupConfig")
      .def(nb::new_(&MakeGroupConfig), nb::kw_only(), nb::arg("num_ranks"),
           nb::arg("ranks_per_node"), nb::arg("hierarchical"), nb::arg("num_experts"),
           nb::arg("top_k"), nb::arg("hidden"), nb::arg("max_tokens"), nb::arg("dtype"),
           nb::arg("recv_capacity"), nb::arg("expert_alignment"), nb::arg("num_lanes"),
           nb::arg("drop_overflow"), nb::arg("differentiable"), nb::arg("timeout_s"));
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
