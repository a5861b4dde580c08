// What is read off score bins: attention per bin, and the keys whose bin is at least a threshold.
#include "score_bins.h"

#include <algorithm>

namespace minference {
namespace {

// Calls use(task, bins, threshold) for every head and tile; task is head * tiles + tile.
template <typename Use>
void for_tiles(const KeyArguments& a, const Use& use) {
#pragma omp parallel for num_threads(a.threads) schedule(dynamic, 4)
  for (int64_t task = 0; task < static_cast<int64_t>(a.heads) * a.tiles; ++task) {
    use(task, a.bins + task * a.seq_len, static_cast<uint8_t>(a.threshold[task / a.tiles]));
  }
}

}  // namespace
}  // namespace minference

extern "C" void minference_mass_by_bin(const minference::BinMassArguments* arguments) {
  using namespace minference;
  const BinMassArguments& a = *arguments;
#pragma omp parallel for num_threads(a.threads) schedule(dynamic, 1)
  for (int64_t task = 0; task < static_cast<int64_t>(a.heads) * a.rows; ++task) {
    const uint8_t* bins = a.bins + (task / a.rows * a.tiles + a.tile_of_row[task % a.rows]) * a.seq_len;
    Mass mass;
    mass.add_row(a.weights + task * a.seq_len, a.seq_len, [&](int64_t key) -> int { return bins[key]; });
    mass.write(a.mass + task * kBins);
  }
}

extern "C" void minference_page_counts(const minference::KeyArguments* arguments) {
  const minference::KeyArguments& a = *arguments;
  const int64_t pages = (a.seq_len + a.block_size - 1) / a.block_size;
  minference::for_tiles(a, [&](int64_t task, const uint8_t* bins, uint8_t threshold) {
    for (int64_t page = 0; page < pages; ++page) {
      const int64_t first = page * a.block_size, end = std::min<int64_t>(first + a.block_size, a.seq_len);
      int32_t count = 0;
      for (int64_t key = first; key < end; ++key) count += bins[key] >= threshold;
      a.counts[task * pages + page] = count;
    }
  });
}

extern "C" void minference_keys_above(const minference::KeyArguments* arguments) {
  const minference::KeyArguments& a = *arguments;
  const int64_t pages = (a.seq_len + a.block_size - 1) / a.block_size;
  minference::for_tiles(a, [&](int64_t task, const uint8_t* bins, uint8_t threshold) {
    int32_t* next = a.columns + task * a.max_columns;
    int32_t* const end_of_columns = next + a.max_columns;
    for (int64_t page = 0; page < pages; ++page) {
      if (!a.listed_pages[task * pages + page] || a.counts[task * pages + page] == 0) continue;
      const int64_t first = page * a.block_size, end = std::min<int64_t>(first + a.block_size, a.seq_len);
      for (int64_t key = first; key < end; ++key) {
        if (bins[key] >= threshold) *next++ = static_cast<int32_t>(key);
      }
    }
    std::fill(next, end_of_columns, -1);
  });
}
