// SPDX-License-Identifier: Apache-2.0
#include "csrc/protocol/message.h"

#include <cstdint>
#include <set>
#include <utility>

#include "tests/cpp/check.h"

using namespace smfree;

TEST(ChunksCoverEveryRowOnceInOrder) {
  for (int32_t rows : {0, 1, 2, 7, 8, 9, 1000, 7373}) {
    for (int32_t wanted : {1, 2, 3, 8, 16}) {
      const Chunks chunks(rows, wanted);
      CHECK(chunks.count >= 1 && chunks.count <= wanted);
      CHECK_EQ(chunks.Begin(0), 0);
      CHECK_EQ(chunks.End(chunks.count - 1), rows);
      for (int32_t chunk = 0; chunk < chunks.count; ++chunk) {
        if (chunk > 0) CHECK_EQ(chunks.Begin(chunk), chunks.End(chunk - 1));
        // An empty chunk would never be completed by a row: only an empty message has one.
        CHECK((chunks.RowsIn(chunk) > 0) == (rows > 0));
        for (int32_t row = chunks.Begin(chunk); row < chunks.End(chunk); ++row) {
          CHECK_EQ(chunks.Of(row), chunk);
        }
      }
    }
  }
}

TEST(CopyCodesAreDistinctAndComeBack) {
  const CopyCode code(100);
  CHECK(code.Fits(64));
  std::set<int32_t> seen;
  for (int32_t expert = 0; expert < 64; ++expert) {
    for (int32_t index = 0; index < 100; ++index) {
      const int32_t value = code.Encode(expert, index);
      CHECK(value >= 0);
      CHECK(seen.insert(value).second);
      CHECK_EQ(code.Expert(value), expert);
      CHECK_EQ(code.Index(value), index);
    }
  }
}

TEST(CopyCodesThatDoNotFitAreKnown) {
  CHECK(CopyCode(8192).Fits(256));
  CHECK(CopyCode(int64_t{1} << 20).Fits(1 << 11));
  CHECK(!CopyCode(int64_t{1} << 20).Fits((1 << 11) + 1));
}

TEST_MAIN()
