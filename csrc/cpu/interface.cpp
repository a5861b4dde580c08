// Describes interface.h to Python. A structure without a line here, or a line without its structure, is a difference
// that Python reports; a field that is missing here does not compile.
#include "interface.h"

#include <cstddef>
#include <iterator>
#include <string>
#include <type_traits>
#include <utility>

namespace minference {
namespace {

struct Field {
  const char* name;
  std::string (*type)();
  size_t offset;
};

// The name and the fields of a structure.
template <typename S>
struct Table;

// int32, float32, bool, the name of a structure; with * for pointers.
template <typename T>
std::string type_name() {
  if constexpr (std::is_pointer_v<T>) {
    return type_name<std::remove_cv_t<std::remove_pointer_t<T>>>() + "*";
  } else if constexpr (std::is_enum_v<T>) {
    return type_name<std::underlying_type_t<T>>();
  } else if constexpr (std::is_void_v<T>) {
    return "void";
  } else if constexpr (std::is_same_v<T, bool>) {
    return "bool";
  } else if constexpr (std::is_arithmetic_v<T>) {
    const char* kind = std::is_floating_point_v<T> ? "float" : std::is_signed_v<T> ? "int" : "uint";
    return kind + std::to_string(8 * sizeof(T));
  } else {
    return Table<T>::kName;
  }
}

// Converts to the type of any field.
struct AnyValue {
  template <typename T>
  operator T() const;
};

// Whether a structure can be initialised with N values: true up to the number of its fields.
template <typename S, size_t N>
constexpr bool kTakes = []<size_t... I>(std::index_sequence<I...>) {
  return requires { S{(static_cast<void>(I), AnyValue())...}; };
}(std::make_index_sequence<N>());

// Whether these are all fields of S, in their order.
template <typename S, size_t N>
constexpr bool is_complete(const Field (&fields)[N]) {
  for (size_t i = 1; i < N; ++i) {
    if (fields[i].offset <= fields[i - 1].offset) return false;
  }
  return kTakes<S, N> && !kTakes<S, N + 1>;
}

#define FIELD(field) {#field, type_name<decltype(S::field)>, offsetof(S, field)}
#define TABLE(structure, ...)                         \
  template <>                                         \
  struct Table<structure> {                           \
    using S = structure;                              \
    static constexpr const char* kName = #structure;  \
    static constexpr Field kFields[] = {__VA_ARGS__}; \
  };                                                  \
  static_assert(is_complete<structure>(Table<structure>::kFields), "fields missing or in another order")

TABLE(Cache, FIELD(key), FIELD(value), FIELD(page_stride), FIELD(head_stride), FIELD(row_stride), FIELD(block_size),
      FIELD(head_size), FIELD(num_kv_heads), FIELD(layout), FIELD(element));
TABLE(AttendArguments, FIELD(cache), FIELD(query), FIELD(out), FIELD(lse), FIELD(query_token_stride),
      FIELD(query_head_stride), FIELD(out_token_stride), FIELD(out_head_stride), FIELD(pages), FIELD(tile_starts),
      FIELD(blocks), FIELD(num_blocks), FIELD(columns), FIELD(num_columns), FIELD(column_codes), FIELD(sinks),
      FIELD(remainder_key), FIELD(remainder_value), FIELD(remainder_bias), FIELD(seq_len), FIELD(window), FIELD(heads),
      FIELD(tiles), FIELD(max_blocks), FIELD(max_columns), FIELD(scale), FIELD(softcap), FIELD(threads));
TABLE(RemainderArguments, FIELD(cache), FIELD(query), FIELD(query_token_stride), FIELD(query_head_stride),
      FIELD(pages), FIELD(tile_starts), FIELD(blocks), FIELD(num_blocks), FIELD(columns), FIELD(num_columns),
      FIELD(sampled), FIELD(heads), FIELD(key), FIELD(value), FIELD(bias), FIELD(seq_len), FIELD(window),
      FIELD(num_heads), FIELD(num_wanted), FIELD(heads_per_list), FIELD(tiles), FIELD(max_blocks), FIELD(max_columns),
      FIELD(num_sampled), FIELD(scale), FIELD(softcap), FIELD(log_step), FIELD(threads));
TABLE(RowArguments, FIELD(cache), FIELD(query), FIELD(query_token_stride), FIELD(query_head_stride), FIELD(pages),
      FIELD(row_index), FIELD(heads), FIELD(context_len), FIELD(seq_len), FIELD(window), FIELD(num_heads), FIELD(num_wanted),
      FIELD(rows), FIELD(scale), FIELD(softcap), FIELD(threads));
TABLE(RowShareArguments, FIELD(row_arguments), FIELD(log_norms), FIELD(shares));
TABLE(ColumnDiagonalArguments, FIELD(row_arguments), FIELD(group_starts), FIELD(columns), FIELD(diagonals),
      FIELD(num_groups));
TABLE(KeyCodeArguments, FIELD(cache), FIELD(pages), FIELD(heads), FIELD(to_key), FIELD(center), FIELD(codes),
      FIELD(seq_len), FIELD(num_heads), FIELD(num_wanted), FIELD(rank), FIELD(max_code), FIELD(max_norm),
      FIELD(threads));
TABLE(RepresentativeArguments, FIELD(low), FIELD(key_size), FIELD(tile_starts), FIELD(out), FIELD(position),
      FIELD(count), FIELD(context_len), FIELD(chunk), FIELD(heads), FIELD(tiles), FIELD(rank), FIELD(step),
      FIELD(per_tile), FIELD(wanted), FIELD(least_size), FIELD(least_apart), FIELD(alike), FIELD(threads));
TABLE(QuantizedQK, FIELD(query), FIELD(position), FIELD(count), FIELD(keys), FIELD(dequant_scale), FIELD(seq_len),
      FIELD(heads), FIELD(tiles), FIELD(per_tile), FIELD(rank), FIELD(bins_per_bit), FIELD(threads));
TABLE(TileScoreBinArguments, FIELD(qk), FIELD(all_groups), FIELD(bins), FIELD(tile_starts), FIELD(tile));
TABLE(BinMassArguments, FIELD(bins), FIELD(tile_of_row), FIELD(weights), FIELD(mass), FIELD(seq_len), FIELD(heads),
      FIELD(rows), FIELD(tiles), FIELD(squared), FIELD(threads));
TABLE(ThresholdArguments, FIELD(mass), FIELD(places), FIELD(threshold), FIELD(heads), FIELD(rows),
      FIELD(places_per_head), FIELD(sampled), FIELD(first), FIELD(share), FIELD(row_share), FIELD(errors),
      FIELD(threads));
TABLE(KeyArguments, FIELD(bins), FIELD(threshold), FIELD(counts), FIELD(listed_pages), FIELD(columns), FIELD(seq_len),
      FIELD(heads), FIELD(tiles), FIELD(block_size), FIELD(max_columns), FIELD(threads));
TABLE(SampleArguments, FIELD(bins), FIELD(threshold), FIELD(first_keys), FIELD(own_keys), FIELD(listed_pages),
      FIELD(increments), FIELD(num_columns), FIELD(columns), FIELD(codes), FIELD(seq_len), FIELD(heads), FIELD(tiles),
      FIELD(block_size), FIELD(max_columns), FIELD(max_code), FIELD(threads));

template <typename S>
std::string describe() {
  const std::string name = Table<S>::kName;
  std::string text;
  for (const Field& field : Table<S>::kFields) {
    text += name + "." + field.name + ": " + field.type() + " at byte " + std::to_string(field.offset) + "\n";
  }
  return text + "sizeof(" + name + "): " + std::to_string(sizeof(S)) + "\n";
}

template <typename S>
std::string describe(const char* name, void (*)(const S*)) {
  return std::string(name) + ": a function of " + Table<S>::kName + "\n";
}

#define FUNCTION(name) describe(#name, minference_##name)

}  // namespace
}  // namespace minference

extern "C" const char* minference_describe_interface() {
  using namespace minference;
  static const std::string text =
      describe<Cache>() + describe<AttendArguments>() + describe<RemainderArguments>() + describe<RowArguments>() +
      describe<RowShareArguments>() + describe<ColumnDiagonalArguments>() + describe<KeyCodeArguments>() +
      describe<RepresentativeArguments>() + describe<QuantizedQK>() + describe<TileScoreBinArguments>() +
      describe<BinMassArguments>() + describe<ThresholdArguments>() +
      describe<KeyArguments>() + describe<SampleArguments>() + FUNCTION(attend) + FUNCTION(remainder) +
      FUNCTION(row_shares) + FUNCTION(column_diagonal_scores) + FUNCTION(key_codes) + FUNCTION(representatives) +
      FUNCTION(tile_score_bins) + FUNCTION(mass_by_bin) + FUNCTION(threshold) + FUNCTION(page_counts) +
      FUNCTION(keys_above) + FUNCTION(sampled_keys);
  return text.c_str();
}
