// Levels of single keys per query tile, from queries and keys of few dimensions in small whole numbers (tile_levels in
// minference_vllm/levels.py), and how much of some rows' attention lies at each. One task per head and tile, in two
// passes over the keys: the first for the largest product of every row and block of keys, the second for the keys
// of the blocks in which some row comes near enough to its norm. Rows lie in the lanes, so that a row's maximum needs
// no shuffles, and stay in 16 bits from the bytes that are multiplied to the level.
#include "levels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

namespace minference {

constexpr int kPeakKeys = 32;  // levels.PEAK_KEYS
constexpr int kTop = 254;      // the highest level of a key outside the tile's own pages
constexpr uint8_t kOwn = 255;

struct Factors {
  const int8_t* query;  // [heads][chunk][rank], -63 to 63
  const int8_t* keys;   // [heads][seq_len][rank]
  const int16_t* step;  // [heads][chunk], levels per unit of a product, times 2^15
  int64_t chunk, seq_len;
  int32_t heads, rank;
  float levels_per_bit;
  int32_t threads;
};

struct LevelArguments {
  Factors of;
  const int32_t* lowest;       // [heads], levels below are reported as 0
  uint8_t* levels;             // [heads][tiles][seq_len]
  const int64_t* tile_starts;  // [tiles + 1], absolute positions
  int32_t tiles, tile;
};

struct RowMassArguments {
  Factors of;
  const int64_t* rows;   // [num_rows], rows of the chunk, ascending
  const float* weights;  // [heads][num_rows][seq_len]
  float* mass;           // [heads][num_rows][kLevels]
  int32_t num_rows, tile;
};

namespace {

constexpr int kStep = 2 * kShorts;  // rows in two vectors
constexpr int kKeyStride = kMaxHead / 2 + 8;  // of loaded keys: a constant, and not a power of two (cache sets)
constexpr int16_t kLeast = std::numeric_limits<int16_t>::min();
constexpr int16_t kMost = std::numeric_limits<int16_t>::max();

struct Workspace {
  int32_t keys[kPeakKeys * kKeyStride];  // two bytes, twice
  alignas(64) int16_t best[kPeakKeys * kShorts];
  // Of the rows at hand: [rank / 2][rows] pairs of bytes; what products begin with; levels per unit; [key blocks][rows];
  // norms in units; how many keys of a block they see.
  std::vector<int16_t> query, offset, step, peaks, norm, seen;
  std::vector<int64_t> position;
};

// Some rows of one head, in vectors, and their products with the keys.
class Rows {
 public:
  Rows(const Factors& factors, Workspace& space, int head) : f_(factors), w_(space), head_(head) {}

  int count = 0;
  int64_t padded = 0;  // rows that there is room for: those past the last are zeros, and have no say

  // Takes row_of(0) .. row_of(rows - 1) of the chunk, ascending.
  template <typename RowOf>
  void load_rows(int rows, const RowOf& row_of) {
    count = rows;
    padded = (rows + kStep - 1) / kStep * kStep;
    w_.query.assign(f_.rank / 2 * padded, 0);
    w_.offset.assign(padded, 0);
    w_.step.assign(padded, kMost);
    w_.position.assign(padded, 0);
    w_.seen.resize(padded);
    for (int r = 0; r < count; ++r) {
      const int64_t place = head_ * f_.chunk + row_of(r);
      const int8_t* row = f_.query + place * f_.rank;
      for (int k = 0; k < f_.rank / 2; ++k) std::memcpy(&w_.query[k * padded + r], row + 2 * k, 2);
      // Keys are loaded with 128 added, which this takes away. What does not fit comes back into 16 bits in the end.
      w_.offset[r] = static_cast<int16_t>(-128 * std::accumulate(row, row + f_.rank, 0));
      w_.step[r] = f_.step[place];
      w_.position[r] = f_.seq_len - f_.chunk + row_of(r);
    }
  }

  int load_keys(int64_t first, int64_t end) {
    const int keys = static_cast<int>(std::min<int64_t>(kPeakKeys, end - first));
    for (int n = 0; n < keys; ++n) {
      const int8_t* key = f_.keys + (head_ * f_.seq_len + first + n) * f_.rank;
      for (int k = 0; k < f_.rank; k += 16) repeat_byte_pairs(key + k, w_.keys + n * kKeyStride + k / 2);
    }
    return keys;
  }

  // Calls use(key, product, product) with each of the loaded keys' products with the rows of two vectors from r on.
  template <typename Use>
  void multiply(int keys, int64_t r, const Use& use) {
    for (int n = 0; n < keys; n += kRows) {
      with_rows(std::min(kRows, keys - n), [&]<int R>() {
        Shorts product[R][2];
        multiply<R>(n, r, product);
        for (int i = 0; i < R; ++i) use(n + i, product[i][0], product[i][1]);
      });
    }
  }

  // The largest product of every row and block of keys, and the rows' norms, over the keys that they see.
  void find_norms() {
    const int64_t end = w_.position[count - 1] + 1, blocks = (end + kPeakKeys - 1) / kPeakKeys;
    w_.peaks.resize(blocks * padded);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = block * kPeakKeys;
      const int keys = load_keys(first, end);
      int16_t* peaks = w_.peaks.data() + block * padded;
      for (int64_t r = 0; r < padded; r += kStep) {
        Shorts low = repeat(kLeast), high = low;
        if (first + keys - 1 <= w_.position[r]) {
          multiply(keys, r, [&](int, Shorts low_product, Shorts high_product) {
            low = max(low, low_product);
            high = max(high, high_product);
          });
        } else {
          int16_t* seen = w_.seen.data();
          for (int i = 0; i < kStep; ++i) {
            seen[i] = static_cast<int16_t>(std::clamp<int64_t>(w_.position[r + i] + 1 - first, 0, kPeakKeys));
          }
          multiply(keys, r, [&](int n, Shorts low_product, Shorts high_product) {
            low = max(low, hide_before(low_product, seen, static_cast<int16_t>(n + 1)));
            high = max(high, hide_before(high_product, seen + kShorts, static_cast<int16_t>(n + 1)));
          });
        }
        store(peaks + r, low);
        store(peaks + r + kShorts, high);
      }
    }
    add_peaks(blocks);
  }

 private:
  template <int R>
  void multiply(int key, int64_t r, Shorts (*product)[2]) {
    const Shorts low_offset = load(w_.offset.data() + r), high_offset = load(w_.offset.data() + r + kShorts);
    for (int i = 0; i < R; ++i) {
      product[i][0] = low_offset;
      product[i][1] = high_offset;
    }
    const int16_t* query = w_.query.data() + r;
    const int32_t* keys = w_.keys + key * kKeyStride;
    for (int k = 0; k < f_.rank / 2; ++k) {
      const Shorts low = load(query + k * padded), high = load(query + k * padded + kShorts);
      for (int i = 0; i < R; ++i) {
        product[i][0] = multiply_add_bytes(keys[i * kKeyStride + k], low, product[i][0]);
        product[i][1] = multiply_add_bytes(keys[i * kKeyStride + k], high, product[i][1]);
      }
    }
  }

  void add_peaks(int64_t blocks) {
    w_.norm.assign(padded, kMost);
    const float bits_per_step = 1.0f / (32768.0f * f_.levels_per_bit);
    for (int64_t r = 0; r < count; r += kLanes) {
      const Floats bits = to_floats(w_.step.data() + r) * repeat(bits_per_step);
      const int16_t* peaks = w_.peaks.data() + r;
      Floats top = repeat(static_cast<float>(kLeast)), sum = repeat(0.0f);
      for (int64_t block = 0; block < blocks; ++block) top = max(top, to_floats(peaks + block * padded));
      for (int64_t block = 0; block < blocks; ++block) sum += exp2((to_floats(peaks + block * padded) - top) * bits);
      float tops[kLanes], sums[kLanes], unit[kLanes];
      store(tops, top);
      store(sums, sum);
      store(unit, bits);
      for (int64_t i = 0; i < std::min<int64_t>(kLanes, count - r); ++i) {
        const float norm = std::nearbyint(tops[i] + std::log2(sums[i]) / unit[i]);
        w_.norm[r + i] = static_cast<int16_t>(std::min(norm, static_cast<float>(kMost)));
      }
    }
  }

  const Factors& f_;
  Workspace& w_;
  int head_;
};

int as_level(int nearest) { return std::clamp(kTop + nearest, 0, kTop); }

class LevelTask {
 public:
  LevelTask(const LevelArguments& arguments, Workspace& space, int head, int tile)
      : w_(space), rows_(arguments.of, space, head), lowest_(arguments.lowest[head]) {
    const int64_t chunk_start = arguments.tile_starts[0], seq_len = arguments.of.seq_len;
    const int64_t start = arguments.tile_starts[tile], end = arguments.tile_starts[tile + 1];
    own_ = start / arguments.tile * arguments.tile;
    levels_ = arguments.levels + (static_cast<int64_t>(head) * arguments.tiles + tile) * seq_len;
    rows_.load_rows(static_cast<int>(end - start), [&](int r) { return start - chunk_start + r; });
    rows_.find_norms();
    for (int64_t first = 0; first < own_; first += kPeakKeys) rate_keys(first);
    std::memset(levels_ + own_, kOwn, end - own_);
    std::memset(levels_ + end, 0, seq_len - end);
  }

 private:
  // All of these keys lie before the tile's own pages.
  void rate_keys(int64_t first) {
    const int here = static_cast<int>(std::min<int64_t>(kPeakKeys, own_ - first));
    const int16_t* peaks = w_.peaks.data() + first / kPeakKeys * rows_.padded;
    bool loaded = false;
    for (int64_t r = 0; r < rows_.padded; r += kStep) {
      const int16_t *norm = w_.norm.data() + r, *step = w_.step.data() + r;
      const Shorts low_norm = load(norm), high_norm = load(norm + kShorts);
      const Shorts low_step = load(step), high_step = load(step + kShorts);
      const auto nearest = [&](Shorts low, Shorts high) {
        return max(scaled_difference(low, low_norm, low_step), scaled_difference(high, high_norm, high_step));
      };
      if (as_level(reduce_max(nearest(load(peaks + r), load(peaks + r + kShorts)))) < lowest_) continue;
      if (!loaded) {
        rows_.load_keys(first, own_);
        std::fill(w_.best, w_.best + kPeakKeys * kShorts, kLeast);
        loaded = true;
      }
      rows_.multiply(here, r, [&](int n, Shorts low, Shorts high) {
        int16_t* best = w_.best + n * kShorts;
        store(best, max(load(best), nearest(low, high)));
      });
    }
    if (!loaded) {
      std::memset(levels_ + first, 0, here);
      return;
    }
    for (int n = 0; n < here; ++n) {
      const int level = as_level(reduce_max(load(w_.best + n * kShorts)));
      levels_[first + n] = static_cast<uint8_t>(level < lowest_ ? 0 : level);
    }
  }

  Workspace& w_;
  Rows rows_;
  int lowest_;
  int64_t own_;
  uint8_t* levels_;
};

// The attention of some rows of one head by the levels that they themselves give the keys.
void find_row_mass(const RowMassArguments& a, Workspace& w, int head, int first_row, int rows) {
  const Factors& f = a.of;
  Rows part(f, w, head);
  part.load_rows(rows, [&](int r) { return a.rows[first_row + r]; });
  part.find_norms();
  for (int r = 0; r < rows; ++r) {
    const int64_t own = w.position[r] / a.tile * a.tile, place = static_cast<int64_t>(head) * a.num_rows + first_row + r;
    const float* weights = a.weights + place * f.seq_len;
    float* mass = a.mass + place * kLevels;
    std::fill(mass, mass + kLevels, 0.0f);
    const int8_t* query = f.query + (head * f.chunk + a.rows[first_row + r]) * f.rank;
    const float rest = for_weights(weights, f.seq_len, [&](int64_t key, float weight) {
      int level = kOwn;
      if (key < own) {
        const int8_t* factors = f.keys + (head * f.seq_len + key) * f.rank;
        int product = 0;
        for (int k = 0; k < f.rank; ++k) product += query[k] * factors[k];
        const int above = std::clamp<int>(product - w.norm[r], kLeast, kMost);
        level = as_level((above * w.step[r] + (1 << 14)) >> 15);
      }
      mass[level] += weight;
    });
    mass[0] += rest;
  }
}

}  // namespace
}  // namespace minference

extern "C" void minference_tile_levels(const minference::LevelArguments* arguments) {
  const int heads = arguments->of.heads, tasks = heads * arguments->tiles;
#pragma omp parallel num_threads(arguments->of.threads)
  {
    static thread_local minference::Workspace space;
#pragma omp for schedule(dynamic, 1)
    for (int task = 0; task < tasks; ++task) {
      minference::LevelTask(*arguments, space, task % heads, task / heads);
    }
  }
}

extern "C" void minference_row_mass(const minference::RowMassArguments* arguments) {
  using namespace minference;
  const RowMassArguments& a = *arguments;
  const int parts = (a.num_rows + kStep - 1) / kStep;
#pragma omp parallel num_threads(a.of.threads)
  {
    static thread_local Workspace space;
#pragma omp for schedule(dynamic, 1)
    for (int task = 0; task < a.of.heads * parts; ++task) {
      const int first_row = task % parts * kStep;
      find_row_mass(a, space, task / parts, first_row, std::min(kStep, a.num_rows - first_row));
    }
  }
}
