// Levels of single keys per query tile, from queries and keys of few dimensions (tile_levels in
// minference_vllm/low_rank.py), and how much of some rows' attention lies at each level. One task per head and tile, in
// two passes over the keys: the first for the largest score of every row and block of keys, the second for the keys of
// the blocks in which some row comes near enough to its norm. Rows lie in the lanes, so that a row's maximum needs no
// shuffles.
#include "tiles.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

namespace minference {

constexpr int kPeakKeys = 32;   // low_rank.PEAK_KEYS
constexpr int kLevels = 256;
constexpr int kTop = 254;       // the highest level of a key outside the tile's own pages
constexpr uint8_t kOwn = 255;

struct LevelArguments {
  const bf16* query;           // [heads][chunk][rank], scores in units of log2
  const bf16* keys;            // [heads][seq_len][rank]
  const int32_t* lowest;       // [heads], levels below are reported as 0
  uint8_t* levels;             // [heads][tiles][seq_len]
  const int64_t* tile_starts;  // [tiles + 1], absolute positions
  int64_t seq_len;
  int32_t heads, tiles, tile, rank;
  float per_unit;              // levels per unit of score
  int32_t threads;
};

struct MassArguments {
  const uint8_t* levels;      // [heads][lists][seq_len]
  const int64_t* list;        // [rows], the list of each row
  const float* weights;       // [heads][rows][seq_len]
  float* mass;                // [heads][kLevels]
  int64_t seq_len;
  int32_t heads, rows, lists;
  int32_t threads;
};

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNothing = 1e-9f;  // a million such weights are a thousandth of a row's attention
constexpr int kStep = 2 * kLanes;    // rows in two vectors
constexpr int kKeyStride = 144;      // of copied keys: a constant, and not a power of two (cache sets)

struct LevelWorkspace {
  alignas(64) Factor keys[kPeakKeys * kKeyStride];
  alignas(64) float best[kPeakKeys * kLanes];
  std::vector<Packed> query;  // [rank / kPack][rows]
  std::vector<int32_t> minus_position;
  std::vector<float> peaks, norm;  // [key blocks][rows], [rows]
};

// Scores of R keys with the rows of two vectors, handed to use(key, vector, scores).
template <int R, typename Use>
inline void score(const Factor* keys, const Packed* query, int64_t rows, int rank, const Use& use) {
  Floats sum[R][2];
  for (int i = 0; i < R; ++i) sum[i][0] = sum[i][1] = repeat(0.0f);
  for (int k = 0; k < rank / kPack; ++k) {
    const Floats low = load_packed(query + k * rows), high = load_packed(query + k * rows + kLanes);
    for (int i = 0; i < R; ++i) {
      const Floats left = repeat_factors(keys + i * kKeyStride + kPack * k);
      sum[i][0] = multiply_add(left, low, sum[i][0]);
      sum[i][1] = multiply_add(left, high, sum[i][1]);
    }
  }
  for (int i = 0; i < R; ++i) use(i, sum[i][0], sum[i][1]);
}

class LevelTask {
 public:
  LevelTask(const LevelArguments& arguments, LevelWorkspace& space, int head, int tile)
      : a_(arguments), w_(space), head_(head) {
    start_ = a_.tile_starts[tile];
    end_ = a_.tile_starts[tile + 1];
    own_ = start_ / a_.tile * a_.tile;
    rows_ = (end_ - start_ + kStep - 1) / kStep * kStep;
    levels_ = a_.levels + (static_cast<int64_t>(head) * a_.tiles + tile) * a_.seq_len;
  }

  void run() {
    load_query();
    find_norms();
    for (int64_t first = 0; first < own_; first += kPeakKeys) rate_keys(first);
    std::memset(levels_ + own_, kOwn, end_ - own_);
    std::memset(levels_ + end_, 0, a_.seq_len - end_);
  }

 private:
  // Rows past the tile's last are zeros, and have no say.
  void load_query() {
    const int64_t chunk_start = a_.tile_starts[0], chunk = a_.tile_starts[a_.tiles] - chunk_start;
    const bf16* rows = a_.query + (head_ * chunk + start_ - chunk_start) * a_.rank;
    const int count = static_cast<int>(end_ - start_);
    w_.query.assign(static_cast<size_t>(a_.rank / kPack) * rows_, Packed{});
    Factor factors[kMaxHead];
    for (int r = 0; r < count; ++r) {
      copy_factors(rows + static_cast<int64_t>(r) * a_.rank, factors, a_.rank);
      for (int k = 0; k < a_.rank / kPack; ++k) std::memcpy(&w_.query[k * rows_ + r], factors + kPack * k, sizeof(Packed));
    }
    w_.minus_position.resize(rows_);
    for (int r = 0; r < rows_; ++r) w_.minus_position[r] = static_cast<int32_t>(-(start_ + r));
  }

  int load_keys(int64_t first) {
    const int count = static_cast<int>(std::min<int64_t>(kPeakKeys, end_ - first));
    for (int n = 0; n < count; ++n) {
      copy_factors(a_.keys + (head_ * a_.seq_len + first + n) * a_.rank, w_.keys + n * kKeyStride, a_.rank);
    }
    return count;
  }

  // Calls use(key, vector, vector) for `count` loaded keys with the rows from r on.
  template <typename Use>
  void score_keys(int count, int64_t r, const Use& use) {
    for (int n = 0; n < count; n += kRows) {
      with_rows(std::min(kRows, count - n), [&]<int R>() {
        score<R>(w_.keys + n * kKeyStride, w_.query.data() + r, rows_, a_.rank,
                 [&](int i, Floats low, Floats high) { use(n + i, low, high); });
      });
    }
  }

  void find_norms() {
    const int64_t blocks = (end_ + kPeakKeys - 1) / kPeakKeys;
    w_.peaks.resize(static_cast<size_t>(blocks) * rows_);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = block * kPeakKeys;
      const int count = load_keys(first);
      float* peaks = w_.peaks.data() + block * rows_;
      // Kept in memory: the registers are full.
      std::fill(peaks, peaks + rows_, -kInfinity);
      for (int64_t r = 0; r < rows_; r += kStep) {
        const int32_t* minus = w_.minus_position.data() + r;
        const bool causal = first + count - 1 > start_ + r;
        score_keys(count, r, [&](int n, Floats low, Floats high) {
          if (causal) {  // a key is seen by rows at or after it
            const auto limit = static_cast<int32_t>(-(first + n));
            low = hide_after(low, minus, limit);
            high = hide_after(high, minus + kLanes, limit);
          }
          store(peaks + r, max(load(peaks + r), low));
          store(peaks + r + kLanes, max(load(peaks + r + kLanes), high));
        });
      }
    }
    w_.norm.resize(rows_);
    for (int64_t r = 0; r < rows_; r += kLanes) {
      Floats top = repeat(-kInfinity), sum = repeat(0.0f);
      for (int64_t block = 0; block < blocks; ++block) top = max(top, load(w_.peaks.data() + block * rows_ + r));
      for (int64_t block = 0; block < blocks; ++block) sum += exp2(load(w_.peaks.data() + block * rows_ + r) - top);
      store(w_.norm.data() + r, top);
      float sums[kLanes];
      store(sums, sum);
      for (int i = 0; i < kLanes; ++i) {
        w_.norm[r + i] = start_ + r + i < end_ ? w_.norm[r + i] + std::log2(sums[i]) : kInfinity;
      }
    }
  }

  // All of these keys lie before the tile's own pages.
  void rate_keys(int64_t first) {
    const float reach = static_cast<float>(kTop + 1 - a_.lowest[head_]) / a_.per_unit;
    const float* peaks = w_.peaks.data() + first / kPeakKeys * rows_;
    int count = 0;
    for (int64_t r = 0; r < rows_; r += kStep) {
      const float* norm = w_.norm.data() + r;
      const Floats low_peak = load(peaks + r) - load(norm), high_peak = load(peaks + r + kLanes) - load(norm + kLanes);
      if (reduce_max(max(low_peak, high_peak)) < -reach) continue;
      if (count == 0) {
        count = load_keys(first);
        std::fill(w_.best, w_.best + kPeakKeys * kLanes, -kInfinity);
      }
      score_keys(count, r, [&](int n, Floats low, Floats high) {
        float* best = w_.best + n * kLanes;
        store(best, max(load(best), max(low - load(norm), high - load(norm + kLanes))));
      });
    }
    const int here = static_cast<int>(std::min<int64_t>(kPeakKeys, own_ - first));
    if (count == 0) {
      std::memset(levels_ + first, 0, here);
      return;
    }
    for (int n = 0; n < here; ++n) {
      const float level = static_cast<float>(kTop) + a_.per_unit * reduce_max(load(w_.best + n * kLanes));
      const int found = static_cast<int>(std::clamp(level, 0.0f, static_cast<float>(kTop)));
      levels_[first + n] = static_cast<uint8_t>(found < a_.lowest[head_] ? 0 : found);
    }
  }

  const LevelArguments& a_;
  LevelWorkspace& w_;
  int head_;
  int64_t start_, end_, own_, rows_;
  uint8_t* levels_;
};

}  // namespace
}  // namespace minference

extern "C" void minference_tile_levels(const minference::LevelArguments* arguments) {
  const int tasks = arguments->heads * arguments->tiles;
#pragma omp parallel num_threads(arguments->threads)
  {
    static thread_local minference::LevelWorkspace space;
#pragma omp for schedule(dynamic, 1)
    for (int task = 0; task < tasks; ++task) {
      minference::LevelTask(*arguments, space, task % arguments->heads, task / arguments->heads).run();
    }
  }
}

extern "C" void minference_mass_by_level(const minference::MassArguments* arguments) {
  using namespace minference;
  const MassArguments& a = *arguments;
  std::vector<float> by_row(static_cast<size_t>(a.heads) * a.rows * kLevels, 0.0f);
#pragma omp parallel for num_threads(a.threads) schedule(dynamic, 1)
  for (int64_t task = 0; task < static_cast<int64_t>(a.heads) * a.rows; ++task) {
    const uint8_t* levels = a.levels + (task / a.rows * a.lists + a.list[task % a.rows]) * a.seq_len;
    const float* weights = a.weights + task * a.seq_len;
    float* mass = by_row.data() + task * kLevels;
    const int64_t whole = a.seq_len / kLanes * kLanes;
    for (int64_t key = 0; key < whole; key += kLanes) {
      if (reduce_max(load(weights + key)) < kNothing) continue;
      for (int i = 0; i < kLanes; ++i) mass[levels[key + i]] += weights[key + i];
    }
    for (int64_t key = whole; key < a.seq_len; ++key) mass[levels[key]] += weights[key];
  }
  std::fill(a.mass, a.mass + static_cast<int64_t>(a.heads) * kLevels, 0.0f);
  for (int64_t row = 0; row < static_cast<int64_t>(a.heads) * a.rows; ++row) {
    float* mass = a.mass + row / a.rows * kLevels;
    for (int level = 0; level < kLevels; ++level) mass[level] += by_row[row * kLevels + level] / a.rows;
  }
}
