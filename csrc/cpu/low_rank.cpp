// Score bins of all keys per query tile, and the attention of some rows per bin, from queries and keys of few
// dimensions in int8; QuantizedQK in interface.h says what a bin is.
//
// Keys are taken in blocks of kPeakKeys. approx_lse is the log-sum-exp of a row's largest product in every block, which
// needs one exponential per block. tile_score_bins has one task per head and tile, with two passes over the keys: the
// first finds the largest products and approx_lse, the second multiplies again only the blocks whose largest products
// reach `min_bin`. Rows are in the lanes, so that a row's maximum needs no shuffles, and all values from the products
// to the bins are int16.
#include "score_bins.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

namespace minference {
namespace {

constexpr int kPeakKeys = 32;                 // PEAK_KEYS in Python
constexpr int kRowBlock = 2 * kShorts;        // rows in two vectors
constexpr int kKeyStride = kMaxHead / 2 + 8;  // of loaded keys: a constant, and not a power of two (cache sets)
constexpr int16_t kMin = std::numeric_limits<int16_t>::min();
constexpr int16_t kMax = std::numeric_limits<int16_t>::max();

struct Workspace {
  int32_t keys[kPeakKeys * kKeyStride];           // [keys][rank / 2], see repeat_byte_pairs
  alignas(64) int16_t best[kPeakKeys * kShorts];  // [keys][lanes], largest bins so far, less kTopBin
  // All by row, padded to whole row blocks.
  std::vector<int16_t> query;          // [rank / 2][rows], pairs of int8
  std::vector<int16_t> offset;         // [rows], added to every product, see load_rows
  std::vector<int16_t> dequant_scale;  // [rows]
  std::vector<int16_t> peaks;          // [key blocks][rows], largest product of each block
  std::vector<int16_t> approx_lse;     // [rows], in units of a product
  std::vector<int16_t> visible;        // [rows], how many keys of the current block a row sees
  std::vector<int64_t> position;       // [rows]
};

// Some rows of one head, and their products with the keys.
class Rows {
 public:
  Rows(const QuantizedQK& qk, Workspace& space, int head) : qk_(qk), w_(space), head_(head) {}

  int count = 0;
  int64_t padded = 0;  // `count` rounded up to whole row blocks

  // Loads rows row_of(0) .. row_of(rows - 1) of the chunk, ascending. Padding rows have products of 0 and an approx_lse
  // of INT16_MAX, so that their bins are 0.
  template <typename RowOf>
  void load_rows(int rows, const RowOf& row_of) {
    count = rows;
    padded = (rows + kRowBlock - 1) / kRowBlock * kRowBlock;
    w_.query.assign(qk_.rank / 2 * padded, 0);
    w_.offset.assign(padded, 0);
    w_.dequant_scale.assign(padded, kMax);
    w_.position.assign(padded, 0);
    w_.visible.resize(padded);
    for (int r = 0; r < count; ++r) {
      const int64_t place = head_ * qk_.chunk + row_of(r);
      const int8_t* row = qk_.query + place * qk_.rank;
      for (int k = 0; k < qk_.rank / 2; ++k) std::memcpy(&w_.query[k * padded + r], row + 2 * k, 2);
      // Keys are loaded with 128 added, which this offset cancels. Sums may wrap around on the way: they are modulo
      // 2^16, and the final product fits.
      w_.offset[r] = static_cast<int16_t>(-128 * std::accumulate(row, row + qk_.rank, 0));
      w_.dequant_scale[r] = qk_.dequant_scale[place];
      w_.position[r] = qk_.seq_len - qk_.chunk + row_of(r);
    }
  }

  int load_keys(int64_t first, int64_t end) {
    const int keys = static_cast<int>(std::min<int64_t>(kPeakKeys, end - first));
    for (int n = 0; n < keys; ++n) {
      const int8_t* key = qk_.keys + (head_ * qk_.seq_len + first + n) * qk_.rank;
      for (int k = 0; k < qk_.rank; k += 16) repeat_byte_pairs(key + k, w_.keys + n * kKeyStride + k / 2);
    }
    return keys;
  }

  // Calls use(key, low, high) for each of the loaded keys, with its products with the rows from r on, two vectors.
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

  // Sets peaks and approx_lse, over the keys that each row sees.
  void find_approx_lse() {
    const int64_t end = w_.position[count - 1] + 1, blocks = (end + kPeakKeys - 1) / kPeakKeys;
    w_.peaks.resize(blocks * padded);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = block * kPeakKeys;
      const int keys = load_keys(first, end);
      int16_t* peaks = w_.peaks.data() + block * padded;
      for (int64_t r = 0; r < padded; r += kRowBlock) {
        Shorts low = repeat(kMin), high = low;
        if (first + keys - 1 <= w_.position[r]) {
          multiply(keys, r, [&](int, Shorts low_product, Shorts high_product) {
            low = max(low, low_product);
            high = max(high, high_product);
          });
        } else {
          int16_t* visible = w_.visible.data();
          for (int i = 0; i < kRowBlock; ++i) {
            visible[i] = static_cast<int16_t>(std::clamp<int64_t>(w_.position[r + i] + 1 - first, 0, kPeakKeys));
          }
          multiply(keys, r, [&](int n, Shorts low_product, Shorts high_product) {
            low = max(low, hide_before(low_product, visible, static_cast<int16_t>(n + 1)));
            high = max(high, hide_before(high_product, visible + kShorts, static_cast<int16_t>(n + 1)));
          });
        }
        store(peaks + r, low);
        store(peaks + r + kShorts, high);
      }
    }
    sum_peaks(blocks);
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
    for (int k = 0; k < qk_.rank / 2; ++k) {
      const Shorts low = load(query + k * padded), high = load(query + k * padded + kShorts);
      for (int i = 0; i < R; ++i) {
        product[i][0] = multiply_add_bytes(keys[i * kKeyStride + k], low, product[i][0]);
        product[i][1] = multiply_add_bytes(keys[i * kKeyStride + k], high, product[i][1]);
      }
    }
  }

  void sum_peaks(int64_t blocks) {
    w_.approx_lse.assign(padded, kMax);
    const float bits_per_scale = 1.0f / (32768.0f * qk_.bins_per_bit);
    for (int64_t r = 0; r < count; r += kLanes) {
      const Floats bits = to_floats(w_.dequant_scale.data() + r) * repeat(bits_per_scale);
      const int16_t* peaks = w_.peaks.data() + r;
      Floats top = repeat(static_cast<float>(kMin)), sum = repeat(0.0f);
      for (int64_t block = 0; block < blocks; ++block) top = max(top, to_floats(peaks + block * padded));
      for (int64_t block = 0; block < blocks; ++block) sum += exp2((to_floats(peaks + block * padded) - top) * bits);
      float tops[kLanes], sums[kLanes], bits_per_unit[kLanes];
      store(tops, top);
      store(sums, sum);
      store(bits_per_unit, bits);
      for (int64_t i = 0; i < std::min<int64_t>(kLanes, count - r); ++i) {
        const float lse = std::nearbyint(tops[i] + std::log2(sums[i]) / bits_per_unit[i]);
        w_.approx_lse[r + i] = static_cast<int16_t>(std::min(lse, static_cast<float>(kMax)));
      }
    }
  }

  const QuantizedQK& qk_;
  Workspace& w_;
  int head_;
};

// The bin of a key that is `bins` above approx_lse.
int to_bin(int bins) { return std::clamp(kTopBin + bins, 0, kTopBin); }

class TileTask {
 public:
  TileTask(const TileScoreBinArguments& arguments, Workspace& space, int head, int tile)
      : w_(space), rows_(arguments.qk, space, head), min_bin_(arguments.min_bin[head]) {
    const int64_t chunk_start = arguments.tile_starts[0], seq_len = arguments.qk.seq_len;
    const int64_t start = arguments.tile_starts[tile], end = arguments.tile_starts[tile + 1];
    local_ = start / arguments.tile * arguments.tile;
    bins_ = arguments.bins + (static_cast<int64_t>(head) * arguments.tiles + tile) * seq_len;
    rows_.load_rows(static_cast<int>(end - start), [&](int r) { return start - chunk_start + r; });
    rows_.find_approx_lse();
    for (int64_t first = 0; first < local_; first += kPeakKeys) write_bins(first);
    std::memset(bins_ + local_, kLocalBin, end - local_);
    std::memset(bins_ + end, 0, seq_len - end);
  }

 private:
  // Of the block of keys from `first` on, up to the tile's own pages: every row sees all of them.
  void write_bins(int64_t first) {
    const int here = static_cast<int>(std::min<int64_t>(kPeakKeys, local_ - first));
    const int16_t* peaks = w_.peaks.data() + first / kPeakKeys * rows_.padded;
    bool loaded = false;
    for (int64_t r = 0; r < rows_.padded; r += kRowBlock) {
      const int16_t *lse = w_.approx_lse.data() + r, *scale = w_.dequant_scale.data() + r;
      const Shorts low_lse = load(lse), high_lse = load(lse + kShorts);
      const Shorts low_scale = load(scale), high_scale = load(scale + kShorts);
      // The larger of two rows' bins, less kTopBin.
      const auto largest = [&](Shorts low, Shorts high) {
        return max(scaled_difference(low, low_lse, low_scale), scaled_difference(high, high_lse, high_scale));
      };
      if (to_bin(reduce_max(largest(load(peaks + r), load(peaks + r + kShorts)))) < min_bin_) continue;
      if (!loaded) {
        rows_.load_keys(first, local_);
        std::fill(w_.best, w_.best + kPeakKeys * kShorts, kMin);
        loaded = true;
      }
      rows_.multiply(here, r, [&](int n, Shorts low, Shorts high) {
        int16_t* best = w_.best + n * kShorts;
        store(best, max(load(best), largest(low, high)));
      });
    }
    if (!loaded) {
      std::memset(bins_ + first, 0, here);
      return;
    }
    for (int n = 0; n < here; ++n) {
      const int bin = to_bin(reduce_max(load(w_.best + n * kShorts)));
      bins_[first + n] = static_cast<uint8_t>(bin < min_bin_ ? 0 : bin);
    }
  }

  Workspace& w_;
  Rows rows_;
  int min_bin_;
  int64_t local_;  // position of the first key in the tile's own pages
  uint8_t* bins_;
};

// The attention of some rows of one head per bin, where each row gives the keys their bins by itself.
void find_row_mass(const RowMassArguments& a, Workspace& w, int head, int first_row, int rows) {
  const QuantizedQK& qk = a.qk;
  Rows part(qk, w, head);
  part.load_rows(rows, [&](int r) { return a.rows[first_row + r]; });
  part.find_approx_lse();
  for (int r = 0; r < rows; ++r) {
    const int64_t local = w.position[r] / a.tile * a.tile;
    const int64_t place = static_cast<int64_t>(head) * a.num_rows + first_row + r;
    const float* weights = a.weights + place * qk.seq_len;
    float* mass = a.mass + place * kBins;
    std::fill(mass, mass + kBins, 0.0f);
    const int8_t* query = qk.query + (head * qk.chunk + a.rows[first_row + r]) * qk.rank;
    const float rest = for_weights(weights, qk.seq_len, [&](int64_t position, float weight) {
      int bin = kLocalBin;
      if (position < local) {
        const int8_t* key = qk.keys + (head * qk.seq_len + position) * qk.rank;
        int product = 0;
        for (int k = 0; k < qk.rank; ++k) product += query[k] * key[k];
        const int above = std::clamp<int>(product - w.approx_lse[r], kMin, kMax);
        bin = to_bin((above * w.dequant_scale[r] + (1 << 14)) >> 15);  // rounded as scaled_difference does
      }
      mass[bin] += weight;
    });
    mass[0] += rest;
  }
}

}  // namespace
}  // namespace minference

extern "C" void minference_tile_score_bins(const minference::TileScoreBinArguments* arguments) {
  const int heads = arguments->qk.heads, tasks = heads * arguments->tiles;
#pragma omp parallel num_threads(arguments->qk.threads)
  {
    static thread_local minference::Workspace space;
#pragma omp for schedule(dynamic, 1)
    for (int task = 0; task < tasks; ++task) {
      minference::TileTask(*arguments, space, task % heads, task / heads);
    }
  }
}

extern "C" void minference_row_mass(const minference::RowMassArguments* arguments) {
  using namespace minference;
  const RowMassArguments& a = *arguments;
  const int parts = (a.num_rows + kRowBlock - 1) / kRowBlock;
#pragma omp parallel num_threads(a.qk.threads)
  {
    static thread_local Workspace space;
#pragma omp for schedule(dynamic, 1)
    for (int task = 0; task < a.qk.heads * parts; ++task) {
      const int first_row = task % parts * kRowBlock;
      find_row_mass(a, space, task / parts, first_row, std::min(kRowBlock, a.num_rows - first_row));
    }
  }
}
