// The interface to Python: the library's functions and the structures of their arguments.
//
// minference_vllm/kernels/native/interface.py mirrors them with ctypes. The library describes them (interface.cpp), and
// Python compares names, types and offsets before it uses the library. When the meaning of a field changes, rename it,
// so that a library built before the change is recognised.
//
// Shapes are in brackets; all tensors are contiguous unless the structure has strides. `heads` are query heads, `tiles`
// are query tiles, `chunk` is the number of query rows, `seq_len` counts the tokens up to the chunk's last one.
// Positions count from the start of the sequence, strides are in elements. `threads` is the number of OpenMP threads.
#pragma once

#include <cstdint>

namespace minference {

using bf16 = uint16_t;
using pair = uint32_t;  // two bf16, the lower index in the low half
struct fp16 {
  uint16_t bits;
};

// A page in memory, for one KV head:
//   rows:       keys and values [block_size][head_size], with `row_stride` between tokens
//   transposed: keys [head_size][block_size], values [block_size][head_size]
//   amx:        bf16 in tiles of the AMX unit. Pairs along the dimension that a product sums over stay together: keys
//               [block_size / 16][head_size / 2][16 tokens][2], values [head_size / 16][block_size / 2][16 dims][2]
enum class Layout : int32_t { rows = 0, transposed = 1, amx = 2 };
enum class Element : int32_t { bfloat16 = 0, float32 = 1, float16 = 2 };

// Keys and values of one layer in vLLM's pages. KV head h of page p starts at p * page_stride + h * head_stride.
struct Cache {
  const void* key;
  const void* value;
  int64_t page_stride;
  int64_t head_stride;
  int64_t row_stride;  // layout `rows` only
  int32_t block_size;  // tokens per page, a multiple of 32
  int32_t head_size;   // a multiple of 16, at most 256
  int32_t num_kv_heads;
  Layout layout;
  Element element;  // of the cache, the queries and the output
};

// Attention of one chunk under a SparseIndex.
struct AttendArguments {
  Cache cache;
  const void* query;  // row r, head h at r * query_token_stride + h * query_head_stride
  void* out;          // written; row r, head h at r * out_token_stride + h * out_head_stride
  float* lse;         // [heads][chunk], written; natural log-sum-exp, including sink and remainder. May be null
  int64_t query_token_stride, query_head_stride, out_token_stride, out_head_stride;
  const int64_t* pages;        // [logical blocks], the physical page of each
  const int64_t* tile_starts;  // [tiles + 1], positions
  const int32_t* blocks;       // [heads][tiles][max_blocks], logical blocks, ascending
  const int32_t* num_blocks;   // [heads][tiles]
  const int32_t* columns;      // [heads][tiles][max_columns], positions of single keys
  const int32_t* num_columns;  // [heads][tiles]
  const uint8_t* column_codes;  // [heads][tiles][max_columns], a column counts 2^(code / 6) times. Null: once
  const float* sinks;          // [heads], logit of each head's attention sink. May be null
  const float* remainder_key;    // [heads][tiles][head_size], one key for all that a tile leaves out. May be null
  const float* remainder_value;  // [heads][tiles][head_size]
  const float* remainder_bias;   // [heads][tiles], added to its score; -inf: no remainder. Null: none at all
  int64_t seq_len;
  int64_t window;  // maximum keys that a row sees, including itself; 0: no window
  int32_t heads, tiles, max_blocks, max_columns;
  float scale;  // of query-key products before the softmax
  float softcap;  // scores s become softcap * tanh(s / softcap); 0: no cap
  int32_t threads;
};

// The remainder of each tile of some heads: the keys that it leaves out, as one key and one value.
struct RemainderArguments {
  Cache cache;
  const void* query;  // the whole chunk; row r, head h at r * query_token_stride + h * query_head_stride
  int64_t query_token_stride, query_head_stride;
  const int64_t* pages;        // [logical blocks], the physical page of each
  const int64_t* tile_starts;  // [tiles + 1], positions
  const int32_t* blocks;       // [lists][tiles][max_blocks], logical blocks; -1 first: the tile attends everything
  const int32_t* num_blocks;   // [lists][tiles]
  const int32_t* columns;      // [lists][tiles][max_columns], positions of single keys, in any order
  const int32_t* num_columns;  // [lists][tiles]
  const int64_t* sampled;      // [num_sampled], positions of the sampled keys, ascending
  const int32_t* heads;        // [num_wanted], query heads, ascending
  float* key;    // [num_heads][tiles][head_size], written if a wanted head's tile leaves something out; zeros on entry
  float* value;  // [num_heads][tiles][head_size], likewise
  float* bias;   // [num_heads][tiles], likewise; -inf on entry
  int64_t seq_len;
  int64_t window;  // maximum keys that a row sees, including itself; 0: no window
  int32_t num_heads, num_wanted;
  int32_t heads_per_list;  // neighbouring query heads that share each list
  int32_t tiles, max_blocks, max_columns;
  int32_t num_sampled;  // less than 2^15
  float scale;          // of query-key products before the softmax
  float softcap;        // scores s become softcap * tanh(s / softcap); 0: no cap
  float log_step;       // natural logarithm of the number of keys per sampled key
  int32_t threads;
};

// Some query rows of some heads, for exact attention over all keys.
struct RowArguments {
  Cache cache;
  const void* query;  // the whole chunk; row r, head h at r * query_token_stride + h * query_head_stride
  int64_t query_token_stride, query_head_stride;
  const int64_t* pages;      // [logical blocks], the physical page of each
  const int64_t* row_index;  // [rows], rows of the chunk, ascending
  const int32_t* heads;      // [num_wanted], query heads, ascending
  int64_t context_len;       // position of the chunk's first row
  int64_t seq_len;
  int64_t window;  // maximum keys that a row sees, including itself; 0: no window
  int32_t num_heads, num_wanted;
  int32_t rows;   // at most 64
  float scale;    // of query-key products before the softmax
  float softcap;  // scores s become softcap * tanh(s / softcap); 0: no cap
  int32_t threads;
};

struct RowShareArguments {
  RowArguments row_arguments;
  const float* log_norms;  // [num_wanted][seq_len], log2 of the values' norms
  bf16* shares;            // [num_wanted][rows][seq_len], written: softmax weights times norms, normalised to sum 1
};

struct ColumnDiagonalArguments {
  RowArguments row_arguments;   // its rows are the probe queries
  const int32_t* group_starts;  // [num_groups + 1], where each group of neighbouring rows starts in row_index
  float* columns;               // [num_wanted][seq_len], written: weight of each key
  float* diagonals;             // [num_wanted][seq_len], written: weight at each distance from query to key
  int32_t num_groups;
};

// All keys of a sequence in few dimensions, as int8 (quantize_keys in Python).
struct KeyCodeArguments {
  Cache cache;
  const int64_t* pages;  // [logical blocks], the physical page of each
  const int32_t* heads;  // [num_wanted], query heads
  const float* to_key;   // [num_wanted][head_size][rank], the projection
  const float* center;   // [num_wanted][rank], the projection of the mean key
  int8_t* codes;         // [num_wanted][seq_len][rank], written
  int64_t seq_len;
  int32_t num_heads, num_wanted;
  int32_t rank;      // at most 256
  int32_t max_code;  // largest element
  float max_norm;    // longer keys are shortened to it
  int32_t threads;
};

// The representative rows of every tile, or all of its candidates (representatives in Python).
struct RepresentativeArguments {
  const float* low;            // [heads][chunk][rank], queries in few dimensions
  const float* key_size;       // [heads][rank]
  const int64_t* tile_starts;  // [tiles + 1], positions
  float* out;                  // [heads][tiles][per_tile][rank], written: their queries; past `count` the last again
  int32_t* position;           // [heads][tiles][per_tile], written
  int32_t* count;              // [heads][tiles], written
  int64_t context_len, chunk;
  int32_t heads, tiles, rank;
  int32_t step;      // stride between the candidate rows of a tile
  int32_t per_tile;  // maximum candidates of a tile, at most 128
  int32_t wanted;    // maximum representatives of a tile, unless all candidates are taken
  float least_size;  // lower bound of the keys' size in a dimension
  float least_apart;  // added to squared distances from the mean, so that one row is taken even if all are equal
  float alike;  // all candidates are taken if one is farther than this from its nearest representative
  int32_t threads;
};

// Queries and keys of few dimensions as int8 (QuantizedQK in Python). A key's score bin is
//   254 + (product - approx_lse) * dequant_scale / 2^15
// rounded and clamped to [0, 254], see low_rank.cpp. Keys in a tile's own pages have bin 255.
struct QuantizedQK {
  const int8_t* query;           // [heads][tiles][per_tile][rank], -63 to 63
  const int32_t* position;       // [heads][tiles][per_tile], positions of the queries in the sequence
  const int32_t* count;          // [heads][tiles], queries of a tile, from 1 to per_tile
  const int8_t* keys;            // [heads][seq_len][rank]
  const int16_t* dequant_scale;  // [heads][tiles], bins per unit of a product, times 2^15
  int64_t seq_len;
  int32_t heads, tiles;
  int32_t per_tile;    // padded number of queries per tile
  int32_t rank;        // a multiple of 16, at most 256
  float bins_per_bit;  // bins between a weight and twice that weight
  int32_t threads;
};

struct TileScoreBinArguments {
  QuantizedQK qk;
  const bool* all_groups;      // [heads], whether approx_lse uses all groups of keys
  uint8_t* bins;               // [heads][tiles][seq_len], written: the largest bin over the tile's queries
  const int64_t* tile_starts;  // [tiles + 1], positions
  int32_t tile;  // rows per tile; tiles start at multiples of it, except for the chunk's first
};

struct BinMassArguments {
  const uint8_t* bins;         // [heads][tiles][seq_len]
  const int64_t* tile_of_row;  // [rows], the tile whose bins apply to each row
  const bf16* weights;         // [heads][rows][seq_len], softmax weights
  float* mass;                 // [heads][rows][256], written: sum of the weights per bin
  int64_t seq_len;
  int32_t heads, rows, tiles;
  int32_t squared;  // nonzero: sum of their squares
  int32_t threads;
};

// The threshold of each head (CalibrationRows.threshold in Python): the largest bin such that the keys in it and above
// give every group of rows its share of the attention; 0 if no bin above 0 does.
struct ThresholdArguments {
  const float* mass;      // [heads][rows][256], attention per bin
  const int64_t* places;  // [heads][places_per_head], row indices: of the sample, then of the last and the outlier rows
  int32_t* threshold;     // [heads], written
  int32_t heads, rows, places_per_head;
  int32_t sampled;    // number of places in the sample
  int32_t first;      // number of places after those in the first group; the rest are the second
  float share;        // required mean share of each group
  float row_share;    // required share of every row of the two groups
  float errors;       // standard errors that the sample's mean must lie above `share`
  int32_t threads;
};

// Keys whose bin is at least the threshold of their head. `pages` is seq_len / block_size, rounded up.
struct KeyArguments {
  const uint8_t* bins;       // [heads][tiles][seq_len]
  const int32_t* threshold;  // [heads], 0 to 255
  int32_t* counts;           // [heads][tiles][pages], such keys per page: page_counts writes it, keys_above reads it
  const bool* listed_pages;  // [heads][tiles][pages], pages whose keys are listed in `columns`; keys_above only
  int32_t* columns;          // [heads][tiles][max_columns], written by keys_above: positions, ascending, then -1
  int64_t seq_len;
  int32_t heads, tiles, block_size, max_columns;
  int32_t threads;
};

// The keys at or above a threshold, and a sample of those below it (score_bins.sampled_keys in Python).
struct SampleArguments {
  const uint8_t* bins;          // [heads][tiles][seq_len]
  const int32_t* threshold;     // [heads], 0 to 255
  const int64_t* first_keys;    // [tiles], the first key that a tile may list
  const int64_t* own_keys;      // [tiles], the first key of the tile's own pages, which are not listed
  const bool* listed_pages;     // [heads][tiles][pages], pages whose keys are listed
  const int32_t* increments;    // [max_code + 1], sampling probability of each code, in 65536ths
  int32_t* num_columns;         // [heads][tiles], written
  int32_t* columns;             // [heads][tiles][max_columns], written: positions, ascending, then -1; null: only count
  uint8_t* codes;               // likewise: threshold - bin, at most max_code; 0 at or above the threshold
  int64_t seq_len;
  int32_t heads, tiles, block_size, max_columns, max_code;
  int32_t threads;
};

}  // namespace minference

extern "C" {

// One line per field, structure and function of this header: "Cache.key: void* at byte 0".
const char* minference_describe_interface();

void minference_attend(const minference::AttendArguments* arguments);
void minference_remainder(const minference::RemainderArguments* arguments);

// Exact attention of some rows: every weight, or the weights summed per column and per diagonal.
void minference_row_shares(const minference::RowShareArguments* arguments);
void minference_column_diagonal_scores(const minference::ColumnDiagonalArguments* arguments);

// Keys in few dimensions.
void minference_key_codes(const minference::KeyCodeArguments* arguments);

// Representative queries and score bins per tile.
void minference_representatives(const minference::RepresentativeArguments* arguments);
void minference_tile_score_bins(const minference::TileScoreBinArguments* arguments);

// From the score bins: attention per bin, thresholds, counts per page and lists of the keys at or above the threshold,
// and lists with a sample of the keys below it.
void minference_mass_by_bin(const minference::BinMassArguments* arguments);
void minference_threshold(const minference::ThresholdArguments* arguments);
void minference_page_counts(const minference::KeyArguments* arguments);
void minference_keys_above(const minference::KeyArguments* arguments);
void minference_sampled_keys(const minference::SampleArguments* arguments);
}
