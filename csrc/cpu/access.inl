// Reading and writing along rows, vector by vector. Rows of 16 bits are converted between memory and register, so that
// a loop is written once for all of them.

namespace amn::cpu {
namespace {

template <std::floating_point T>
AMN_INLINE void load_floats(typename Native<T>::type& v, const T* x) {
  v = *reinterpret_cast<const typename Native<T>::unaligned*>(x);
}
template <std::floating_point T>
AMN_INLINE void store_floats(T* x, typename Native<T>::type v) {
  *reinterpret_cast<typename Native<T>::unaligned*>(x) = v;
}

// How many numbers a vector has.
template <class V>
constexpr int64_t kNumbers = kNumbers<decltype(V::low)> * 2;
template <>
constexpr int64_t kNumbers<Native<float>::type> = kNativeLanes<float>;
template <>
constexpr int64_t kNumbers<Native<double>::type> = kNativeLanes<double>;

template <class H, class S>
AMN_INLINE void load_floats(Pair<H>& v, const S* x) {
  load_floats(v.low, x);
  load_floats(v.high, x + kNumbers<H>);
}
template <class H, class S>
AMN_INLINE void store_floats(S* x, Pair<H> v) {
  store_floats(x, v.low);
  store_floats(x + kNumbers<H>, v.high);
}

// Access to a whole vector, or to its first lanes at the end of a row.
template <class T>
struct Whole {
  template <class S>
  AMN_INLINE Vector<T> load(const S* x) const {
    Vector<T> v;
    load_floats(v, x);
    return v;
  }
  AMN_INLINE Vector<T> or_else(Vector<T> v, T) const { return v; }
  template <class S>
  AMN_INLINE void store(S* x, Vector<T> v) const {
    store_floats(x, v);
  }
};
template <class T>
struct First {
  int64_t lanes;
  template <class S>
  AMN_INLINE Vector<T> load(const S* x) const {  // 0 in the lanes past the end
    S whole[kLanes<T>] = {};
    std::memcpy(whole, x, lanes * sizeof(S));
    return Whole<T>{}.load(whole);
  }
  AMN_INLINE Vector<T> or_else(Vector<T> v, T fill) const {  // v, and fill past the end
    Vector<T> filled = Vector<T>{} + fill;
    std::memcpy(&filled, &v, lanes * sizeof(T));
    return filled;
  }
  template <class S>
  AMN_INLINE void store(S* x, Vector<T> v) const {
    S whole[kLanes<T>];
    store_floats(whole, v);
    std::memcpy(x, whole, lanes * sizeof(S));
  }
};

// Calls f(i, access) for every vector of [begin, end).
template <class T, class F>
AMN_INLINE void for_vectors(int64_t begin, int64_t end, const F& f) {
  int64_t i = begin;
  for (; i + kLanes<T> <= end; i += kLanes<T>) f(i, Whole<T>{});
  if (i < end) f(i, First<T>{end - i});
}

// Elements that are summed in T before the sum moves to double. With 1024, the InfoNCE of two rows, where nothing
// averages out, had five times the error of eager PyTorch.
constexpr int64_t kBlock = 256;

// Calls f(begin, end) for the blocks of [begin, end).
template <class F>
AMN_INLINE void for_blocks(int64_t begin, int64_t end, const F& f) {
  for (; begin < end; begin += kBlock) f(begin, begin + kBlock < end ? begin + kBlock : end);
}

}  // namespace
}  // namespace amn::cpu
