// SPDX-License-Identifier: Apache-2.0
//
// The CUDA part of the extension module: groups.
#include "ffi/module.h"

#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "csrc/cuda/backend.h"

namespace smfree {
namespace {

using cuda::Group;

std::shared_ptr<Group> NewGroup(int64_t group_id, const std::vector<int32_t>& devices,
                                int32_t num_experts, int32_t top_k, int64_t hidden,
                                int64_t max_tokens, const std::string& dtype,
                                int64_t recv_capacity, int32_t expert_alignment, int32_t num_lanes,
                                bool drop_overflow, double timeout_s, bool differentiable,
                                int64_t sm_push_bytes) {
  cuda::GroupOptions options;
  options.num_ranks = static_cast<int32_t>(devices.size());
  options.num_experts = num_experts;
  options.top_k = top_k;
  options.num_lanes = num_lanes;
  options.expert_alignment = expert_alignment;
  options.hidden = hidden;
  options.max_tokens = max_tokens;
  options.recv_capacity = recv_capacity;
  options.dtype = DTypeOf(dtype);
  options.overflow = drop_overflow ? Overflow::kDrop : Overflow::kError;
  options.timeout_s = timeout_s;
  options.differentiable = differentiable;
  options.sm_push_bytes = sm_push_bytes;
  auto group = Group::Create(group_id, options, devices);
  ThrowIfFailed(group.status());
  return group.value();
}

Counters StatsOf(const Group& group) {
  const cuda::Stats stats = group.stats();
  Counters counters{{"rows_dropped", stats.rows_dropped}};
  for (int32_t phase = 0; phase < cuda::kPhases; ++phase) {
    const std::string name = cuda::Name(static_cast<cuda::Phase>(phase));
    counters[name + "_calls"] = stats.phases[phase].calls;
    counters[name + "_rows"] = stats.phases[phase].rows;
    counters[name + "_bytes"] = stats.phases[phase].bytes;
  }
  for (const auto phase : {cuda::Phase::kDispatchRecv, cuda::Phase::kCombineRecv}) {
    counters[std::string(cuda::Name(phase)) + "_wait_ns"] =
        stats.phases[static_cast<int32_t>(phase)].wait_ns;
  }
  return counters;
}

Counters MemoryOf(const Group& group) {
  const cuda::Memory memory = group.memory();
  return {{"device_bytes", memory.device_bytes},
          {"scratch_bytes", memory.scratch_bytes},
          {"pinned_bytes", memory.pinned_bytes}};
}

nb::list TraceOf(const Group& group) {
  nb::list trace;
  for (const cuda::PhaseRecord& record : group.Trace()) {
    nb::dict entry;
    entry["rank"] = record.rank;
    entry["lane"] = record.lane;
    entry["mirrored"] = record.side == Side::kMirrored;
    entry["replay"] = record.side == Side::kReplay;
    entry["number"] = record.number;
    entry["phase"] = cuda::Name(record.phase);
    entry["begin_ns"] = record.begin_ns;
    entry["end_ns"] = record.end_ns;
    entry["bytes_read"] = record.bytes_read;
    entry["bytes_written"] = record.bytes_written;
    trace.append(entry);
  }
  return trace;
}

nb::list EndWireTrace(Group& group) {
  nb::list trace;
  for (const cuda::WireRecord& record : group.EndWireTrace()) {
    nb::dict entry;
    entry["rank"] = record.rank;
    entry["peer"] = record.peer;
    entry["lane"] = record.lane;
    entry["mirrored"] = record.side == Side::kMirrored;
    entry["replay"] = record.side == Side::kReplay;
    entry["number"] = record.number;
    entry["begin_ns"] = record.begin_ns;
    entry["end_ns"] = record.end_ns;
    entry["bytes"] = record.bytes;
    trace.append(entry);
  }
  return trace;
}

}  // namespace

void BindCuda(nb::module_& m) {
  nb::class_<Group>(m, "CudaGroup")
      .def(nb::new_(&NewGroup), nb::kw_only(), nb::arg("group_id"), nb::arg("devices"),
           nb::arg("num_experts"), nb::arg("top_k"), nb::arg("hidden"), nb::arg("max_tokens"),
           nb::arg("dtype"), nb::arg("recv_capacity"), nb::arg("expert_alignment"),
           nb::arg("num_lanes"), nb::arg("drop_overflow"), nb::arg("timeout_s"),
           nb::arg("differentiable"), nb::arg("sm_push_bytes"))
      .def("close", &Group::Close, nb::call_guard<nb::gil_scoped_release>())
      .def("check",
           [](Group& group) -> std::optional<std::string> {
             const Status status = group.Check();
             if (status.ok()) return std::nullopt;
             return status.message();
           })
      .def("stats", &StatsOf)
      .def("memory_report", &MemoryOf)
      .def("trace", &TraceOf)
      .def("start_wire_trace", [](Group& group) { ThrowIfFailed(group.StartWireTrace()); })
      .def("end_wire_trace", &EndWireTrace);
}

}  // namespace smfree
