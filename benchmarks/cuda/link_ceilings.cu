// SPDX-License-Identifier: Apache-2.0
// What the links and the memory of one host's GPUs can do, as one JSON object, in GB/s:
//
//   nvcc -O3 -arch=native -o link_ceilings link_ceilings.cu
//   ./link_ceilings GPUS BYTES...
//
// messages[]      for a message of BYTES from one GPU to another, by copy engine:
//   pair          one pair, both directions at once, each
//   all_to_all    every GPU to every other at once, a stream per peer; what leaves one GPU
//   sm_push       the same, but stored to the peers by kernels on all SMs
// local_copy      a copy kernel inside one GPU, bytes read plus bytes written, all GPUs at once
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "check.h"

namespace {

constexpr size_t kLocalBytes = size_t(1) << 30;
constexpr int kThreads = 512;
constexpr int kBlocksPerSm = 4;  // 2,048 threads, all that an SM holds
constexpr int kBatches = 5;      // the median counts
constexpr double kBatchBytes = 4e9;  // moved per batch and GPU: some 10 ms

// Four loads are in flight per thread before the first store.
__global__ void Copy(const int4* __restrict__ from, int4* __restrict__ to, size_t count) {
  size_t stride = size_t(gridDim.x) * blockDim.x;
  size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; i + 3 * stride < count; i += 4 * stride) {
    int4 a = from[i], b = from[i + stride], c = from[i + 2 * stride], d = from[i + 3 * stride];
    to[i] = a, to[i + stride] = b, to[i + 2 * stride] = c, to[i + 3 * stride] = d;
  }
  for (; i < count; i += stride) to[i] = from[i];
}

struct Gpu {
  char* from;
  char* to;
  int blocks;
  std::vector<cudaStream_t> stream;  // by peer
};

std::vector<Gpu> gpus;

void Synchronize() {
  for (size_t i = 0; i < gpus.size(); ++i) {
    CHECK(cudaSetDevice(int(i)));
    CHECK(cudaDeviceSynchronize());
  }
}

// Seconds per call of `enqueue(gpu)`, which moves `bytes`, on the first `count` GPUs at once. Every
// GPU has a host thread of its own, because one could not feed them all with small messages.
template <typename Enqueue>
double Seconds(int count, double bytes, Enqueue enqueue) {
  int calls = std::clamp(int(kBatchBytes / bytes), 10, 400);
  std::vector<double> samples;
  for (int batch = 0; batch <= kBatches; ++batch) {
    Synchronize();
    auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> threads;
    for (int gpu = 0; gpu < count; ++gpu) {
      threads.emplace_back([=] {
        CHECK(cudaSetDevice(gpu));
        for (int call = 0; call < calls; ++call) enqueue(gpu);
        CHECK(cudaDeviceSynchronize());
      });
    }
    for (std::thread& thread : threads) thread.join();
    std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    if (batch > 0) samples.push_back(took.count() / calls);  // the first one warms up
  }
  std::sort(samples.begin(), samples.end());
  return samples[samples.size() / 2];
}

void Open(int count, size_t bytes) {
  gpus.resize(count);
  for (int i = 0; i < count; ++i) {
    CHECK(cudaSetDevice(i));
    for (int peer = 0; peer < count; ++peer) {
      if (peer != i) CHECK(cudaDeviceEnablePeerAccess(peer, 0));
    }
    int sms;
    CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, i));
    gpus[i].blocks = sms * kBlocksPerSm;
    CHECK(cudaMalloc(&gpus[i].from, bytes));
    CHECK(cudaMalloc(&gpus[i].to, bytes));
    CHECK(cudaMemset(gpus[i].from, 0x5a + i, bytes));
    gpus[i].stream.resize(count);
    for (cudaStream_t& stream : gpus[i].stream) {
      CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    }
  }
}

// From the slot of `to` in `from`'s send area to the slot of `from` in `to`'s receive area. The
// current device is `from`.
void Send(int from, int to, size_t bytes, bool by_copy_engine) {
  char* source = gpus[from].from + to * bytes;
  char* target = gpus[to].to + from * bytes;
  cudaStream_t stream = gpus[from].stream[to];
  if (by_copy_engine) {
    CHECK(cudaMemcpyAsync(target, source, bytes, cudaMemcpyDefault, stream));
  } else {
    int blocks = gpus[from].blocks / int(gpus.size() - 1);
    Copy<<<blocks, kThreads, 0, stream>>>(reinterpret_cast<const int4*>(source),
                                          reinterpret_cast<int4*>(target), bytes / sizeof(int4));
    CHECK(cudaGetLastError());
  }
}

double AllToAll(size_t bytes, bool by_copy_engine) {
  int count = int(gpus.size());
  double egress = double(bytes) * (count - 1);
  double seconds = Seconds(count, egress, [=](int from) {
    for (int k = 1; k < count; ++k) Send(from, (from + k) % count, bytes, by_copy_engine);
  });
  return egress / seconds / 1e9;
}

double Pair(size_t bytes) {
  double seconds = Seconds(2, double(bytes), [=](int from) { Send(from, 1 - from, bytes, true); });
  return double(bytes) / seconds / 1e9;
}

double LocalCopy() {
  double seconds = Seconds(int(gpus.size()), 2.0 * kLocalBytes, [](int i) {
    const Gpu& gpu = gpus[i];
    Copy<<<gpu.blocks, kThreads, 0, gpu.stream[i]>>>(reinterpret_cast<const int4*>(gpu.from),
                                                     reinterpret_cast<int4*>(gpu.to),
                                                     kLocalBytes / sizeof(int4));
    CHECK(cudaGetLastError());
  });
  return 2.0 * kLocalBytes / seconds / 1e9;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: link_ceilings GPUS BYTES...\n");
    return 2;
  }
  int count = std::atoi(argv[1]);
  std::vector<size_t> sizes;
  for (int i = 2; i < argc; ++i) {
    sizes.push_back(std::strtoull(argv[i], nullptr, 10) / sizeof(int4) * sizeof(int4));
  }
  size_t largest = sizes.empty() ? 0 : *std::max_element(sizes.begin(), sizes.end());
  Open(count, std::max(kLocalBytes, largest * count));

  std::printf("{\"gpus\": %d, \"local_copy\": %.1f, \"messages\": [", count, LocalCopy());
  for (size_t i = 0; i < sizes.size() && count > 1; ++i) {
    std::printf("%s{\"bytes\": %zu, \"pair\": %.1f, \"all_to_all\": %.1f, \"sm_push\": %.1f}",
                i ? ", " : "", sizes[i], Pair(sizes[i]), AllToAll(sizes[i], true),
                AllToAll(sizes[i], false));
  }
  std::printf("]}\n");
}
