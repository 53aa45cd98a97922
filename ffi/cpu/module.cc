// SPDX-License-Identifier: Apache-2.0
//
// The CPU part of the extension module: groups.
#include "ffi/module.h"

#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "csrc/cpu/backend.h"
#include "csrc/cpu/exchange/compiled_calls.h"

namespace smfree {
namespace {

using cpu::Group;

std::shared_ptr<Group> NewGroup(int64_t group_id, int32_t replica, const GroupConfig& config,
                                std::vector<int32_t> process_of_rank, int32_t process,
                                std::string secret) {
  auto group = Group::Create(group_id, replica, config, std::move(process_of_rank), process,
                             std::move(secret));
  ThrowIfFailed(group.status());
  return group.value();
}

Counters StatsOf(const Group& group) {
  const cpu::GroupStats stats = group.stats();
  Counters counters = CountersOf(stats);
  counters["pending_receives"] = stats.pending_receives;
  counters["messages_in_flight"] = stats.messages_in_flight;
  return counters;
}

Counters MemoryOf(const Group& group) {
  const cpu::GroupStats stats = group.stats();
  return {{"arena_bytes", group.memory_bytes()},
          {"arena_bytes_in_use", stats.arena_bytes_in_use},
          {"arena_bytes_high_water", stats.arena_bytes_high_water}};
}

}  // namespace

void BindCpu(nb::module_& m) {
  // For what waits, if only for a mutex: a handler that holds it may be waiting for Python.
  const nb::call_guard<nb::gil_scoped_release> kWithoutGil;
  m.def("compilation_begins", &cpu::CompilationBegins);
  m.def("compilation_ends", &cpu::CompilationEnds);
  nb::class_<Group>(m, "CpuGroup")
      .def(nb::new_(&NewGroup), nb::kw_only(), nb::arg("group_id"), nb::arg("replica"),
           nb::arg("config"), nb::arg("process_of_rank"), nb::arg("process"), nb::arg("secret"))
      .def("address", &Group::address)
      .def("connect",
           [](Group& group, const std::vector<std::string>& addresses) {
             ThrowIfFailed(group.Connect(addresses));
           },
           nb::arg("addresses"), kWithoutGil)
      .def("close", &Group::Close, kWithoutGil)
      .def("check", [](Group& group) { return FaultOf(group.Check()); }, kWithoutGil)
      .def("fault", [](Group& group) { return FaultOf(group.Fault()); }, kWithoutGil)
      .def("unreceived", &Group::Unreceived, kWithoutGil)
      .def("stats", &StatsOf, kWithoutGil)
      .def("memory_report", &MemoryOf, kWithoutGil)
      .def("set_chaos",
           [](Group& group, uint64_t seed, int64_t max_delay_us, bool reorder,
              double stall_probability, int64_t stall_ms) {
             group.SetChaos({seed, max_delay_us, reorder, stall_probability, stall_ms});
           },
           nb::kw_only(), nb::arg("seed"), nb::arg("max_delay_us"), nb::arg("reorder"),
           nb::arg("stall_probability"), nb::arg("stall_ms"));
}

}  // namespace smfree
