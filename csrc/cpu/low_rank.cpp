// Score bins of all keys per query tile, from queries and keys of few dimensions in int8 (tile_bins in Python).
//
// Each vector lane holds a key, and queries are processed one after the other: the largest product of a key minus
// approx_lse is a running maximum in its lane. approx_lse is computed first, from some groups of keys, with one
// exponential each. All values from the products to the bins fit int16.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "score_bins.h"

namespace minference {
namespace {

constexpr int kPeakKeys = 2 * kSums;  // PEAK_KEYS in Python, 32
constexpr int64_t kLeastGroups = 64, kMaxGroupStep = 16;
constexpr float kMostUnits = 32767.0f;  // limit of approx_lse

struct alignas(64) ByteWorkspace {
  alignas(64) Sum products[kPeakKeys * kPeakKeys];  // [queries][keys], where tiles are multiplied
  std::vector<int32_t> query;                       // [queries][rank / kBytes], see to_repeat
  std::vector<Sum> offset;                          // [queries], initial values of their sums
  std::vector<Sum> approx_lse;                      // [queries], in units of a product
  std::vector<int16_t> peaks;  // [groups][queries padded to kLanes], the largest product of each group
};

// Keys of all heads in groups of kPeakKeys, [heads][groups][rank / kBytes][kPeakKeys][kBytes] as uint8 with 128 added:
// the keys of a group are in the lanes of two vectors.
class KeysInLanes {
 public:
  explicit KeysInLanes(const QuantizedQK& qk)
      : qk_(qk),
        groups_((qk.seq_len + kPeakKeys - 1) / kPeakKeys),
        bytes_(new int8_t[static_cast<size_t>(qk.heads * groups_ * kPeakKeys) * qk.rank]) {}

  int64_t tasks() const { return qk_.heads * groups_; }

  void fill(int64_t task) {
    const int64_t head = task / groups_, first = task % groups_ * kPeakKeys;
    int8_t* group = bytes_.get() + task * kPeakKeys * qk_.rank;
    for (int n = 0; n < kPeakKeys; ++n) {
      // Repeats the last key past the end; these results are not used.
      const int8_t* key = qk_.keys + (head * qk_.seq_len + std::min(first + n, qk_.seq_len - 1)) * qk_.rank;
      int8_t* place = group + n * kBytes;
      for (int k = 0; k < qk_.rank; k += kBytes, place += kPeakKeys * kBytes) {
        Sum bytes;
        std::memcpy(&bytes, key + k, kBytes);
        bytes ^= static_cast<Sum>(0x80808080);
        std::memcpy(place, &bytes, kBytes);
      }
    }
  }

  const int8_t* group(int head, int64_t group) const {
    return bytes_.get() + (head * groups_ + group) * kPeakKeys * qk_.rank;
  }

 private:
  const QuantizedQK& qk_;
  int64_t groups_;
  std::unique_ptr<int8_t[]> bytes_;
};

class TileTask {
 public:
  TileTask(const TileScoreBinArguments& arguments, const KeysInLanes& keys, ByteWorkspace& space, int head, int tile)
      : qk_(arguments.qk), keys_(keys), w_(space), head_(head) {
    const int64_t place = static_cast<int64_t>(head) * qk_.tiles + tile;
    rows_ = qk_.count[place];
    query_ = qk_.query + place * qk_.per_tile * qk_.rank;
    position_ = qk_.position + place * qk_.per_tile;
    dequant_scale_ = qk_.dequant_scale[place];
    end_ = arguments.tile_starts[tile + 1];
    own_ = arguments.tile_starts[tile] / arguments.tile * arguments.tile;  // the first key in the tile's own pages
    padded_ = (rows_ + kLanes - 1) / kLanes * kLanes;
    load_queries();
    const auto step = std::clamp<int64_t>(own_ / (kPeakKeys * kLeastGroups), 1, kMaxGroupStep);
    find_approx_lse(arguments.all_groups[head] ? 1 : step);
    uint8_t* bins = arguments.bins + place * qk_.seq_len;
    for (int64_t first = 0; first < own_; first += kPeakKeys) {
      uint8_t found[kPeakKeys];
      find_bins(first / kPeakKeys, found);
      std::memcpy(bins + first, found, std::min<int64_t>(kPeakKeys, own_ - first));
    }
    std::memset(bins + own_, kLocalBin, end_ - own_);
    std::memset(bins + end_, 0, qk_.seq_len - end_);
  }

 private:
  // Keys are stored with 128 added, which a query's offset cancels. 16-bit sums may wrap around in between: the final
  // product fits.
  void load_queries() {
    const int steps = qk_.rank / kBytes;
    w_.query.resize(static_cast<size_t>(rows_) * steps);
    w_.offset.resize(rows_);
    w_.approx_lse.assign(padded_, 0);
    for (int r = 0; r < rows_; ++r) {
      for (int k = 0; k < steps; ++k) w_.query[r * steps + k] = to_repeat(row(r) + k * kBytes);
      w_.offset[r] = static_cast<Sum>(-128 * std::accumulate(row(r), row(r) + qk_.rank, 0));
    }
  }

  // Calls use(r, low, high) for every query, with its products with the keys of a group, minus approx_lse.
  template <typename Use>
  [[gnu::always_inline]] void multiply(const int8_t* keys, const Use& use) {
    int r = 0;
#ifdef __AMX_INT8__
    static_assert(kPeakKeys == 32);
    for (; r + 32 <= rows_; r += 32) {
      byte_products(row(r), qk_.rank, keys, qk_.rank, w_.products);
      for (int i = 0; i < 32; ++i) {
        const Sum* products = w_.products + i * kPeakKeys;
        use(r + i, add_sums(load(products), begin(r + i)), add_sums(load(products + kSums), begin(r + i)));
      }
    }
#endif
    for (; r < rows_; r += 4) multiply_four(r, keys, use);
  }

  // For four queries from `first` on, repeating the last one past the end. Sums are separate variables: gcc 12 would
  // keep an array in memory.
  template <typename Use>
  [[gnu::always_inline]] void multiply_four(int first, const int8_t* keys, const Use& use) {
    const int last = rows_ - 1, b = std::min(first + 1, last), c = std::min(first + 2, last),
              d = std::min(first + 3, last);
    const int steps = qk_.rank / kBytes;
    const int32_t* query = w_.query.data();
    const int32_t *row_a = query + first * steps, *row_b = query + b * steps, *row_c = query + c * steps,
                  *row_d = query + d * steps;
    Sums low_a = begin(first), low_b = begin(b), low_c = begin(c), low_d = begin(d);
    Sums high_a = low_a, high_b = low_b, high_c = low_c, high_d = low_d;
    for (int k = 0; k < steps; ++k, keys += kPeakKeys * kBytes) {
      const Sums low = load_bytes(keys), high = load_bytes(keys + kSums * kBytes);
      Sums here = repeat_bytes(row_a[k]);
      low_a = multiply_add_bytes(low, here, low_a), high_a = multiply_add_bytes(high, here, high_a);
      here = repeat_bytes(row_b[k]);
      low_b = multiply_add_bytes(low, here, low_b), high_b = multiply_add_bytes(high, here, high_b);
      here = repeat_bytes(row_c[k]);
      low_c = multiply_add_bytes(low, here, low_c), high_c = multiply_add_bytes(high, here, high_c);
      here = repeat_bytes(row_d[k]);
      low_d = multiply_add_bytes(low, here, low_d), high_d = multiply_add_bytes(high, here, high_d);
    }
    const Sum* lse = w_.approx_lse.data();
    use(first, end_of_sum(low_a, lse[first]), end_of_sum(high_a, lse[first]));
    use(b, end_of_sum(low_b, lse[b]), end_of_sum(high_b, lse[b]));
    use(c, end_of_sum(low_c, lse[c]), end_of_sum(high_c, lse[c]));
    use(d, end_of_sum(low_d, lse[d]), end_of_sum(high_d, lse[d]));
  }

  const int8_t* row(int r) const { return query_ + static_cast<int64_t>(r) * qk_.rank; }
  Sums begin(int r) const { return repeat_sum(begin_of_sum(w_.offset[r], w_.approx_lse[r])); }

  void find_bins(int64_t group, uint8_t* bins) {
    Sums best_low = repeat_sum(std::numeric_limits<Sum>::min()), best_high = best_low;
    multiply(keys_.group(head_, group), [&](int, Sums low, Sums high) {
      best_low = max_sums(best_low, low), best_high = max_sums(best_high, high);
    });
    alignas(64) Sum units[kPeakKeys];
    store(units, best_low);
    store(units + kSums, best_high);
    for (int n = 0; n < kPeakKeys; ++n) {
      const int most = std::max<int>(units[n], std::numeric_limits<int16_t>::min());
      const int bin = kTopBin + ((most * dequant_scale_ + (1 << 14)) >> 15);
      bins[n] = static_cast<uint8_t>(std::clamp(bin, 0, kTopBin));
    }
  }

  // Log-sum-exp of a query's largest products in the sampled groups, see approx_lse in Python.
  void find_approx_lse(int64_t step) {
    const int64_t far = (own_ + kPeakKeys * step - 1) / (kPeakKeys * step);
    const int64_t first = own_ / kPeakKeys, groups = far + (end_ + kPeakKeys - 1) / kPeakKeys - first;
    w_.peaks.resize(groups * padded_);
    for (int64_t i = 0; i < groups; ++i) {
      const bool before = i < far;
      const int64_t group = before ? i * step : first + i - far, start = group * kPeakKeys;
      const int64_t begin = before ? 0 : std::max<int64_t>(own_ - start, 0);
      int16_t* peaks = w_.peaks.data() + i * padded_;
      multiply(keys_.group(head_, group), [&](int r, Sums low, Sums high) {
        const int64_t end = std::min<int64_t>((before ? own_ : position_[r] + 1) - start, kPeakKeys);
        if (end <= begin) {
          peaks[r] = std::numeric_limits<int16_t>::min();
          return;
        }
        if (begin == 0 && end == kPeakKeys) {
          peaks[r] = static_cast<int16_t>(reduce_max_sums(max_sums(low, high)));
          return;
        }
        alignas(64) Sum products[kPeakKeys];
        store(products, low);
        store(products + kSums, high);
        peaks[r] = static_cast<int16_t>(*std::max_element(products + begin, products + end));
      });
    }
    sum_peaks(groups, far, std::log2(static_cast<float>(step)));
  }

  // `more`: log2 of the number of groups that each far group except the first represents.
  void sum_peaks(int64_t groups, int64_t far, float more) {
    const float bits_per_unit = static_cast<float>(dequant_scale_) / (32768.0f * qk_.bins_per_bit);
    const Floats bits = repeat(bits_per_unit);
    const auto peak = [&](int64_t group, int64_t r) {
      return to_floats(w_.peaks.data() + group * padded_ + r) * bits + repeat(group > 0 && group < far ? more : 0.0f);
    };
    for (int64_t r = 0; r < rows_; r += kLanes) {
      Floats top = repeat(-kInfinity), sum = repeat(0.0f);
      for (int64_t group = 0; group < groups; ++group) top = max(top, peak(group, r));
      for (int64_t group = 0; group < groups; ++group) sum += exp2(peak(group, r) - top);
      float tops[kLanes], sums[kLanes];
      store(tops, top);
      store(sums, sum);
      for (int64_t i = 0; i < std::min<int64_t>(kLanes, rows_ - r); ++i) {
        const float units = std::nearbyint((tops[i] + std::log2(sums[i])) / bits_per_unit);
        w_.approx_lse[r + i] = static_cast<Sum>(std::clamp(units, -kMostUnits, kMostUnits));
      }
    }
  }

  const QuantizedQK& qk_;
  const KeysInLanes& keys_;
  ByteWorkspace& w_;
  int rows_, head_, dequant_scale_;
  const int8_t* query_;
  const int32_t* position_;
  int64_t own_, end_, padded_;
};

}  // namespace
}  // namespace minference

extern "C" void minference_tile_score_bins(const minference::TileScoreBinArguments* arguments) {
  const minference::QuantizedQK& qk = arguments->qk;
  const int tasks = qk.heads * qk.tiles;
  minference::KeysInLanes keys(qk);
#pragma omp parallel num_threads(qk.threads)
  {
    auto& space = minference::thread_workspace<minference::ByteWorkspace>();
    const minference::ProductUnit unit(minference::byte_step(qk.rank));
#pragma omp for schedule(static)
    for (int64_t task = 0; task < keys.tasks(); ++task) keys.fill(task);
#pragma omp for schedule(dynamic, 1)
    for (int task = 0; task < tasks; ++task) {
      minference::TileTask(*arguments, keys, space, task % qk.heads, task / qk.heads);
    }
  }
}
