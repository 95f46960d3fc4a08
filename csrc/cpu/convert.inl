// Floats that are 16 bits in memory, converted as PyTorch does it: to float32 exactly, and back to nearest, ties to
// even. Subnormal numbers of float16 are exact also where the processor is told to flush them.

namespace amn::cpu {
namespace {

typedef Native<float>::type Floats;
typedef Native<float>::integers Integers;
// As many 16-bit numbers as there are floats in a register.
typedef uint16_t Shorts __attribute__((vector_size(AMN_VECTOR_BYTES / 2)));
typedef uint16_t UnalignedShorts __attribute__((vector_size(AMN_VECTOR_BYTES / 2), aligned(2), may_alias));

template <class S>
AMN_INLINE Shorts load_shorts(const S* x) {
  return *reinterpret_cast<const UnalignedShorts*>(x);
}
template <class S>
AMN_INLINE void store_shorts(S* x, Shorts v) {
  *reinterpret_cast<UnalignedShorts*>(x) = v;
}

// The bits of a bfloat16 in the lower half.
AMN_INLINE Integers round_to_bfloat16(Floats x) {
  const Integers bits = (Integers)x, rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return (x == x ? rounded : Integers{} + 0x7fc00000) >> 16;
}

#if AMN_VECTOR_BYTES == 32

// One shuffle within the halves of a register, where gcc 12 extends by one across them and more.
AMN_INLINE void load_floats(Floats& v, const Bfloat16* x) {
  const __m256i twice = _mm256_broadcastsi128_si256((__m128i)load_shorts(x));
  const __m256i above_zeros = _mm256_setr_epi8(
      -1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7, -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14,
      15);
  v = (Floats)_mm256_shuffle_epi8(twice, above_zeros);
}

// Two registers make one, of which the quarters are in order but for the two in the middle.
AMN_INLINE void store_floats(Bfloat16* x, Pair<Floats> v) {
  const __m256i packed = _mm256_packus_epi32((__m256i)round_to_bfloat16(v.low), (__m256i)round_to_bfloat16(v.high));
  _mm256_storeu_si256(reinterpret_cast<__m256i_u*>(x), _mm256_permute4x64_epi64(packed, 0b11011000));
}

AMN_INLINE void load_floats(Floats& v, const Float16* x) { v = (Floats)_mm256_cvtph_ps((__m128i)load_shorts(x)); }

AMN_INLINE void store_floats(Float16* x, Floats v) {
  store_shorts(x, (Shorts)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}

#elif AMN_VECTOR_BYTES == 64

// With a mask of all, as gcc 12 warns of the forms without one.
AMN_INLINE void load_floats(Floats& v, const Bfloat16* x) {
  v = (Floats)((Integers)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)load_shorts(x)) << 16);
}

AMN_INLINE void store_floats(Bfloat16* x, Floats v) {
  store_shorts(x, (Shorts)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)round_to_bfloat16(v)));
}

AMN_INLINE void load_floats(Floats& v, const Float16* x) {
  v = (Floats)_mm512_maskz_cvtph_ps(0xffff, (__m256i)load_shorts(x));
}

AMN_INLINE void store_floats(Float16* x, Floats v) {
  store_shorts(x, (Shorts)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
}

#else

template <class S>
AMN_INLINE Integers load_extended(const S* x) {
#if defined(__x86_64__)
  // One instruction, where gcc 12 makes four of __builtin_convertvector.
  return (Integers)_mm_unpacklo_epi16(_mm_loadu_si64(x), __m128i{});
#else
  return __builtin_convertvector(load_shorts(x), Integers);
#endif
}

AMN_INLINE void load_floats(Floats& v, const Bfloat16* x) { v = (Floats)(load_extended(x) << 16); }

AMN_INLINE void store_floats(Bfloat16* x, Floats v) {
  store_shorts(x, __builtin_convertvector(round_to_bfloat16(v), Shorts));
}

AMN_INLINE void load_floats(Floats& v, const Float16* x) {
  const Integers bits = load_extended(x);
  const Integers sign = (bits & 0x8000) << 16, magnitude = (bits & 0x7fff) << 13;
  // Its mantissa behind the point of 2^-14, less 2^-14: exact, and no operand is subnormal in float32.
  constexpr uint32_t kSmallestNormal = 113u << 23;
  const Floats subnormal = (Floats)(magnitude + kSmallestNormal) - (Floats)(Integers{} + kSmallestNormal);
  const Integers finite = magnitude < (1u << 23) ? (Integers)subnormal : magnitude + (112u << 23);
  v = (Floats)(sign | (magnitude >= (31u << 23) ? magnitude + (224u << 23) : finite));
}

AMN_INLINE void store_floats(Float16* x, Floats v) {
  const Integers bits = (Integers)v, sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  // Added to 0.5, a number below 2^-14 is rounded to multiples of 2^-24, the smallest of float16.
  const Integers subnormal = (Integers)((Floats)magnitude + 0.5f) - (126u << 23);
  const Integers normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const Integers finite = magnitude < (113u << 23) ? subnormal : normal;
  const Integers not_finite = magnitude > 0x7f800000 ? Integers{} + 0x7e00 : Integers{} + 0x7c00;
  const Integers rounded = magnitude >= (143u << 23) ? not_finite : finite;
  store_shorts(x, __builtin_convertvector(sign | rounded, Shorts));
}

#endif

}  // namespace
}  // namespace amn::cpu
