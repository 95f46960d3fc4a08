// Rows of any floating dtype for row_kernels.inl: converted as they are read, and gradients as they are written. Loops
// without branches, which compilers turn into vectors of any instruction set; subnormal numbers are exact also where the
// processor is told to flush them.

namespace amn::cpu {
namespace {

AMN_INLINE float float_of_bits(uint32_t bits) { return __builtin_bit_cast(float, bits); }
AMN_INLINE uint32_t bits_of_float(float x) { return __builtin_bit_cast(uint32_t, x); }

// `yes` or `no` by masks: of a choice between results of arithmetic gcc makes branches, which are no vectors.
AMN_INLINE uint32_t choose(bool which, uint32_t yes, uint32_t no) {
  const uint32_t mask = -uint32_t{which};
  return (yes & mask) | (no & ~mask);
}

AMN_INLINE float from_bfloat16(uint16_t x) { return float_of_bits(uint32_t{x} << 16); }

// To nearest, ties to even.
AMN_INLINE uint16_t to_bfloat16(float x) {
  const uint32_t bits = bits_of_float(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(choose((bits & 0x7fffffff) > 0x7f800000, 0x7fc0, rounded));
}

AMN_INLINE float from_half(uint16_t x) {
  const uint32_t sign = (x & 0x8000u) << 16, magnitude = (x & 0x7fffu) << 13;
  // Its mantissa behind the point of 2^-14, less 2^-14: exact, and no operand is subnormal in float32.
  const float subnormal = float_of_bits(magnitude + (113u << 23)) - float_of_bits(113u << 23);
  const uint32_t normal = magnitude + (112u << 23), not_finite = magnitude + (224u << 23);
  const uint32_t finite = choose(magnitude < (1u << 23), bits_of_float(subnormal), normal);
  return float_of_bits(sign | choose(magnitude >= (31u << 23), not_finite, finite));
}

// To nearest, ties to even.
AMN_INLINE uint16_t to_half(float x) {
  const uint32_t bits = bits_of_float(x), magnitude = bits & 0x7fffffff;
  // Added to 0.5, a number below 2^-14 is rounded to multiples of 2^-24, half's smallest.
  const uint32_t subnormal = bits_of_float(float_of_bits(magnitude) + 0.5f) - (126u << 23);
  const uint32_t normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const uint32_t finite = choose(magnitude < (113u << 23), subnormal, normal);
  const uint32_t not_finite = choose(magnitude > 0x7f800000, 0x7e00, 0x7c00);
  return static_cast<uint16_t>(((bits >> 16) & 0x8000) | choose(magnitude >= (143u << 23), not_finite, finite));
}

constexpr int64_t size_of(Dtype dtype) {
  return dtype == Dtype::kDouble ? 8 : dtype == Dtype::kFloat ? 4 : 2;
}

template <class T>
void widen(T* out, const void* from, Dtype dtype, int64_t count) {
  const auto each = [&]<class S>(const S* x, auto convert) __attribute__((always_inline)) {
    for (int64_t k = 0; k < count; ++k) out[k] = static_cast<T>(convert(x[k]));
  };
  const auto as_it_is = [](auto x) __attribute__((always_inline)) { return x; };
  switch (dtype) {
    case Dtype::kFloat:
      return each(static_cast<const float*>(from), as_it_is);
    case Dtype::kDouble:
      return each(static_cast<const double*>(from), as_it_is);
    case Dtype::kHalf:
      return each(static_cast<const uint16_t*>(from), [](uint16_t x) __attribute__((always_inline)) {
        return from_half(x);
      });
    case Dtype::kBfloat16:
      return each(static_cast<const uint16_t*>(from), [](uint16_t x) __attribute__((always_inline)) {
        return from_bfloat16(x);
      });
  }
}

template <class T>
void narrow(void* to, Dtype dtype, const T* x, int64_t count) {
  const auto each = [&]<class S>(S* out, auto convert) __attribute__((always_inline)) {
    for (int64_t k = 0; k < count; ++k) out[k] = convert(x[k]);
  };
  switch (dtype) {
    case Dtype::kFloat:
      return each(static_cast<float*>(to), [](T v) __attribute__((always_inline)) { return static_cast<float>(v); });
    case Dtype::kDouble:
      return each(static_cast<double*>(to), [](T v) __attribute__((always_inline)) { return double{v}; });
    case Dtype::kHalf:
      return each(static_cast<uint16_t*>(to), [](T v) __attribute__((always_inline)) {
        return to_half(static_cast<float>(v));
      });
    case Dtype::kBfloat16:
      return each(static_cast<uint16_t*>(to), [](T v) __attribute__((always_inline)) {
        return to_bfloat16(static_cast<float>(v));
      });
  }
}

// Row i of x in T: where it is, or in its place in x.copy; zeros there for a row that does not count.
template <class T>
AMN_INLINE const T* read_row(const AnyRows<T>& x, int64_t i, bool counts) {
  const char* row = x.data + i * x.stride;
  if (x.copy == nullptr) return reinterpret_cast<const T*>(row);
  T* out = x.copy + i * x.copy_stride;
  if (counts) {
    widen(out, row, x.dtype, x.cols);
  } else {
    std::memset(out, 0, x.cols * sizeof(T));
  }
  return out;
}

}  // namespace
}  // namespace amn::cpu
