// Last-query estimate: attention mass of some of a chunk's queries per column and per diagonal, in two passes over K.
// What is computed, of which queries, and why diagonals take the smallest of four groups: minference_vllm/estimate.py.
#include "tiles.h"

#include <omp.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

namespace minference {

constexpr int kMaxLast = 64;
constexpr int kTilesPerTask = 8;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct EstimateArguments {
  Cache cache;
  const bf16* query;  // the chunk's queries: row r, head h at r * token_stride + h * head_stride
  int64_t query_token_stride, query_head_stride;
  const int64_t* pages;
  const int64_t* row_index;     // [rows] rows of the chunk that are used, ascending
  const int32_t* group_starts;  // [num_groups + 1] neighbouring rows that form a group, as places in row_index
  const int32_t* heads;  // [num_wanted] query heads wanted, ascending
  float* columns;        // [num_wanted][seq_len]
  float* diagonals;      // [num_wanted][seq_len], by distance
  int64_t context_len, seq_len;
  int32_t num_heads, num_wanted, rows, num_groups;
  float scale;
  int32_t threads;
};

namespace {

// Zeros on both sides of a tile's scores, so that diagonals can be read past it.
constexpr int kScoreStride = kKeyTile + 2 * kMaxLast;

constexpr auto kPlaces = [] {  // of a tile's keys in it
  std::array<int32_t, kKeyTile> places{};
  std::iota(places.begin(), places.end(), 0);
  return places;
}();

struct alignas(64) Workspace {
  alignas(64) Packed keys[kMaxHead / kPack * kKeyTile];
  alignas(64) float scores[kMaxLast * kScoreStride];
};

// Scores (in units of log2) of one head's last queries with one key tile, into scores[r][kMaxLast + n]; keys in the
// future or past the end score -inf.
void score_tile(const EstimateArguments& a, const Factor* query, Workspace& w, int64_t first_key) {
  for (int r = 0; r < a.rows; r += kRows) {
    with_rows(std::min(kRows, a.rows - r), [&]<int R>() {
      float* scores = w.scores + r * kScoreStride + kMaxLast;
      product_rows<R, kQueryStride, false>(query + r * kQueryStride, w.keys, kKeyTile, scores, kScoreStride,
                                           a.cache.head_size, kKeyTile);
    });
  }
  const Floats scale = repeat(a.scale * kLog2e);
  for (int r = 0; r < a.rows; ++r) {
    float* row = w.scores + r * kScoreStride + kMaxLast;
    const int64_t visible = a.context_len + a.row_index[r] - first_key;  // last visible key of the tile
    const auto limit = static_cast<int32_t>(std::clamp<int64_t>(visible, -1, kKeyTile));
    for (int n = 0; n < kKeyTile; n += kLanes) {
      store(row + n, hide_after(load(row + n) * scale, kPlaces.data() + n, limit));
    }
  }
}

void load_keys(const EstimateArguments& a, Workspace& w, int kv_head, int64_t first_key) {
  const int size = a.cache.block_size;
  int at = 0;
  while (at < kKeyTile) {
    const int64_t key = first_key + at;
    if (key >= a.seq_len) {  // whole pages past the end: their keys are masked, but must not hold infinities
      for (int k = 0; k < a.cache.head_size / kPack; ++k) {
        std::memset(w.keys + k * kKeyTile + at, 0, (kKeyTile - at) * sizeof(Packed));
      }
      return;
    }
    const int slot = static_cast<int>(key % size);
    const int count = std::min(size - slot, kKeyTile - at);
    pack_keys(a.cache, a.pages[key / size], kv_head, slot, count, w.keys, at);
    at += count;
  }
}

}  // namespace
}  // namespace minference

// Counts the changes of the argument structures; minference_vllm/engines/native.py runs its own number only.
extern "C" int minference_interface() { return 4; }

extern "C" void minference_last_query_scores(const minference::EstimateArguments* arguments) {
  using namespace minference;
  const EstimateArguments& a = *arguments;
  const int group = a.num_heads / a.cache.num_kv_heads;
  const int row_groups = a.num_groups;
  const int64_t key_tiles = (a.seq_len + kKeyTile - 1) / kKeyTile;
  const int64_t parts = (key_tiles + kTilesPerTask - 1) / kTilesPerTask;

  std::vector<Factor> query(static_cast<size_t>(a.num_wanted) * a.rows * kQueryStride);
  for (int i = 0; i < a.num_wanted; ++i) {
    for (int r = 0; r < a.rows; ++r) {
      copy_factors(a.query + a.row_index[r] * a.query_token_stride + a.heads[i] * a.query_head_stride,
                   query.data() + (static_cast<size_t>(i) * a.rows + r) * kQueryStride, a.cache.head_size);
    }
  }
  // Wanted heads of one KV head stand together and share its packed keys.
  std::vector<int> first_of_group{0};
  for (int i = 1; i < a.num_wanted; ++i) {
    if (a.heads[i] / group != a.heads[i - 1] / group) first_of_group.push_back(i);
  }
  const int groups = static_cast<int>(first_of_group.size());
  first_of_group.push_back(a.num_wanted);

  const size_t num_rows = static_cast<size_t>(a.num_wanted) * a.rows;
  std::vector<float> maximum(num_rows * a.threads, -kInfinity), sum(num_rows * a.threads, 0.0f);
  std::vector<float> normalizer(num_rows);
  // Diagonals by place: key n of a group's row r lies at place n + (last row of the group) - r. A task's last places
  // reach into the next one's range and are kept apart.
  const int64_t places = key_tiles * kKeyTile;
  std::vector<float> by_place(static_cast<size_t>(a.num_wanted) * row_groups * places, 0.0f);
  std::vector<float> spill(static_cast<size_t>(a.num_wanted) * row_groups * parts * kMaxLast, 0.0f);
  const int tasks = static_cast<int>(groups * parts);
  int used_threads = 1;

#pragma omp parallel num_threads(a.threads)
  {
    static thread_local Workspace w;
    std::memset(w.scores, 0, sizeof w.scores);
#pragma omp single
    used_threads = omp_get_num_threads();
    float* my_maximum = maximum.data() + num_rows * omp_get_thread_num();
    float* my_sum = sum.data() + num_rows * omp_get_thread_num();
#pragma omp for schedule(dynamic, 1)
    for (int task = 0; task < tasks; ++task) {
      const int g = static_cast<int>(task / parts);
      const int64_t first_tile = task % parts * kTilesPerTask;
      for (int64_t t = first_tile; t < std::min(first_tile + kTilesPerTask, key_tiles); ++t) {
        load_keys(a, w, a.heads[first_of_group[g]] / group, t * kKeyTile);
        for (int i = first_of_group[g]; i < first_of_group[g + 1]; ++i) {
          score_tile(a, query.data() + static_cast<size_t>(i) * a.rows * kQueryStride, w, t * kKeyTile);
          for (int r = 0; r < a.rows; ++r) {
            const float* row = w.scores + r * kScoreStride + kMaxLast;
            Floats largest = load(row);
            for (int n = kLanes; n < kKeyTile; n += kLanes) largest = max(largest, load(row + n));
            const float found = reduce_max(largest);
            if (found == -kInfinity) continue;
            float& best = my_maximum[static_cast<size_t>(i) * a.rows + r];
            float& total = my_sum[static_cast<size_t>(i) * a.rows + r];
            if (found > best) {
              total *= best == -kInfinity ? 0.0f : std::exp2(best - found);
              best = found;
            }
            const Floats shift = repeat(best);
            Floats added = repeat(0.0f);
            for (int n = 0; n < kKeyTile; n += kLanes) added += exp2(load(row + n) - shift);
            total += reduce_add(added);
          }
        }
      }
    }
#pragma omp single
    for (size_t i = 0; i < num_rows; ++i) {
      float best = -kInfinity, total = 0.0f;
      for (int t = 0; t < used_threads; ++t) best = std::max(best, maximum[num_rows * t + i]);
      for (int t = 0; t < used_threads; ++t) {
        if (sum[num_rows * t + i] > 0.0f) total += sum[num_rows * t + i] * std::exp2(maximum[num_rows * t + i] - best);
      }
      normalizer[i] = best + std::log2(total);
    }
#pragma omp for schedule(dynamic, 1)
    for (int task = 0; task < tasks; ++task) {
      const int g = static_cast<int>(task / parts);
      const int64_t part = task % parts, first_tile = part * kTilesPerTask;
      const int64_t end_place = std::min((first_tile + kTilesPerTask) * kKeyTile, places);
      for (int64_t t = first_tile; t < std::min(first_tile + kTilesPerTask, key_tiles); ++t) {
        const int64_t first_key = t * kKeyTile;
        load_keys(a, w, a.heads[first_of_group[g]] / group, first_key);
        for (int i = first_of_group[g]; i < first_of_group[g + 1]; ++i) {
          score_tile(a, query.data() + static_cast<size_t>(i) * a.rows * kQueryStride, w, first_key);
          alignas(64) float column[kKeyTile];
          for (int n = 0; n < kKeyTile; n += kLanes) {
            Floats total = repeat(0.0f);
            for (int r = 0; r < a.rows; ++r) {
              float* x = w.scores + r * kScoreStride + kMaxLast + n;
              const Floats shift = repeat(normalizer[static_cast<size_t>(i) * a.rows + r]);
              const Floats weight = exp2(load(x) - shift);
              store(x, weight);
              total += weight;
            }
            store(column + n, total);
          }
          const int64_t here = std::min<int64_t>(kKeyTile, a.seq_len - first_key);
          std::memcpy(a.columns + i * a.seq_len + first_key, column, here * sizeof(float));
          for (int group = 0; group < row_groups; ++group) {
            const size_t series = static_cast<size_t>(i) * row_groups + group;
            float* place = by_place.data() + series * places;
            float* beyond = spill.data() + (series * parts + part) * kMaxLast;
            for (int p = 0; p < kKeyTile + kMaxLast; p += kLanes) {
              Floats total = repeat(0.0f);
              const int end = a.group_starts[group + 1];
              for (int r = a.group_starts[group]; r < end; ++r) {
                const float* x = w.scores + r * kScoreStride + kMaxLast + p - (end - 1 - r);
                total += load(x);
              }
              float* target = first_key + p < end_place ? place + first_key + p : beyond + (first_key + p - end_place);
              store(target, load(target) + total);
            }
          }
        }
      }
    }
#pragma omp for schedule(static)
    for (int i = 0; i < a.num_wanted; ++i) {
      float* out = a.diagonals + i * a.seq_len;
      std::fill(out, out + a.seq_len, kInfinity);
      for (int group = 0; group < row_groups; ++group) {
        const size_t series = static_cast<size_t>(i) * row_groups + group;
        float* place = by_place.data() + series * places;
        for (int64_t part = 0; part + 1 < parts; ++part) {
          const float* beyond = spill.data() + (series * parts + part) * kMaxLast;
          for (int n = 0; n < kMaxLast; ++n) place[(part + 1) * kTilesPerTask * kKeyTile + n] += beyond[n];
        }
        // Groups that do not reach that far back have no say.
        const int rows = a.group_starts[group + 1] - a.group_starts[group];
        const int64_t last = a.context_len + a.row_index[a.group_starts[group + 1] - 1];
        const float weight = static_cast<float>(a.rows) / static_cast<float>(rows);
        for (int64_t distance = 0; distance <= last; ++distance) {
          out[distance] = std::min(out[distance], weight * place[last - distance]);
        }
      }
    }
  }
}
