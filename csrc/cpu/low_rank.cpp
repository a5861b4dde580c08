// Levels of single keys per query tile, from queries and keys of few dimensions in small whole numbers (tile_levels in
// minference_vllm/low_rank.py), and how much of some rows' attention lies at each level. One task per head and tile, in
// two passes over the keys: the first for the largest product of every row and block of keys, the second for the keys
// of the blocks in which some row comes near enough to its norm. Rows lie in the lanes, so that a row's maximum needs
// no shuffles, and stay in 16 bits from the bytes that are multiplied to the level.
#include "tiles.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

namespace minference {

constexpr int kPeakKeys = 32;   // low_rank.PEAK_KEYS
constexpr int kLevels = 256;
constexpr int kTop = 254;       // the highest level of a key outside the tile's own pages
constexpr uint8_t kOwn = 255;

struct LevelArguments {
  const int8_t* query;         // [heads][chunk][rank], -63 to 63
  const int8_t* keys;          // [heads][seq_len][rank]
  const int16_t* step;         // [heads][chunk], levels per unit of a product, times 2^15
  const int32_t* lowest;       // [heads], levels below are reported as 0
  uint8_t* levels;             // [heads][tiles][seq_len]
  const int64_t* tile_starts;  // [tiles + 1], absolute positions
  int64_t seq_len;
  int32_t heads, tiles, tile, rank;
  float levels_per_bit;
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

constexpr float kNothing = 1e-9f;  // a million such weights are a thousandth of a row's attention
constexpr int kStep = 2 * kShorts;  // rows in two vectors
constexpr int kKeyStride = kMaxHead / 2 + 8;  // of loaded keys: a constant, and not a power of two (cache sets)
constexpr int16_t kLeast = std::numeric_limits<int16_t>::min();
constexpr int16_t kMost = std::numeric_limits<int16_t>::max();

struct LevelWorkspace {
  int32_t keys[kPeakKeys * kKeyStride];  // two bytes, twice
  alignas(64) int16_t best[kPeakKeys * kShorts];
  // Of the tile's rows: [rank / 2][rows] pairs of bytes; what products begin with; levels per unit; places; [key
  // blocks][rows]; the norm in units.
  std::vector<int16_t> query, offset, step, place, peaks, norm;
};

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
    const int64_t first = head_ * chunk + start_ - chunk_start;
    const int count = static_cast<int>(end_ - start_);
    w_.query.assign(a_.rank / 2 * rows_, 0);
    w_.offset.assign(rows_, 0);
    w_.step.assign(rows_, kMost);
    std::copy(a_.step + first, a_.step + first + count, w_.step.begin());
    w_.place.resize(rows_);
    std::iota(w_.place.begin(), w_.place.end(), int16_t{0});
    for (int r = 0; r < count; ++r) {
      const int8_t* row = a_.query + (first + r) * a_.rank;
      for (int k = 0; k < a_.rank / 2; ++k) std::memcpy(&w_.query[k * rows_ + r], row + 2 * k, 2);
      // Keys are loaded with 128 added, which this takes away. What does not fit comes back into 16 bits in the end.
      w_.offset[r] = static_cast<int16_t>(-128 * std::accumulate(row, row + a_.rank, 0));
    }
  }

  int load_keys(int64_t first) {
    const int count = static_cast<int>(std::min<int64_t>(kPeakKeys, end_ - first));
    for (int n = 0; n < count; ++n) {
      const int8_t* key = a_.keys + (head_ * a_.seq_len + first + n) * a_.rank;
      for (int k = 0; k < a_.rank; k += 16) repeat_byte_pairs(key + k, w_.keys + n * kKeyStride + k / 2);
    }
    return count;
  }

  // Products of R keys, the first of them `key`, with the rows of two vectors from r on.
  template <int R>
  void multiply(int key, int64_t r, Shorts (*product)[2]) {
    const Shorts low_offset = load(w_.offset.data() + r), high_offset = load(w_.offset.data() + r + kShorts);
    for (int i = 0; i < R; ++i) {
      product[i][0] = low_offset;
      product[i][1] = high_offset;
    }
    const int16_t* query = w_.query.data() + r;
    const int32_t* keys = w_.keys + key * kKeyStride;
    for (int k = 0; k < a_.rank / 2; ++k) {
      const Shorts low = load(query + k * rows_), high = load(query + k * rows_ + kShorts);
      for (int i = 0; i < R; ++i) {
        product[i][0] = multiply_add_bytes(keys[i * kKeyStride + k], low, product[i][0]);
        product[i][1] = multiply_add_bytes(keys[i * kKeyStride + k], high, product[i][1]);
      }
    }
  }

  void find_norms() {
    const int64_t blocks = (end_ + kPeakKeys - 1) / kPeakKeys;
    w_.peaks.resize(blocks * rows_);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = block * kPeakKeys;
      const int count = load_keys(first);
      int16_t* peaks = w_.peaks.data() + block * rows_;
      for (int64_t r = 0; r < rows_; r += kStep) {
        const int16_t* place = w_.place.data() + r;
        const bool causal = first + count - 1 > start_ + r;
        Shorts low_peak = repeat(kLeast), high_peak = low_peak;
        for (int n = 0; n < count; n += kRows) {
          with_rows(std::min(kRows, count - n), [&]<int R>() {
            Shorts product[R][2];
            multiply<R>(n, r, product);
            for (int i = 0; i < R; ++i) {
              if (causal) {  // a key is seen by rows at or after it
                const auto limit = static_cast<int16_t>(std::max<int64_t>(first + n + i - start_, -1));
                product[i][0] = hide_before(product[i][0], place, limit);
                product[i][1] = hide_before(product[i][1], place + kShorts, limit);
              }
              low_peak = max(low_peak, product[i][0]);
              high_peak = max(high_peak, product[i][1]);
            }
          });
        }
        store(peaks + r, low_peak);
        store(peaks + r + kShorts, high_peak);
      }
    }
    add_peaks(blocks);
  }

  // The norm of each row, from its peaks.
  void add_peaks(int64_t blocks) {
    w_.norm.assign(rows_, kMost);
    const float bits_per_step = 1.0f / (32768.0f * a_.levels_per_bit);
    for (int64_t r = 0; r < end_ - start_; r += kLanes) {
      const Floats bits = to_floats(w_.step.data() + r) * repeat(bits_per_step);
      const int16_t* peaks = w_.peaks.data() + r;
      Floats top = repeat(static_cast<float>(kLeast)), sum = repeat(0.0f);
      for (int64_t block = 0; block < blocks; ++block) top = max(top, to_floats(peaks + block * rows_));
      for (int64_t block = 0; block < blocks; ++block) sum += exp2((to_floats(peaks + block * rows_) - top) * bits);
      float tops[kLanes], sums[kLanes], unit[kLanes];
      store(tops, top);
      store(sums, sum);
      store(unit, bits);
      for (int64_t i = 0; i < std::min<int64_t>(kLanes, end_ - start_ - r); ++i) {
        const float norm = std::nearbyint(tops[i] + std::log2(sums[i]) / unit[i]);
        w_.norm[r + i] = static_cast<int16_t>(std::min(norm, static_cast<float>(kMost)));
      }
    }
  }

  // All of these keys lie before the tile's own pages.
  void rate_keys(int64_t first) {
    const int lowest = a_.lowest[head_], here = static_cast<int>(std::min<int64_t>(kPeakKeys, own_ - first));
    const int16_t* peaks = w_.peaks.data() + first / kPeakKeys * rows_;
    bool loaded = false;
    for (int64_t r = 0; r < rows_; r += kStep) {
      const int16_t *norm = w_.norm.data() + r, *step = w_.step.data() + r;
      const Shorts low_norm = load(norm), high_norm = load(norm + kShorts);
      const Shorts low_step = load(step), high_step = load(step + kShorts);
      const Shorts peak = max(scaled_difference(load(peaks + r), low_norm, low_step),
                              scaled_difference(load(peaks + r + kShorts), high_norm, high_step));
      if (kTop + reduce_max(peak) < lowest) continue;
      if (!loaded) {
        load_keys(first);
        std::fill(w_.best, w_.best + kPeakKeys * kShorts, kLeast);
        loaded = true;
      }
      for (int n = 0; n < here; n += kRows) {
        with_rows(std::min(kRows, here - n), [&]<int R>() {
          Shorts product[R][2];
          multiply<R>(n, r, product);
          for (int i = 0; i < R; ++i) {
            int16_t* best = w_.best + (n + i) * kShorts;
            const Shorts nearest = max(scaled_difference(product[i][0], low_norm, low_step),
                                       scaled_difference(product[i][1], high_norm, high_step));
            store(best, max(load(best), nearest));
          }
        });
      }
    }
    if (!loaded) {
      std::memset(levels_ + first, 0, here);
      return;
    }
    for (int n = 0; n < here; ++n) {
      const int level = std::clamp(kTop + reduce_max(load(w_.best + n * kShorts)), 0, kTop);
      levels_[first + n] = static_cast<uint8_t>(level < lowest ? 0 : level);
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
