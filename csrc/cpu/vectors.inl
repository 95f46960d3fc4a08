// Vectors of 64 bytes on every instruction set, for the row kernels: the order of summation, and with it the result up
// to fused multiply-adds, does not depend on the machine. Where registers are smaller, a vector is a pair of halves: of
// a native vector wider than its registers gcc 12 makes code that goes through memory, measured at ten times the time.
//
// AMN_VECTOR_BYTES is the size of a register.

namespace amn::cpu {
namespace {

#define AMN_INLINE inline __attribute__((always_inline))

constexpr int64_t kVectorBytes = 64;

template <class T>
struct Native;
template <>
struct Native<float> {
  typedef float type __attribute__((vector_size(AMN_VECTOR_BYTES)));
  typedef float unaligned __attribute__((vector_size(AMN_VECTOR_BYTES), aligned(4), may_alias));
  typedef uint32_t integers __attribute__((vector_size(AMN_VECTOR_BYTES)));
};
template <>
struct Native<double> {
  typedef double type __attribute__((vector_size(AMN_VECTOR_BYTES)));
  typedef double unaligned __attribute__((vector_size(AMN_VECTOR_BYTES), aligned(8), may_alias));
};
template <class T>
constexpr int64_t kNativeLanes = AMN_VECTOR_BYTES / sizeof(T);

template <class Half>
struct Pair {
  Half low, high;
};

template <class V>
constexpr bool kIsPair = false;
template <class Half>
constexpr bool kIsPair<Pair<Half>> = true;

template <class T, int64_t bytes>
struct VectorOf {
  typedef Pair<typename VectorOf<T, bytes / 2>::type> type;
};
template <class T>
struct VectorOf<T, AMN_VECTOR_BYTES> {
  typedef typename Native<T>::type type;
};
template <class T>
using Vector = typename VectorOf<T, kVectorBytes>::type;
template <class T>
constexpr int64_t kLanes = kVectorBytes / sizeof(T);

// f of every native vector of v, and of those of `more` in the same place.
template <class F, class V, class... More>
AMN_INLINE V map(const F& f, V v, More... more) {
  if constexpr (kIsPair<V>) {
    return {map(f, v.low, more.low...), map(f, v.high, more.high...)};
  } else {
    return f(v, more...);
  }
}

#if defined(__x86_64__)
#define AMN_IN_REGISTER "+x"
#elif defined(__aarch64__)
#define AMN_IN_REGISTER "+w"
#else
#define AMN_IN_REGISTER "+m"
#endif

// v, a product, rounded before anything is taken from it: a fused multiply-add would leave its rounding as a difference.
template <class V>
AMN_INLINE V rounded(V v) {
  return map(
      [](auto native) __attribute__((always_inline)) {
        asm("" : AMN_IN_REGISTER(native));
        return native;
      },
      v);
}

template <class H>
AMN_INLINE Pair<H> operator+(Pair<H> a, Pair<H> b) { return {a.low + b.low, a.high + b.high}; }
template <class H>
AMN_INLINE Pair<H> operator-(Pair<H> a, Pair<H> b) { return {a.low - b.low, a.high - b.high}; }
template <class H>
AMN_INLINE Pair<H> operator*(Pair<H> a, Pair<H> b) { return {a.low * b.low, a.high * b.high}; }
template <class H, std::floating_point T>
AMN_INLINE Pair<H> operator+(Pair<H> a, T b) { return {a.low + b, a.high + b}; }
template <class H, std::floating_point T>
AMN_INLINE Pair<H> operator-(Pair<H> a, T b) { return {a.low - b, a.high - b}; }
template <class H, std::floating_point T>
AMN_INLINE Pair<H> operator*(Pair<H> a, T b) { return {a.low * b, a.high * b}; }
template <class H, std::floating_point T>
AMN_INLINE Pair<H> operator*(T a, Pair<H> b) { return {a * b.low, a * b.high}; }
template <class H>
AMN_INLINE Pair<H>& operator+=(Pair<H>& a, Pair<H> b) { return a = a + b; }
template <class H>
AMN_INLINE Pair<H>& operator-=(Pair<H>& a, Pair<H> b) { return a = a - b; }

// a where it is larger, else b: b where a is NaN.
template <class V>
AMN_INLINE V larger(V a, V b) {
  return map([](auto x, auto y) __attribute__((always_inline)) { return x > y ? x : y; }, a, b);
}

// x, or 0 where that is positive. A NaN stays one.
template <class V>
AMN_INLINE V at_most_zero(V v) {
  return map([](auto x) __attribute__((always_inline)) { return x > 0 ? decltype(x){} : x; }, v);
}

// `then` where `sign` is negative, else v.
template <class V>
AMN_INLINE V where_negative(V sign, V then, V v) {
  return map([](auto s, auto a, auto b) __attribute__((always_inline)) { return s < 0 ? a : b; }, sign, then, v);
}

// Lanes of a native vector by f, the upper half onto the lower one until one lane is left.
template <class T, int64_t width, class F>
AMN_INLINE T fold_lanes(typename Native<T>::type v, const F& f) {
  if constexpr (width == 1) {
    return v[0];
  } else {
    const auto upper = [&]<size_t... lane>(std::index_sequence<lane...>) __attribute__((always_inline)) {
#if __has_builtin(__builtin_shufflevector)
      return __builtin_shufflevector(v, v, (lane < width / 2 ? int(lane + width / 2) : -1)...);
#else  // gcc 11, which can't be told that a lane does not matter
      return __builtin_shuffle(v, decltype(v < v){(lane < width / 2 ? lane + width / 2 : lane)...});
#endif
    };
    return fold_lanes<T, width / 2>(f(v, upper(std::make_index_sequence<kNativeLanes<T>>{})), f);
  }
}

template <class T, class V, class F>
AMN_INLINE T fold(V v, const F& f) {
  if constexpr (kIsPair<V>) {
    return fold<T>(f(v.low, v.high), f);
  } else {
    return fold_lanes<T, kNativeLanes<T>>(v, f);
  }
}

template <class T>
AMN_INLINE T sum(Vector<T> v) {
  return fold<T>(v, [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
}

template <class T>
AMN_INLINE T maximum(Vector<T> v) {
  return fold<T>(v, [](auto a, auto b) __attribute__((always_inline)) { return larger(a, b); });
}

// exp for x <= 0, and 0 where that is below the smallest normal number. Range reduction and polynomial: Cephes expf
// (S. Moshier), error about one unit in the last place. A NaN stays one.
AMN_INLINE Native<float>::type exp_native(Native<float>::type x) {
  typedef Native<float>::type Floats;
  typedef Native<float>::integers Integers;
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Floats shifted = x * 1.44269504088896341f + kRound;
  const Floats n = shifted - kRound;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  Floats y = 1.9875691500e-4f * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.f;
  const Integers power_of_two = ((Integers)shifted << 23) + 0x3f800000;
  return x < -87.f ? Floats{} : y * (Floats)power_of_two;
}

AMN_INLINE Native<double>::type exp_native(Native<double>::type x) {
  for (int64_t i = 0; i < kNativeLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

template <class V>
AMN_INLINE V exp_nonpositive(V x) {
  return map([](auto v) __attribute__((always_inline)) { return exp_native(v); }, x);
}

}  // namespace
}  // namespace amn::cpu
