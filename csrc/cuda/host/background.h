// SPDX-License-Identifier: Apache-2.0
//
// Work that may never end: a call of CUDA that waits for a device, or that the driver holds up
// behind one. Such calls know no deadline, so who needs one starts them on a thread of their own.
#ifndef SMFREE_CSRC_CUDA_HOST_BACKGROUND_H_
#define SMFREE_CSRC_CUDA_HOST_BACKGROUND_H_

#include <chrono>
#include <functional>
#include <future>
#include <memory>
#include <optional>
#include <thread>
#include <utility>

namespace smfree::cuda {

class Background {
 public:
  // Starts `work`, which goes on when this object is gone: it owns what it uses.
  explicit Background(std::function<void()> work) {
    auto ended = std::make_shared<std::promise<void>>();
    ended_ = ended->get_future().share();
    std::thread([ended, work = std::move(work)]() mutable {
      work();
      work = nullptr;  // lets go of what it owns before anybody hears of the end
      ended->set_value();
    }).detach();
  }

  bool Ended() const { return EndsWithin(std::chrono::nanoseconds(0)); }
  // Waits for that, up to `bound`.
  bool EndsWithin(std::chrono::nanoseconds bound) const {
    return ended_.wait_for(bound) == std::future_status::ready;
  }

 private:
  std::shared_future<void> ended_;
};

// What `call()` returns, or nothing if it does not return within `bound`. Then it goes on by
// itself: it owns what it uses.
template <typename Call>
auto ResultWithin(std::chrono::nanoseconds bound, Call call) -> std::optional<decltype(call())> {
  auto result = std::make_shared<std::optional<decltype(call())>>();
  const Background work([result, call = std::move(call)] { result->emplace(call()); });
  if (!work.EndsWithin(bound)) return std::nullopt;
  return std::move(*result);
}

}  // namespace smfree::cuda

#endif  // SMFREE_CSRC_CUDA_HOST_BACKGROUND_H_
