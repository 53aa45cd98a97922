// SPDX-License-Identifier: Apache-2.0
//
// The open groups of this process, by id and replica. Groups of one id are those that one mesh
// makes along its other axes; each is a replica.
#ifndef SMFREE_CSRC_CORE_REGISTRY_H_
#define SMFREE_CSRC_CORE_REGISTRY_H_

#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "csrc/core/status.h"

namespace smfree {

template <typename Group>
class Registry {
 public:
  // One per kind of group. Leaked: handlers may run while the process exits.
  static Registry& Get() {
    static Registry& registry = *new Registry;
    return registry;
  }

  // Refused if there is an open group of that name.
  Status Add(int64_t group_id, int32_t replica, std::shared_ptr<Group> group) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (groups_.emplace(Name(group_id, replica), std::move(group)).second) return Status();
    return Status(FaultKind::kInvalidArgument, "group " + std::to_string(group_id) + ", replica " +
                                                   std::to_string(replica) +
                                                   " exists already in this process");
  }
  // Gives back the registry's reference to `group`, which is perhaps the last but the caller's.
  std::shared_ptr<Group> Remove(int64_t group_id, int32_t replica, const Group* group) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto it = groups_.find(Name(group_id, replica));
    if (it == groups_.end() || it->second.get() != group) return nullptr;
    std::shared_ptr<Group> removed = std::move(it->second);
    groups_.erase(it);
    return removed;
  }
  std::shared_ptr<Group> Find(int64_t group_id, int32_t replica) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto it = groups_.find(Name(group_id, replica));
    return it == groups_.end() ? nullptr : it->second;
  }
  std::vector<std::shared_ptr<Group>> Replicas(int64_t group_id) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::vector<std::shared_ptr<Group>> replicas;
    auto it = groups_.lower_bound(Name(group_id, std::numeric_limits<int32_t>::min()));
    for (; it != groups_.end() && it->first.first == group_id; ++it) {
      replicas.push_back(it->second);
    }
    return replicas;
  }
  // Any group, or nullptr if there is none.
  std::shared_ptr<Group> Any() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return groups_.empty() ? nullptr : groups_.begin()->second;
  }

 private:
  using Name = std::pair<int64_t, int32_t>;
  Registry() = default;

  mutable std::mutex mutex_;
  std::map<Name, std::shared_ptr<Group>> groups_;
};

}  // namespace smfree

#endif  // SMFREE_CSRC_CORE_REGISTRY_H_
