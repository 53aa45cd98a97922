// SPDX-License-Identifier: Apache-2.0
#include "csrc/core/describe.h"

#include <cstdio>
#include <mutex>
#include <unordered_map>
#include <utility>

namespace smfree {
namespace {

struct CallSites {
  std::mutex mutex;
  std::unordered_map<uint32_t, std::string> names;
};

CallSites& AllCallSites() {
  static CallSites& sites = *new CallSites;  // leaked: it outlives every thread
  return sites;
}

std::string CallSiteName(uint32_t call_site) {
  CallSites& sites = AllCallSites();
  const std::lock_guard<std::mutex> lock(sites.mutex);
  const auto it = sites.names.find(call_site);
  if (it != sites.names.end()) return it->second;
  char text[32];
  std::snprintf(text, sizeof(text), "call site %08x", call_site);
  return text;
}

}  // namespace

void RegisterCallSite(uint32_t call_site, std::string name) {
  CallSites& sites = AllCallSites();
  const std::lock_guard<std::mutex> lock(sites.mutex);
  sites.names[call_site] = std::move(name);
}

std::string DescribeDerivation(int32_t derivation) {
  constexpr const char* kTransforms[] = {"forward", "tangent", "transpose", "replay"};
  if (derivation == 0) return "forward";
  std::string text;
  for (; derivation > 0; derivation /= 4) {  // the last transform first
    if (!text.empty()) text += " of ";
    text += kTransforms[derivation % 4];
  }
  return text;
}

namespace {

std::string DescribeCallAndLane(const Identity& identity) {
  const Instance instance = identity.instance;
  return CallSiteName(identity.call_site) +
         (instance.program != 0 ? ", call " + std::to_string(instance.ordinal) + " of that line"
                                : "") +
         "; lane " + std::to_string(identity.lane) + ", " + DescribeDerivation(identity.derivation);
}

}  // namespace

std::string DescribePoint(const Identity& identity) {
  return DescribeCallAndLane(identity) + ", number " + std::to_string(identity.number);
}

std::string DescribeOperation(const Identity& identity) {
  return std::string(Name(identity.operation)) + " number " + std::to_string(identity.number) +
         " (" + DescribeCallAndLane(identity) + ")";
}

std::string DescribeCall(const char* phase, int32_t rank, const Identity& identity) {
  return "rank " + std::to_string(rank) + " in " + phase + " (" + DescribePoint(identity) + ")";
}

std::string JoinNumbers(const std::vector<int32_t>& numbers) {
  std::string text;
  for (const int32_t number : numbers) {
    if (!text.empty()) text += ", ";
    text += std::to_string(number);
  }
  return text;
}

}  // namespace smfree
