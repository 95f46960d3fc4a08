// The launchers of csrc/cuda by name, with arguments that are pointers to their values: one door for ctypes and for
// replay.cpp.
#include "../../csrc/cuda/launchers.h"

#include <cstring>
#include <exception>
#include <string>
#include <type_traits>
#include <utility>

namespace {

std::string failure;

template <class... Parameters, size_t... i>
bool call(void (*launcher)(Parameters...), void* const* values, const size_t* sizes, size_t count, std::index_sequence<i...>) {
  const size_t wanted[] = {sizeof(std::remove_reference_t<Parameters>)...};
  // The last parameter is the stream, of which there is none.
  constexpr size_t given = sizeof...(Parameters) - 1;
  if (count != given || std::memcmp(sizes, wanted, sizeof(size_t) * given) != 0) {
    failure = "the arguments are not those of launchers.h";
    return false;
  }
  void* no_stream = nullptr;
  const auto value = [&](size_t k) { return k < given ? values[k] : &no_stream; };
  launcher(*static_cast<std::remove_reference_t<Parameters>*>(value(i))...);
  return true;
}

template <class... Parameters>
bool call(void (*launcher)(Parameters...), void* const* values, const size_t* sizes, size_t count) {
  return call(launcher, values, sizes, count, std::index_sequence_for<Parameters...>{});
}

}  // namespace

extern "C" {

void simt_seed(uint64_t seed) { simt::seed(seed); }

void simt_observe(void (*observer)(const simt::Observed*)) { simt::observer = observer; }

int64_t simt_col_stats_scratch(int64_t rows, int64_t dim) { return amn::cuda::col_stats_scratch(rows, dim); }

int64_t simt_term_sums_scratch(int64_t rows) { return amn::cuda::term_sums_scratch(rows); }

// Null, or what went wrong.
const char* simt_call(const char* name, void* const* values, const size_t* sizes, size_t count) {
  failure = std::string("no launcher named ") + name;
  const auto called = [&](const char* launcher) { return std::strcmp(name, launcher) == 0; };
  try {
#define LAUNCHER(launcher) \
  if (called(#launcher) && call(amn::cuda::launcher, values, sizes, count)) return nullptr
    LAUNCHER(row_stats);
    LAUNCHER(softmax_rows_);
    LAUNCHER(softmax_stats_);
    LAUNCHER(softmax_cols);
    LAUNCHER(col_factors);
    LAUNCHER(softmax_weights_);
    LAUNCHER(row_dots);
    LAUNCHER(col_stats);
    LAUNCHER(col_terms);
    LAUNCHER(col_dots);
    LAUNCHER(term_sums);
    LAUNCHER(row_combine);
    LAUNCHER(mirror_rows);
    LAUNCHER(mirror_columns);
    LAUNCHER(balance);
    LAUNCHER(temperature_grad);
#undef LAUNCHER
  } catch (const std::exception& error) {
    failure = error.what();
  }
  return failure.c_str();
}

}  // extern "C"
