// SPDX-License-Identifier: Apache-2.0
// How fast one GPU moves rows in the patterns of the phases, with nothing else to do: as one JSON
// object, bytes read plus bytes written, in GB/s:
//
//   nvcc -O3 -arch=native -o row_patterns row_patterns.cu
//   ./row_patterns ROWS ROW_BYTES
//
// scatter_N   each row is read once and written to N places, as grouped by expert: 1, 2, 8
// gather_N    each row written is the exclusive or of N rows from such places: 1, 2, 8
//
// A warp per row, 16 bytes per lane, four loads in flight.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <vector>

#include "check.h"

namespace {

constexpr int kMostPlaces = 8;
constexpr int kGroups = 256;  // of places: the experts
constexpr int kUnroll = 4;
constexpr int kThreads = 512;
constexpr int kBlocksPerSm = 2;
constexpr int kBatches = 9;  // the median counts
constexpr int kCalls = 4;    // of a batch

struct Rows {
  uint4* many;   // [rows * places, words]
  uint4* once;   // [rows, words]
  int* place;    // [rows * places]
  int rows, places, words;
};

template <bool kScatter>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) Move(Rows a) {
  int lane = threadIdx.x % 32;
  int warps = gridDim.x * blockDim.x / 32;
  for (int row = (blockIdx.x * blockDim.x + threadIdx.x) / 32; row < a.rows; row += warps) {
    const int* place = a.place + row * a.places;
    uint4* here = a.once + size_t(row) * a.words;
    for (int v = lane; v < a.words; v += kScatter ? kUnroll * 32 : 32) {
      if constexpr (kScatter) {
        uint4 in[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          if (v + u * 32 < a.words) in[u] = __ldcg(here + v + u * 32);
        }
        for (int i = 0; i < a.places; ++i) {
          uint4* to = a.many + size_t(place[i]) * a.words + v;
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            if (v + u * 32 < a.words) to[u * 32] = in[u];
          }
        }
      } else {
        uint4 sum = {};
        for (int i = 0; i < a.places; i += kUnroll) {
          uint4 in[kUnroll] = {};
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            if (i + u < a.places) in[u] = __ldcg(a.many + size_t(place[i + u]) * a.words + v);
          }
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            sum.x ^= in[u].x, sum.y ^= in[u].y, sum.z ^= in[u].z, sum.w ^= in[u].w;
          }
        }
        here[v] = sum;
      }
    }
  }
}

// Every row has places in different groups; inside a group they follow the order of the rows.
std::vector<int> GroupedPlaces(int rows, int places) {
  std::mt19937 random(0);
  std::vector<int> group(kGroups);
  std::iota(group.begin(), group.end(), 0);
  std::vector<std::vector<int>> slots(kGroups);
  for (int row = 0; row < rows; ++row) {
    for (int i = 0; i < places; ++i) {
      std::swap(group[i], group[i + random() % (kGroups - i)]);
      slots[group[i]].push_back(row * places + i);
    }
  }
  std::vector<int> place(rows * places);
  int next = 0;
  for (const std::vector<int>& of_group : slots) {
    for (int slot : of_group) place[slot] = next++;
  }
  return place;
}

template <bool kScatter>
double Rate(const Rows& rows, int blocks) {
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  std::vector<float> samples;
  for (int batch = 0; batch <= kBatches; ++batch) {
    CHECK(cudaEventRecord(begin));
    for (int call = 0; call < kCalls; ++call) Move<kScatter><<<blocks, kThreads>>>(rows);
    CHECK(cudaEventRecord(end));
    CHECK(cudaEventSynchronize(end));
    float ms;
    CHECK(cudaEventElapsedTime(&ms, begin, end));
    if (batch > 0) samples.push_back(ms / kCalls);  // the first one warms up
  }
  std::sort(samples.begin(), samples.end());
  double bytes = double(rows.rows) * (1 + rows.places) * rows.words * sizeof(uint4);
  return bytes / samples[samples.size() / 2] / 1e6;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: row_patterns ROWS ROW_BYTES\n");
    return 2;
  }
  Rows rows = {};
  rows.rows = std::atoi(argv[1]);
  rows.words = std::atoi(argv[2]) / int(sizeof(uint4));
  int sms;
  CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));
  size_t bytes = size_t(rows.rows) * rows.words * sizeof(uint4);
  CHECK(cudaMalloc(&rows.once, bytes));
  CHECK(cudaMalloc(&rows.many, bytes * kMostPlaces));
  CHECK(cudaMalloc(&rows.place, size_t(rows.rows) * kMostPlaces * sizeof(int)));
  CHECK(cudaMemset(rows.once, 0x5a, bytes));
  CHECK(cudaMemset(rows.many, 0xa5, bytes * kMostPlaces));
  const char* separator = "{";
  for (int places : {1, 2, kMostPlaces}) {
    rows.places = places;
    std::vector<int> place = GroupedPlaces(rows.rows, places);
    CHECK(cudaMemcpy(rows.place, place.data(), place.size() * sizeof(int), cudaMemcpyDefault));
    std::printf("%s\"scatter_%d\": %.0f, \"gather_%d\": %.0f", separator, places,
                Rate<true>(rows, sms * kBlocksPerSm), places,
                Rate<false>(rows, sms * kBlocksPerSm));
    separator = ", ";
  }
  std::printf("}\n");
}
