// What lies at the levels of keys, and which keys reach a level (minference_vllm/levels.py).
#include "levels.h"

#include <algorithm>

namespace minference {

struct MassArguments {
  const uint8_t* levels;  // [heads][lists][seq_len]
  const int64_t* list;    // [rows], the list of each row
  const float* weights;   // [heads][rows][seq_len]
  float* mass;            // [heads][rows][kLevels]
  int64_t seq_len;
  int32_t heads, rows, lists;
  int32_t threads;
};

struct KeyArguments {
  const uint8_t* levels;     // [heads][tiles][seq_len]
  const int32_t* threshold;  // [heads]
  int32_t* counts;           // [heads][tiles][pages]: keys of each page that reach the threshold
  const bool* outside;       // [heads][tiles][pages]: pages whose keys are listed
  int32_t* columns;          // [heads][tiles][max_columns]
  int64_t seq_len;
  int32_t heads, tiles, block_size, max_columns;
  int32_t threads;
};

namespace {

// Calls use(task, levels, threshold) for every head and tile.
template <typename Use>
void for_tiles(const KeyArguments& a, const Use& use) {
#pragma omp parallel for num_threads(a.threads) schedule(dynamic, 4)
  for (int64_t task = 0; task < static_cast<int64_t>(a.heads) * a.tiles; ++task) {
    use(task, a.levels + task * a.seq_len, static_cast<uint8_t>(a.threshold[task / a.tiles]));
  }
}

}  // namespace
}  // namespace minference

extern "C" void minference_mass_by_level(const minference::MassArguments* arguments) {
  using namespace minference;
  const MassArguments& a = *arguments;
#pragma omp parallel for num_threads(a.threads) schedule(dynamic, 1)
  for (int64_t task = 0; task < static_cast<int64_t>(a.heads) * a.rows; ++task) {
    const uint8_t* levels = a.levels + (task / a.rows * a.lists + a.list[task % a.rows]) * a.seq_len;
    float* mass = a.mass + task * kLevels;
    std::fill(mass, mass + kLevels, 0.0f);
    // What is too little to be looked up lies at no level that is wanted.
    mass[0] += for_weights(a.weights + task * a.seq_len, a.seq_len,
                           [&](int64_t key, float weight) { mass[levels[key]] += weight; });
  }
}

extern "C" void minference_page_counts(const minference::KeyArguments* arguments) {
  const minference::KeyArguments& a = *arguments;
  const int64_t pages = (a.seq_len + a.block_size - 1) / a.block_size;
  minference::for_tiles(a, [&](int64_t task, const uint8_t* levels, uint8_t threshold) {
    for (int64_t page = 0; page < pages; ++page) {
      const int64_t first = page * a.block_size, end = std::min<int64_t>(first + a.block_size, a.seq_len);
      int32_t count = 0;
      for (int64_t key = first; key < end; ++key) count += levels[key] >= threshold;
      a.counts[task * pages + page] = count;
    }
  });
}

extern "C" void minference_columns_at_levels(const minference::KeyArguments* arguments) {
  const minference::KeyArguments& a = *arguments;
  const int64_t pages = (a.seq_len + a.block_size - 1) / a.block_size;
  minference::for_tiles(a, [&](int64_t task, const uint8_t* levels, uint8_t threshold) {
    int32_t* next = a.columns + task * a.max_columns;
    int32_t* const end_of_list = next + a.max_columns;
    for (int64_t page = 0; page < pages; ++page) {
      if (!a.outside[task * pages + page] || a.counts[task * pages + page] == 0) continue;
      const int64_t first = page * a.block_size, end = std::min<int64_t>(first + a.block_size, a.seq_len);
      for (int64_t key = first; key < end; ++key) {
        if (levels[key] >= threshold) *next++ = static_cast<int32_t>(key);
      }
    }
    std::fill(next, end_of_list, -1);
  });
}
