// Sixteen values side by side, for tiles.h and attention.h: a register of AVX-512, or two of AVX2. A mask is the first so many of them; what it leaves out reads as zero
// and is not written.
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace lanes {

constexpr long SIDE = 16;

// Calls work(0), work(1), ... work(N - 1), each number a constant, so that what it indexes stays in registers.
template <class Work, int... I> inline void for_each(Work work, std::integer_sequence<int, I...>) { (work(std::integral_constant<int, I>()), ...); }
template <int N, class Work> inline void times(Work work) { for_each(work, std::make_integer_sequence<int, N>()); }

#ifdef PLANISH_WIDE

using Floats = __m512;
using Ints = __m512i;
using Mask = __mmask16;

inline Mask first(long count) { return count <= 0 ? 0 : count >= SIDE ? 0xffff : __mmask16((1u << count) - 1); }
inline Floats all(float x) { return _mm512_set1_ps(x); }
inline Ints all(int32_t x) { return _mm512_set1_epi32(x); }
inline Floats load(Mask mask, const float *from) { return _mm512_maskz_loadu_ps(mask, from); }
inline Ints load(Mask mask, const int32_t *from) { return _mm512_maskz_loadu_epi32(mask, from); }
inline Ints aligned(const int32_t *from) { return _mm512_load_si512(from); }
inline Floats load(const float *from) { return _mm512_loadu_ps(from); }
inline void store(float *to, Floats x) { _mm512_storeu_ps(to, x); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }        // a b + c
inline Floats subtract_product(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
inline Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline float sum(Floats x) { return _mm512_reduce_add_ps(x); }
inline float largest(Floats x) { return _mm512_reduce_max_ps(x); }
inline Floats choose(uint16_t bits, Floats x, Floats otherwise) { return _mm512_mask_mov_ps(otherwise, bits, x); }
inline Floats nearest(Floats x) { return _mm512_roundscale_ps(x, 8); }
inline Floats by_power(Floats x, Floats whole) { return _mm512_scalef_ps(x, whole); }  // x 2^whole
inline Floats floats(Ints x) { return _mm512_cvtepi32_ps(x); }
inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints subtract(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
inline Ints multiply(Ints a, Ints b) { return _mm512_mullo_epi32(a, b); }
inline Ints bits(Floats x) { return _mm512_castps_si512(x); }
inline Floats of_bits(Ints x) { return _mm512_castsi512_ps(x); }
template <int N> inline Ints left(Ints x) { return _mm512_slli_epi32(x, N); }
inline Floats inverse(Floats x) {
    const Floats guess = _mm512_rcp14_ps(x);  // one step of Newton's makes 28 bits of its 14
    return multiply(guess, subtract_product(x, guess, all(2.0f)));
}

#ifdef __AVX512BF16__
inline __m256i to_bfloat16(Floats x) { return (__m256i)_mm512_cvtneps_pbh(x); }
#else
inline __m256i to_bfloat16(Floats x) {
    const __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i near = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(near, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0)));
}
#endif
inline Floats from_bfloat16(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
inline Floats load(Mask mask, const uint16_t *from) { return from_bfloat16(_mm256_maskz_loadu_epi16(mask, from)); }
inline void store(Mask mask, uint16_t *to, Floats x) { _mm256_mask_storeu_epi16(to, mask, to_bfloat16(x)); }

#else

struct Floats { __m256 low, high; };
struct Ints { __m256i low, high; };
using Mask = long;

inline Mask first(long count) { return count <= 0 ? 0 : count >= SIDE ? SIDE : count; }
inline __m256i within(long count) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
inline Floats all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Ints all(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Floats load(Mask mask, const float *from) {
    return {_mm256_maskload_ps(from, within(mask)), _mm256_maskload_ps(from + 8, within(mask - 8))};
}
inline Ints load(Mask mask, const int32_t *from) {
    return {_mm256_maskload_epi32(from, within(mask)), _mm256_maskload_epi32(from + 8, within(mask - 8))};
}
inline Ints aligned(const int32_t *from) {
    return {_mm256_load_si256(reinterpret_cast<const __m256i *>(from)), _mm256_load_si256(reinterpret_cast<const __m256i *>(from + 8))};
}
inline Floats load(const float *from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
inline void store(float *to, Floats x) { _mm256_storeu_ps(to, x.low), _mm256_storeu_ps(to + 8, x.high); }
inline Floats add(Floats a, Floats b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Floats subtract(Floats a, Floats b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Floats multiply(Floats a, Floats b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)}; }
inline Floats subtract_product(Floats a, Floats b, Floats c) {
    return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
inline Floats smaller(Floats a, Floats b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
inline Floats larger(Floats a, Floats b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline float sum(Floats x) {
    const __m256 eight = _mm256_add_ps(x.low, x.high);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}
inline float largest(Floats x) {
    const __m256 eight = _mm256_max_ps(x.low, x.high);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1)));
}
inline __m256 chosen(int bits, __m256 x, __m256 otherwise) {
    const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128), set = _mm256_and_si256(_mm256_set1_epi32(bits), each);
    return _mm256_blendv_ps(otherwise, x, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, each)));
}
inline Floats choose(uint16_t bits, Floats x, Floats otherwise) { return {chosen(bits, x.low, otherwise.low), chosen(bits >> 8, x.high, otherwise.high)}; }
inline Floats nearest(Floats x) { return {_mm256_round_ps(x.low, 8), _mm256_round_ps(x.high, 8)}; }
inline Ints ints(const void *from) {
    const __m256i *at = static_cast<const __m256i *>(from);
    return {_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)};
}
inline Ints upper(Ints x) { return {_mm256_blend_epi16(_mm256_setzero_si256(), x.low, 0xaa), _mm256_blend_epi16(_mm256_setzero_si256(), x.high, 0xaa)}; }
inline Floats floats(Ints x) { return {_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)}; }
inline Ints add(Ints a, Ints b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }
inline Ints subtract(Ints a, Ints b) { return {_mm256_sub_epi32(a.low, b.low), _mm256_sub_epi32(a.high, b.high)}; }
inline Ints multiply(Ints a, Ints b) { return {_mm256_mullo_epi32(a.low, b.low), _mm256_mullo_epi32(a.high, b.high)}; }
inline Ints bits(Floats x) { return {_mm256_castps_si256(x.low), _mm256_castps_si256(x.high)}; }
inline Floats of_bits(Ints x) { return {_mm256_castsi256_ps(x.low), _mm256_castsi256_ps(x.high)}; }
template <int N> inline Ints left(Ints x) { return {_mm256_slli_epi32(x.low, N), _mm256_slli_epi32(x.high, N)}; }
inline Ints to_ints(Floats x) { return {_mm256_cvtps_epi32(x.low), _mm256_cvtps_epi32(x.high)}; }
inline Floats by_power(Floats x, Floats whole) {  // x 2^whole, whole at most 127; what is below -126 counts as that
    return multiply(x, of_bits(left<23>(add(to_ints(larger(whole, all(-126.0f))), all(127)))));
}
inline Floats inverse(Floats x) { return {_mm256_div_ps(_mm256_set1_ps(1.0f), x.low), _mm256_div_ps(_mm256_set1_ps(1.0f), x.high)}; }

inline __m256i near(__m256 x) {  // bfloat16 in the low half of 32 bits
    const __m256i bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
}
inline __m256i to_bfloat16(Floats x) { return _mm256_permute4x64_epi64(_mm256_packus_epi32(near(x.low), near(x.high)), 0xd8); }
inline __m256 widened(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
inline Floats from_bfloat16(__m256i x) { return {widened(_mm256_castsi256_si128(x)), widened(_mm256_extracti128_si256(x, 1))}; }
inline Floats load(Mask mask, const uint16_t *from) {
    alignas(32) uint16_t some[SIDE] = {};
    if (mask < SIDE) from = static_cast<const uint16_t *>(std::memcpy(some, from, size_t(mask) * 2));
    return from_bfloat16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
}
inline void store(Mask mask, uint16_t *to, Floats x) {
    alignas(32) uint16_t some[SIDE];
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(mask < SIDE ? some : to), to_bfloat16(x));
    if (mask < SIDE) std::memcpy(to, some, size_t(mask) * 2);
}

#endif

inline __m256i sixteen(const uint16_t *from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)); }

}  // namespace lanes
