// Rows of queries of few dimensions in int8, their products with the keys, and the bins that follow from these;
// QuantizedQK in interface.h says what a bin is.
//
// Keys are taken in blocks of kPeakKeys. approx_lse is the log-sum-exp of a row's largest product in every block, which
// needs one exponential per block. Products fit int16, and so does everything from them to the bins.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "score_bins.h"

namespace minference {

constexpr int kPeakKeys = 32;              // PEAK_KEYS in Python
constexpr int kRowBlock = 2 * kShorts;     // rows that are multiplied together
constexpr int kParts = kRowBlock / kSums;  // vectors of their products
constexpr int kKeyVectors = kPeakKeys / kShorts;
constexpr int kKeyStride = kMaxHead / kBytes + 8;  // of loaded keys: a constant, and not a power of two (cache sets)
constexpr int kRowsForTiles = 8;  // of kShorts, from which on the AMX unit multiplies them all
constexpr int16_t kMin = std::numeric_limits<int16_t>::min();
constexpr int16_t kMax = std::numeric_limits<int16_t>::max();

struct alignas(64) ByteWorkspace {
  alignas(64) int32_t keys[kPeakKeys * kKeyStride];  // [keys][rank / kBytes], see copy_bytes
  alignas(64) Sum products[kPeakKeys * kRowBlock];   // [keys][rows], where tiles are multiplied
  // All by row, padded to whole row blocks.
  std::vector<int8_t> query;           // [rank / kBytes][rows][kBytes]
  std::vector<Sum> offset;             // [rows], added to every product, see load_rows
  std::vector<int16_t> dequant_scale;  // [rows]
  std::vector<int16_t> peaks;          // [key blocks][rows], largest product of each block
  std::vector<int16_t> approx_lse;     // [rows], in units of a product
  std::vector<int16_t> visible;        // [rows], how many keys of the current block a row sees
  std::vector<int64_t> position;       // [rows]
  std::vector<const int8_t*> bytes;    // [rows], each row's rank int8
};

// Keys of all heads in blocks of kPeakKeys, [heads][blocks][rank / kBytes][kPeakKeys][kBytes] as uint8 with 128 added:
// the keys of a block are in the lanes of kKeyVectors vectors, in the order in which pack_sums wants their sums.
class KeysInLanes {
 public:
  explicit KeysInLanes(const QuantizedQK& qk)
      : qk_(qk),
        blocks_((qk.seq_len + kPeakKeys - 1) / kPeakKeys),
        bytes_(new int8_t[static_cast<size_t>(qk.heads * blocks_ * kPeakKeys) * qk.rank]) {}

  int64_t tasks() const { return qk_.heads * blocks_; }

  void fill(int64_t task) {
    const int64_t head = task / blocks_, first = task % blocks_ * kPeakKeys;
    int8_t* block = bytes_.get() + task * kPeakKeys * qk_.rank;
    for (int n = 0; n < kPeakKeys; ++n) {
      // Past the last key this one once more: nobody asks for what becomes of it.
      const int8_t* key = qk_.keys + (head * qk_.seq_len + std::min(first + n, qk_.seq_len - 1)) * qk_.rank;
      int8_t* place = block + (n / kShorts * kShorts + place_of_sum(n % kShorts)) * kBytes;
      for (int k = 0; k < qk_.rank; k += kBytes, place += kPeakKeys * kBytes) {
        Sum bytes;
        std::memcpy(&bytes, key + k, kBytes);
        bytes ^= static_cast<Sum>(0x80808080);
        std::memcpy(place, &bytes, kBytes);
      }
    }
  }

  const int8_t* block(int head, int64_t block) const {
    return bytes_.get() + (head * blocks_ + block) * kPeakKeys * qk_.rank;
  }

 private:
  const QuantizedQK& qk_;
  int64_t blocks_;
  std::unique_ptr<int8_t[]> bytes_;
};

// Some rows of one head, and their products with the keys.
class ByteRows {
 public:
  ByteRows(const QuantizedQK& qk, ByteWorkspace& space, int head) : qk_(qk), w_(space), head_(head) {}

  int count = 0;
  int64_t padded = 0;  // `count` rounded up to whole row blocks

  // Loads rows row_of(0) .. row_of(rows - 1) of the chunk, ascending. Padding rows have products of 0 and an approx_lse
  // of INT16_MAX, so that their bins are 0.
  template <typename RowOf>
  void load_rows(int rows, const RowOf& row_of) {
    count = rows;
    padded = (rows + kRowBlock - 1) / kRowBlock * kRowBlock;
    w_.query.assign(qk_.rank * padded, 0);
    w_.offset.assign(padded, 0);
    w_.dequant_scale.assign(padded, kMax);
    w_.position.assign(padded, 0);
    w_.visible.resize(padded);
    w_.bytes.resize(count);
    for (int r = 0; r < count; ++r) {
      const int64_t place = head_ * qk_.chunk + row_of(r);
      const int8_t* row = w_.bytes[r] = qk_.query + place * qk_.rank;
      for (int k = 0; k < qk_.rank; k += kBytes) std::memcpy(&w_.query[k * padded + kBytes * r], row + k, kBytes);
      // Keys are loaded with 128 added, which this offset cancels. Sums of 16 bits may wrap around on the way: the
      // final product fits.
      w_.offset[r] = static_cast<Sum>(-128 * std::accumulate(row, row + qk_.rank, 0));
      w_.dequant_scale[r] = qk_.dequant_scale[place];
      w_.position[r] = qk_.seq_len - qk_.chunk + row_of(r);
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
          Sums most[kParts];
          std::fill(most, most + kParts, least_sums());
          multiply(keys, r, [&](int, const Sums* products) {
            for (int p = 0; p < kParts; ++p) most[p] = max_sums(most[p], products[p]);
          });
          low = to_shorts(most), high = to_shorts(most + kParts / 2);
        } else {
          int16_t* visible = w_.visible.data();
          for (int i = 0; i < kRowBlock; ++i) {
            visible[i] = static_cast<int16_t>(std::clamp<int64_t>(w_.position[r + i] + 1 - first, 0, kPeakKeys));
          }
          multiply(keys, r, [&](int n, const Sums* products) {
            const auto limit = static_cast<int16_t>(n + 1);
            low = max(low, hide_before(to_shorts(products), visible, limit));
            high = max(high, hide_before(to_shorts(products + kParts / 2), visible + kShorts, limit));
          });
        }
        store(peaks + r, low);
        store(peaks + r + kShorts, high);
      }
    }
    sum_peaks(blocks);
  }

  // Raises `best` to the bins, less kTopBin, that some rows give the keys of a block, which are in lanes. The rows
  // follow each other in the chunk; there is a bit for each, from row r on.
  [[gnu::always_inline]] void raise_bins(int64_t r, uint32_t rows, const int8_t* keys, Shorts* best) {
#ifdef __AMX_INT8__
    static_assert(kPeakKeys == 32 && kShorts == 32);
    if (std::popcount(rows) >= kRowsForTiles && r + kShorts <= count) {
      byte_products_of_32(w_.bytes[r], qk_.rank, keys, qk_.rank, w_.products);
      for (; rows != 0; rows &= rows - 1) {
        const int row = std::countr_zero(rows);
        const Sums offset = repeat_sum(w_.offset[r + row]);
        Sums sum[2];
        unrolled<2>([&]<int V>() { sum[V] = add_sums(load(w_.products + row * kPeakKeys + V * kSums), offset); });
        best[0] = max(best[0], bins_of_sums(r + row, sum));
      }
      return;
    }
#endif
    for (; rows != 0; rows &= rows - 1) {
      const int64_t row = r + std::countr_zero(rows);
      if (row >= count) break;
      Shorts bins[kKeyVectors];
      bins_of_row(row, keys, bins);
      unrolled<kKeyVectors>([&]<int V>() { best[V] = max(best[V], bins[V]); });
    }
  }

  // The bins, less kTopBin, that row r gives the keys of a block, which are in lanes.
  [[gnu::always_inline]] void bins_of_row(int64_t r, const int8_t* keys, Shorts* bins) const {
    constexpr int kVectors = kPeakKeys / kSums;
    Sums sum[kVectors];
    unrolled<kVectors>([&]<int V>() { sum[V] = repeat_sum(w_.offset[r]); });
    const int8_t* query = w_.bytes[r];
    for (int k = 0; k < qk_.rank; k += kBytes, keys += kPeakKeys * kBytes) {
      const Sums row = repeat_bytes(query + k);
      unrolled<kVectors>(
          [&]<int V>() { sum[V] = multiply_add_bytes(load_bytes(keys + V * kSums * kBytes), row, sum[V]); });
    }
    unrolled<kKeyVectors>([&]<int V>() { bins[V] = bins_of_sums(r, sum + V * kShorts / kSums); });
  }

 private:
  // Those of kShorts keys, from their products.
  Shorts bins_of_sums(int64_t r, const Sums* sum) const {
    return scaled_difference(pack_sums(sum), repeat(w_.approx_lse[r]), repeat(w_.dequant_scale[r]));
  }

  // load_keys loads a block of keys and returns how many there are before `end`. multiply calls use(key, products) for
  // each of them, with its products with the rows from r on: kParts vectors.
#ifdef __AMX_INT8__
  int load_keys(int64_t first, int64_t end) {
    const auto keys = static_cast<int>(std::min<int64_t>(kPeakKeys, end - first));
    loaded_ = qk_.keys + (head_ * qk_.seq_len + first) * qk_.rank;
    if (first + kPeakKeys > qk_.seq_len) {
      auto* copy = reinterpret_cast<int8_t*>(w_.keys);
      std::memcpy(copy, loaded_, static_cast<size_t>(keys) * qk_.rank);
      loaded_ = copy;
    }
    return keys;
  }

  template <typename Use>
  void multiply(int keys, int64_t r, const Use& use) {
    static_assert(kPeakKeys == 32 && kRowBlock == 64);
    byte_products(loaded_, qk_.rank, w_.query.data() + kBytes * r, kBytes * padded, qk_.rank, w_.products);
    for (int n = 0; n < keys; ++n) {
      Sums products[kParts];
      unrolled<kParts>([&]<int P>() { products[P] = load(w_.products + n * kRowBlock + P * kSums); });
      use(n, products);
    }
  }

  const int8_t* loaded_ = nullptr;
#else
  int load_keys(int64_t first, int64_t end) {
    const int keys = static_cast<int>(std::min<int64_t>(kPeakKeys, end - first));
    for (int n = 0; n < keys; ++n) {
      const int8_t* key = qk_.keys + (head_ * qk_.seq_len + first + n) * qk_.rank;
      for (int k = 0; k < qk_.rank; k += 16) copy_bytes(key + k, w_.keys + n * kKeyStride + k / kBytes);
    }
    return keys;
  }

  template <typename Use>
  void multiply(int keys, int64_t r, const Use& use) {
    for (int n = 0; n < keys; n += kKeys) {
      with_rows<kKeys>(std::min(kKeys, keys - n), [&]<int R>() { multiply<R>(n, r, use); });
    }
  }

  template <int R, typename Use>
  void multiply(int key, int64_t r, const Use& use) {
    Sums sum[R][kParts];
    unrolled<kParts>([&]<int P>() {
      const Sums offset = load(w_.offset.data() + r + P * kSums);
      unrolled<R>([&]<int I>() { sum[I][P] = offset; });
    });
    const int8_t* query = w_.query.data() + kBytes * r;
    const int32_t* keys = w_.keys + key * kKeyStride;
    for (int k = 0; k < qk_.rank / kBytes; ++k, query += kBytes * padded) {
      Sums rows[kParts];
      unrolled<kParts>([&]<int P>() { rows[P] = load_bytes(query + P * kBytes * kSums); });
      unrolled<R>([&]<int I>() {
        const Sums here = repeat_bytes(keys[I * kKeyStride + k]);
        unrolled<kParts>([&]<int P>() { sum[I][P] = multiply_add_bytes(here, rows[P], sum[I][P]); });
      });
    }
    unrolled<R>([&]<int I>() {
      Sums products[kParts];
      unrolled<kParts>([&]<int P>() { products[P] = sum[I][P]; });
      use(key + I, products);
    });
  }
#endif

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
  ByteWorkspace& w_;
  int head_;
};

}  // namespace minference
