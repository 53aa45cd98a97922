// SPDX-License-Identifier: Apache-2.0
//
// Conversions of bfloat16 and float16 against the compiler's and the definition; sums of rows of
// all sizes and alignments, cached and streamed; the floating-point mode of loops.
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "csrc/cpu/runtime/completion_pool.h"
#include "csrc/cpu/rows/floats.h"
#include "csrc/cpu/rows/rows.h"
#include "tests/cpp/check.h"
#include "tests/cpp/cpu_ranks.h"

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace smfree::cpu::test {
namespace {

constexpr DType kFloats[] = {DType::kF32, DType::kBF16, DType::kF16, DType::kE4M3, DType::kE5M2};

float Half(uint32_t bits) {
  const auto narrow = static_cast<uint16_t>(bits);
  return static_cast<float>(BitCast<_Float16>(narrow));
}

float Brain(uint32_t bits) { return BitCast<float>(bits << 16); }

bool SameNumber(float a, float b) {
  return BitCast<uint32_t>(a) == BitCast<uint32_t>(b) || (std::isnan(a) && std::isnan(b));
}

TEST(AllSixteenBitNumbersWiden) {
  int wrong = 0;
  for (uint32_t bits = 0; bits < 1u << 16; ++bits) {
    wrong += !SameNumber(FromFloat16(bits), Half(bits));
    wrong += !SameNumber(FromBFloat16(bits), Brain(bits));
    // And back: a number that has 16 bits keeps them.
    wrong += !SameNumber(Half(ToFloat16(Half(bits))), Half(bits));
    wrong += !SameNumber(Brain(ToBFloat16(Brain(bits))), Brain(bits));
  }
  CHECK_EQ(wrong, 0);
}

void CheckNarrow(uint32_t bits, int* wrong) {
  const float value = BitCast<float>(bits);
  const float half = static_cast<float>(static_cast<_Float16>(value));
  *wrong += !SameNumber(Half(ToFloat16(value)), half);
  const float brain = Brain(ToBFloat16(value));
  if (!std::isfinite(value)) {
    *wrong += !SameNumber(brain, value);
  } else if (std::abs(value) >= std::numeric_limits<float>::min()) {
    const float rounded = RoundTo(DType::kBF16, value);  // may be the 2^128 that bfloat16 lacks
    *wrong += !SameNumber(brain, rounded);
  } else {  // denormal: units of 2^-133
    *wrong += !SameNumber(brain, std::ldexp(std::nearbyint(std::ldexp(value, 133)), -133));
  }
}

TEST(FloatsNarrowToNearestEven) {
  int wrong = 0;
  for (uint64_t bits = 0; bits < 1ull << 32; bits += kSanitized ? 65521 : 1021) {
    CheckNarrow(static_cast<uint32_t>(bits), &wrong);
  }
  // Ties and their neighbours of both formats, in every exponent and in the denormals.
  for (uint32_t upper = 0; upper < 1u << 16; ++upper) {
    for (const uint32_t lower : {0x7fffu, 0x8000u, 0x8001u, 0x0fffu, 0x1000u, 0x1001u}) {
      CheckNarrow(upper << 16 | lower, &wrong);
    }
  }
  CHECK_EQ(wrong, 0);
}

// Every size up to two vectors and more, every alignment of the output to its dtype.
TEST(SumsOfRows) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (const DType dtype : kFloats) {
    for (const int64_t n : {1, 2, 15, 16, 17, 31, 37, 64, 1000, 1023, 1025, 3000}) {
      for (int64_t num_terms = 0; num_terms <= 5; ++num_terms) {
        const int64_t offset = (n + num_terms) % 33 * ItemBytes(dtype);
        std::vector<Array> rows;
        std::vector<WeightedRow> terms;
        for (int64_t k = 0; k < num_terms; ++k) {
          rows.emplace_back(dtype, n);
          for (int64_t i = 0; i < n; ++i) rows.back().Set(i, normal(random));
        }
        for (const Array& row : rows) {
          terms.push_back({reinterpret_cast<const std::byte*>(row.data()),
                           num_terms == 1 ? 1.0f : normal(random)});
        }
        Array want(dtype, n);
        for (int64_t i = 0; i < n; ++i) {
          float sum = num_terms > 0 ? terms[0].weight * rows[0][i] : 0.0f;  // which may be -0
          for (int64_t k = 1; k < num_terms; ++k) sum += terms[k].weight * rows[k][i];
          want.Set(i, sum);
        }
        const size_t bytes = static_cast<size_t>(n * ItemBytes(dtype));
        std::vector<std::byte> out(bytes + 256, std::byte{0x5a});
        SumRows(dtype, out.data() + offset, terms.data(), num_terms, n);
        CHECK(std::memcmp(out.data() + offset, want.data(), bytes) == 0);
        CHECK(offset == 0 || out[offset - 1] == std::byte{0x5a});
        CHECK(out[offset + bytes] == std::byte{0x5a});
      }
    }
  }
}

// Term by term, in float32, and rounded only then.
TEST(WideSumsOfRows) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  for (const DType dtype : kFloats) {
    for (const int64_t n : {1, 16, 37, 1000}) {
      std::vector<float> sums(n, kNaN), want_sums(n);
      for (int term = 0; term < 3; ++term) {
        Array row(dtype, n);
        const float weight = normal(random);
        for (int64_t i = 0; i < n; ++i) {
          row.Set(i, normal(random));
          want_sums[i] = term == 0 ? weight * row[i] : want_sums[i] + weight * row[i];
        }
        AddRow(dtype, sums.data(), {reinterpret_cast<const std::byte*>(row.data()), weight},
               /*first=*/term == 0, n);
      }
      CHECK(sums == want_sums);
      Array out(dtype, n), want(dtype, n);
      RoundRow(dtype, reinterpret_cast<std::byte*>(out.data()), sums.data(), n);
      for (int64_t i = 0; i < n; ++i) want.Set(i, sums[i]);
      CHECK(out == want);
    }
  }
}

TEST(CopiesOfRows) {
  for (const size_t bytes : {1, 2, 30, 63, 64, 65, 127, 128, 1000, 4096}) {
    for (size_t offset = 0; offset < 70; ++offset) {
      std::vector<std::byte> row(bytes);
      for (size_t i = 0; i < bytes; ++i) row[i] = static_cast<std::byte>(i * 7 + offset);
      for (const Writes writes : {Writes::kCached, Writes::kStreaming}) {
        std::vector<std::byte> out(bytes + 256, std::byte{0x5a});
        CopyRow(out.data() + offset, row.data(), static_cast<int64_t>(bytes), writes);
        FinishWrites(writes);
        CHECK(std::memcmp(out.data() + offset, row.data(), bytes) == 0);
        CHECK(offset == 0 || out[offset - 1] == std::byte{0x5a});
        CHECK(out[offset + bytes] == std::byte{0x5a});
      }
    }
  }
}

TEST(ScaledRowsAndProducts) {
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  for (const DType dtype : kFloats) {
    for (const int64_t n : {1, 16, 37, 1000, 1025, 3000}) {
      Array row(dtype, n), y(dtype, n), want(dtype, n), cached(dtype, n), streamed(dtype, n),
          room(dtype, n);
      float products[16] = {};
      for (int64_t i = 0; i < n; ++i) {
        row.Set(i, normal(random));
        y.Set(i, normal(random));
        want.Set(i, row[i] * 0.3f);
        products[i % 16] += row[i] * y[i];
      }
      for (int half = 8; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) products[i] += products[i + half];
      }
      const auto bytes = [](const Array& array) {
        return reinterpret_cast<std::byte*>(const_cast<unsigned char*>(array.data()));
      };
      const float a = ScaleRowAndDot(dtype, bytes(cached), bytes(room), bytes(row), bytes(y), 0.3f,
                                     n, Writes::kCached);
      const float b = ScaleRowAndDot(dtype, bytes(streamed), bytes(room), bytes(row), bytes(y),
                                     0.3f, n, Writes::kStreaming);
      FinishWrites(Writes::kStreaming);
      CHECK(cached == want && streamed == want);
      CHECK_EQ(a, products[0]);
      CHECK_EQ(b, products[0]);
    }
  }
}

#if defined(__SSE2__)
// XLA's threads flush denormals, those of the pool do not: the bits must be the same.
TEST(LoopsRunInTheSameFloatingPointMode) {
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | 0x8040);  // flush results and operands
  const float tiny = std::numeric_limits<float>::denorm_min();
  for (const int threads : {1, 3}) {
    std::vector<float> out(1000);
    ParallelFor(1000, threads, [&](int64_t begin, int64_t end) {
      const WeightedRow terms[] = {{reinterpret_cast<const std::byte*>(&tiny), 3.0f}};
      for (int64_t i = begin; i < end; ++i) {
        SumRows(DType::kF32, reinterpret_cast<std::byte*>(&out[i]), terms, 1, 1);
      }
    });
    uint32_t bits[1000];
    std::memcpy(bits, out.data(), sizeof(bits));
    for (const uint32_t sum : bits) CHECK_EQ(sum, 3u);
  }
  CHECK_EQ(_mm_getcsr() & 0x8040u, 0x8040u);
  _mm_setcsr(before);
}
#endif

}  // namespace
}  // namespace smfree::cpu::test

TEST_MAIN()
