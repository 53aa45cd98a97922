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
#include <string>
#include <utility>
#include <vector>

#include "csrc/cuda/backend.h"
#include "csrc/cuda/memory/memory_nvshmem.h"
#include "csrc/cuda/network/nvshmem.h"
#include "csrc/cuda/network/put_kernel.h"
#include "csrc/cuda/driver/visible.h"

namespace smfree {
namespace {

using cuda::Group;
using cuda::Nvshmem;
using cuda::NvshmemMemory;

std::shared_ptr<Group> NewGroup(int64_t group_id, int32_t replica, const GroupConfig& config,
                                const std::vector<int32_t>& devices) {
  const nb::gil_scoped_release release;
  auto group = Group::Create(group_id, replica, config, devices);
  ThrowIfFailed(group.status());
  return group.value();
}

std::shared_ptr<Group> NewGroupAmongProcesses(int64_t group_id, int32_t replica,
                                              const GroupConfig& config, int32_t rank,
                                              int32_t device,
                                              const std::vector<int32_t>& process_of_rank,
                                              std::shared_ptr<NvshmemMemory> memory,
                                              const std::string& name) {
  auto group = Group::CreateAmongProcesses(group_id, replica, config, rank, device,
                                           process_of_rank, std::move(memory), name);
  ThrowIfFailed(group.status());
  return group.value();
}

Nvshmem& NvshmemOf(const std::string& library) {
  auto nvshmem = Nvshmem::Get(library);
  ThrowIfFailed(nvshmem.status());
  return *nvshmem.value();
}

nb::bytes NewUniqueId(const std::string& library) {
  auto id = NvshmemOf(library).NewUniqueId();
  ThrowIfFailed(id.status());
  return nb::bytes(id.value().data(), id.value().size());
}

void JoinWorld(const std::string& library, const nb::bytes& unique_id, int32_t process,
               int32_t processes, int32_t device) {
  const std::string id(unique_id.c_str(), unique_id.size());
  const nb::gil_scoped_release release;
  ThrowIfFailed(NvshmemOf(library).Join(id, process, processes, device));
}

std::shared_ptr<NvshmemMemory> AllocateInWorld(const std::string& library, int32_t device,
                                               int64_t bytes) {
  auto memory =
      NvshmemMemory::Allocate(NvshmemOf(library), device, static_cast<size_t>(bytes));
  ThrowIfFailed(memory.status());
  return memory.value();
}

std::string BusIdOf(int32_t device) {
  auto id = cuda::BusId(device);
  ThrowIfFailed(id.status());
  return id.value();
}

// What `call()` returns, or an error. Others may run Python while it waits.
template <typename Call>
auto ValueOf(const Call& call) {
  const nb::gil_scoped_release release;
  auto result = call();
  ThrowIfFailed(result.status());
  return std::move(result.value());
}

void Close(Group& group) {
  Status left;
  {
    const nb::gil_scoped_release release;
    left = group.Close();
  }
  if (left.ok()) return;
  const std::string text = "EpGroup.close: " + left.message();
  if (PyErr_WarnEx(PyExc_RuntimeWarning, text.c_str(), /*stack_level=*/1) < 0) {
    throw nb::python_error();
  }
}

Counters StatsOf(const Group& group) {
  const cuda::GroupStats stats = ValueOf([&] { return group.stats(); });
  Counters counters = CountersOf(stats);
  counters["sets_added"] = stats.sets_added;
  counters["sends_without_set"] = stats.sends_without_set;
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
  for (const cuda::PhaseRecord& record : ValueOf([&] { return group.Trace(); })) {
    nb::dict entry;
    entry["replica"] = record.replica;
    entry["rank"] = record.rank;
    entry["lane"] = record.lane;
    entry["mirrored"] = record.side == Side::kMirrored;
    entry["replay"] = record.side == Side::kReplay;
    entry["number"] = record.number;
    entry["phase"] = Name(record.phase);
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
  for (const cuda::WireRecord& record : ValueOf([&] { return group.EndWireTrace(); })) {
    nb::dict entry;
    entry["replica"] = record.replica;
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
  m.attr("puts_on_device") = cuda::PutKernel::IsBuilt();
  nb::class_<NvshmemMemory>(m, "NvshmemMemory")
      .def_prop_ro("bytes", &NvshmemMemory::bytes)
      .def_prop_ro("in_use", [](const NvshmemMemory& memory) { return memory.in_use.load(); });
  m.def("nvshmem_unique_id", &NewUniqueId, nb::arg("library"));
  m.def("nvshmem_join", &JoinWorld, nb::kw_only(), nb::arg("library"), nb::arg("unique_id"),
        nb::arg("process"), nb::arg("processes"), nb::arg("device"));
  m.def("nvshmem_allocate", &AllocateInWorld, nb::kw_only(), nb::arg("library"),
        nb::arg("device"), nb::arg("bytes"), nb::call_guard<nb::gil_scoped_release>());
  m.def("gpu_bus_id", &BusIdOf, nb::arg("device"));
  m.def("sees_gpu", &cuda::IsVisible, nb::arg("bus_id"));
  m.def("cuda_compilation_begins", &cuda::CompilationBegins);
  m.def("cuda_compilation_ends", &cuda::CompilationEnds,
        nb::call_guard<nb::gil_scoped_release>());
  m.def("symmetric_bytes", &cuda::SymmetricBytes, nb::arg("config"));
  nb::class_<Group>(m, "CudaGroup")
      .def(nb::new_(&NewGroup), nb::kw_only(), nb::arg("group_id"), nb::arg("replica"),
           nb::arg("config"), nb::arg("devices"))
      .def_static("among_processes", &NewGroupAmongProcesses, nb::kw_only(), nb::arg("group_id"),
                  nb::arg("replica"), nb::arg("config"), nb::arg("rank"), nb::arg("device"),
                  nb::arg("process_of_rank"), nb::arg("memory"), nb::arg("name"),
                  nb::call_guard<nb::gil_scoped_release>())
      .def("all_are_here", &Group::AllAreHere, nb::call_guard<nb::gil_scoped_release>())
      .def("close", &Close)
      .def("check", [](Group& group) { return FaultOf(group.Check()); },
           nb::call_guard<nb::gil_scoped_release>())
      .def("fault", [](const Group& group) { return FaultOf(group.Fault()); },
           nb::call_guard<nb::gil_scoped_release>())
      .def("stats", &StatsOf)
      .def("memory_report", &MemoryOf)
      .def("trace", &TraceOf)
      .def("start_wire_trace", [](Group& group) { ThrowIfFailed(group.StartWireTrace()); },
           nb::call_guard<nb::gil_scoped_release>())
      .def("end_wire_trace", &EndWireTrace);
}

}  // namespace smfree
