// Integer products with what stands around them, of bfloat16 activations: quantize, multiply, scale in one call; included by native.cpp. Products by
// AMX, or by AVX512-VNNI, whose left operand is unsigned: codes of activations are stored 128 higher there, and so are their zero points.
//
// Tiles of 16 rows of 64 bytes lie one after the other, on cache lines of their own: AMX's loads that straddle two lines take four times as long.
// A weight (O, I) is [O / 16][I / 64][16][16][4], the inner 4 being neighbours in I. Codes of activations (T, I) are tiles of 16 tokens for AMX,
// [T / 16][I / 64][16][64], rows for VNNI, [T][I / 64][64]. What is beyond I holds zeros in weights, what is beyond T or O anything; it is not written
// to results.
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <type_traits>

namespace tiles {

constexpr long SIDE = 16, DEPTH = 64, TILE = SIDE * DEPTH;
constexpr long CHUNK = 512;  // tokens at a time: their codes stay in the second cache, and so does memory within bounds

inline long up_to(long size, long unit) { return (size + unit - 1) / unit; }

struct Line { alignas(64) int8_t bytes[64]; };

// Memory for a call, kept for the next.
inline int8_t *scratch(size_t bytes) {
    thread_local std::unique_ptr<Line[]> kept;
    thread_local size_t lines = 0;
    if (lines * 64 < bytes) kept.reset(new Line[lines = bytes / 64 + 1]);
    return kept[0].bytes;
}

struct Weight {
    const int8_t *tiles;
    const float *scale;
    const int32_t *sums;
    const float *bias;  // or null
    long outputs, inputs;
    long depth() const { return up_to(inputs, DEPTH); }
};

struct Input {
    int8_t *codes;
    float *scale;
    int32_t *zero;  // null: all 0
};

#ifdef __AVX512BF16__
inline __m256i to_bfloat16(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
#else
inline __m256i to_bfloat16(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i near = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(near, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0)));
}
#endif
inline __m512 from_bfloat16(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

constexpr long HEIGHT = 8;  // rows whose sums stay in registers

// Calls work with so many rows, at most HEIGHT, as a type's constant.
template <class Work> inline void at_height(long rows, Work work) {
    switch (std::min(HEIGHT, rows)) {
        case 8: return work(std::integral_constant<int, 8>());
        case 7: return work(std::integral_constant<int, 7>());
        case 6: return work(std::integral_constant<int, 6>());
        case 5: return work(std::integral_constant<int, 5>());
        case 4: return work(std::integral_constant<int, 4>());
        case 3: return work(std::integral_constant<int, 3>());
        case 2: return work(std::integral_constant<int, 2>());
        default: return work(std::integral_constant<int, 1>());
    }
}

#ifdef __AMX_INT8__
// Products of tiles.
struct Amx {
    static constexpr bool HIGHER = false;
    static constexpr long STEP = TILE;  // from 64 codes of a row to the next 64
    struct alignas(64) Configuration {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
        Configuration() {
            for (int i = 0; i < 8; i++) bytes[i] = DEPTH, rows[i] = SIDE;
        }
    };
    const Configuration configuration;
    Amx() { _tile_loadconfig(&configuration); }
    ~Amx() { _tile_release(); }
    static int8_t *row(int8_t *codes, long t, long depth) { return codes + t / SIDE * depth * TILE + t % SIDE * DEPTH; }

    // Sums of 2 x 2 tiles: two blocks of 16 tokens by two of 16 outputs.
    static void multiply(const int8_t *a0, long rows, const int8_t *b0, const int8_t *b1, long depth, int32_t sums[4][SIDE * SIDE]) {
        const int8_t *a1 = rows > SIDE ? a0 + depth * TILE : a0;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (long k = 0; k < depth * TILE; k += TILE) {
            _tile_loadd(4, a0 + k, DEPTH);
            _tile_loadd(6, b0 + k, DEPTH);
            _tile_loadd(5, a1 + k, DEPTH);
            _tile_loadd(7, b1 + k, DEPTH);
            _tile_dpbssd(0, 4, 6);
            _tile_dpbssd(1, 4, 7);
            _tile_dpbssd(2, 5, 6);
            _tile_dpbssd(3, 5, 7);
        }
        _tile_stored(0, sums[0], DEPTH);
        _tile_stored(1, sums[1], DEPTH);
        _tile_stored(2, sums[2], DEPTH);
        _tile_stored(3, sums[3], DEPTH);
    }
};
#endif

// Products of rows, 8 at a time, with 2 x 16 outputs in vectors.
struct Vnni {
    static constexpr bool HIGHER = true;
    static constexpr long STEP = DEPTH;
    static int8_t *row(int8_t *codes, long t, long depth) { return codes + t * depth * DEPTH; }

    template <int R> static void some(const int8_t *a, const int8_t *b0, const int8_t *b1, long depth, int32_t *left, int32_t *right) {
        __m512i sums[R][2];
        for (int r = 0; r < R; r++) sums[r][0] = sums[r][1] = _mm512_setzero_si512();
        for (long k = 0; k < depth * DEPTH; k += 4) {
            const __m512i one = _mm512_load_si512(b0 + 16 * k), two = _mm512_load_si512(b1 + 16 * k);
            for (int r = 0; r < R; r++) {
                int32_t four;
                std::memcpy(&four, a + r * depth * DEPTH + k, 4);
                const __m512i x = _mm512_set1_epi32(four);
                sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], x, one);
                sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], x, two);
            }
        }
        for (int r = 0; r < R; r++) {
            _mm512_store_si512(left + r * SIDE, sums[r][0]);
            _mm512_store_si512(right + r * SIDE, sums[r][1]);
        }
    }

    static void multiply(const int8_t *a, long rows, const int8_t *b0, const int8_t *b1, long depth, int32_t sums[4][SIDE * SIDE]) {
        for (long r = 0; r < rows; r += HEIGHT) {
            int32_t *left = sums[r / SIDE * 2] + r % SIDE * SIDE, *right = sums[r / SIDE * 2 + 1] + r % SIDE * SIDE;
            const int8_t *from = a + r * depth * DEPTH;
            at_height(rows - r, [&](auto height) { some<decltype(height)::value>(from, b0, b1, depth, left, right); });
        }
    }
};

// A row's codes on a symmetric grid, 64 bytes at a time, `step` apart: what `quantize` computes.
template <bool HIGHER> inline void quantize_symmetric(const uint16_t *x, long width, Grid grid, int8_t *to, long step, float *scale_out) {
    __m512i most = _mm512_setzero_si512();
    const __m512i positive = _mm512_set1_epi16(0x7fff);
    for (long c = 0; c < width; c += 32) {
        const __mmask32 mask = width - c >= 32 ? ~__mmask32(0) : (__mmask32(1) << (width - c)) - 1;
        most = _mm512_max_epu16(most, _mm512_and_si512(_mm512_maskz_loadu_epi16(mask, x + c), positive));
    }
    const __m512i wide = _mm512_max_epu32(_mm512_slli_epi32(most, 16), _mm512_and_si512(most, _mm512_set1_epi32(int(0xffff0000))));
    const uint32_t largest = _mm512_reduce_max_epu32(wide);
    const float top = float((1 << (grid.bits - 1)) - 1), raw = from_bits(largest) * grid.clip / top;
    const float scale = largest >= uint32_t(INFINITE) ? NAN : raw < grid.least ? 1.0f : raw;
    *scale_out = scale;
    const __m512 divisor = _mm512_set1_ps(scale), inverse = _mm512_set1_ps(std::isnan(scale) ? 0.0f : 1.0f / scale);
    const __m512i low = _mm512_set1_epi32(-int(top) - 1), high = _mm512_set1_epi32(int(top));
    for (long c = 0; c < width; c += SIDE) {
        const __mmask16 mask = width - c >= SIDE ? 0xffff : __mmask16((1u << (width - c)) - 1);
        const __m512 value = from_bfloat16(_mm256_maskz_loadu_epi16(mask, x + c)), guess = _mm512_mul_ps(value, inverse);
        const __m512i code = _mm512_cvtps_epi32(_mm512_fmadd_ps(_mm512_fnmadd_ps(guess, divisor, value), inverse, guess));
        __m128i bytes = _mm512_cvtepi32_epi8(_mm512_max_epi32(low, _mm512_min_epi32(high, code)));
        if (HIGHER) bytes = _mm_xor_si128(bytes, _mm_set1_epi8(-128));
        _mm_store_si128(reinterpret_cast<__m128i *>(to + c / DEPTH * step + c % DEPTH), bytes);
    }
    for (long c = up_to(width, SIDE) * SIDE; c < up_to(width, DEPTH) * DEPTH; c += SIDE)
        _mm_store_si128(reinterpret_cast<__m128i *>(to + c / DEPTH * step + c % DEPTH), _mm_setzero_si128());
}

// Rows of bfloat16 as codes for the engine; inside of a parallel region.
template <class E> void quantize_tiles(const uint16_t *x, long rows, long width, long stride, Grid grid, Input to) {
    const long depth = up_to(width, DEPTH);
    std::vector<float> row(grid.symmetric ? 0 : size_t(width));
    std::vector<int8_t> codes(grid.symmetric ? 0 : size_t(depth * DEPTH), 0);
#pragma omp for
    for (long t = 0; t < rows; t++) {
        int8_t *at = E::row(to.codes, t, depth);
        if (grid.symmetric) {
            quantize_symmetric<E::HIGHER>(x + t * stride, width, grid, at, E::STEP, to.scale + t);
            if (E::HIGHER) to.zero[t] = 128;
            continue;
        }
        for (long c = 0; c < width; c++) row[size_t(c)] = load(x[t * stride + c]);
        quantize(row.data(), width, grid, codes.data(), to.scale + t, to.zero + t);
        if (E::HIGHER) {
            for (int8_t &code : codes) code = int8_t(code ^ -128);
            to.zero[t] += 128;
        }
        for (long k = 0; k < depth; k++) std::memcpy(at + k * E::STEP, codes.data() + k * DEPTH, DEPTH);
    }
}

// What 16 outputs need besides their sums.
struct Columns {
    __m512 scale, bias;
    __m512i sums;
    __mmask16 mask;
    Columns(const Weight &w, long first) {
        mask = first >= w.outputs ? 0 : w.outputs - first >= SIDE ? 0xffff : __mmask16((1u << (w.outputs - first)) - 1);
        scale = _mm512_maskz_loadu_ps(mask, w.scale + first);
        sums = _mm512_maskz_loadu_epi32(mask, w.sums + first);
        bias = w.bias ? _mm512_maskz_loadu_ps(mask, w.bias + first) : _mm512_setzero_ps();
    }
    __m512 finish(const int32_t *sum, const Input &x, long t) const {
        __m512i exact = _mm512_load_si512(sum);
        if (x.zero) exact = _mm512_sub_epi32(exact, _mm512_mullo_epi32(_mm512_set1_epi32(x.zero[t]), sums));
        const __m512 y = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(exact), scale), _mm512_set1_ps(x.scale[t]));
        return _mm512_add_ps(y, bias);
    }
};

inline __m512 rounded(__m512 x) { return from_bfloat16(to_bfloat16(x)); }

// x / (1 + exp(-x)), by the steps of `exponential`.
inline __m512 silu(__m512 x) {
    const __m512 magic = _mm512_set1_ps(12582912.0f), one = _mm512_set1_ps(1.0f);
    const __m512 y = _mm512_max_ps(_mm512_min_ps(_mm512_sub_ps(_mm512_setzero_ps(), x), _mm512_set1_ps(88.0f)), _mm512_set1_ps(-87.0f));
    const __m512 shifted = _mm512_fmadd_ps(y, _mm512_set1_ps(1.44269504f), magic), whole = _mm512_sub_ps(shifted, magic);
    const __m512 r = _mm512_fnmadd_ps(whole, _mm512_set1_ps(1.42860677e-6f), _mm512_fnmadd_ps(whole, _mm512_set1_ps(0.693145752f), y));
    __m512 p = _mm512_set1_ps(1.98412698e-4f);
    for (const float c : {1.38888889e-3f, 8.33333333e-3f, 4.16666667e-2f, 1.66666667e-1f, 0.5f, 1.0f, 1.0f}) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    const __m512i exponent = _mm512_slli_epi32(_mm512_sub_epi32(_mm512_castps_si512(shifted), _mm512_castps_si512(magic)), 23);
    const __m512 below = _mm512_add_ps(one, _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), exponent)));
    const __m512 guess = _mm512_rcp14_ps(below);  // one step of Newton's makes 28 bits of its 14
    return _mm512_mul_ps(x, _mm512_mul_ps(guess, _mm512_fnmadd_ps(below, guess, _mm512_set1_ps(2.0f))));
}

// Calls work(first token, first output block, second output block, sums) for all pairs of blocks.
template <class E, class Work> void each_block(const Input &x, const Weight &w, long rows, long pairs, long first_step, long second, Work work) {
    const long depth = w.depth(), blocks = up_to(rows, 2 * SIDE);
    alignas(64) int32_t sums[4][SIDE * SIDE];
#pragma omp for
    for (long p = 0; p < pairs; p++) {
        const long one = p * first_step, other = std::min(one + second, up_to(w.outputs, SIDE) - 1);
        const int8_t *b0 = w.tiles + one * depth * TILE, *b1 = w.tiles + other * depth * TILE;
        for (long b = 0; b < blocks; b++) {
            const long first = 2 * b * SIDE;
            E::multiply(E::row(x.codes, first, depth), std::min(2 * SIDE, rows - first), b0, b1, depth, sums);
            work(first, one, one + second, sums);
        }
    }
}

template <class E> void product(const Input &x, const Weight &w, long rows, uint16_t *y) {
    each_block<E>(x, w, rows, up_to(w.outputs, 2 * SIDE), 2, 1, [&](long first, long one, long other, int32_t sums[4][SIDE * SIDE]) {
        const Columns left(w, one * SIDE), right(w, other * SIDE);
        for (long i = 0; i < 2 * SIDE && first + i < rows; i++) {
            const long t = first + i, tile = i / SIDE * 2, at = i % SIDE * SIDE;
            _mm256_mask_storeu_epi16(y + t * w.outputs + one * SIDE, left.mask, to_bfloat16(left.finish(sums[tile] + at, x, t)));
            _mm256_mask_storeu_epi16(y + t * w.outputs + other * SIDE, right.mask, to_bfloat16(right.finish(sums[tile + 1] + at, x, t)));
        }
    });
}

// silu(gate) up of a weight whose rows are all gates, then all ups, as many as a multiple of 16.
template <class E> void gated_product(const Input &x, const Weight &w, long rows, uint16_t *y) {
    const long inner = w.outputs / 2, half = inner / SIDE;
    each_block<E>(x, w, rows, half, 1, half, [&](long first, long one, long other, int32_t sums[4][SIDE * SIDE]) {
        const Columns gates(w, one * SIDE), ups(w, other * SIDE);
        for (long i = 0; i < 2 * SIDE && first + i < rows; i++) {
            const long t = first + i, tile = i / SIDE * 2, at = i % SIDE * SIDE;
            const __m512 gate = rounded(silu(rounded(gates.finish(sums[tile] + at, x, t))));
            const __m512 up = rounded(ups.finish(sums[tile + 1] + at, x, t));
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(y + t * inner + one * SIDE), to_bfloat16(_mm512_mul_ps(gate, up)));
        }
    });
}

// Room for the codes, scales and zeros of a chunk.
inline size_t input_bytes(long rows, long width) { return size_t(up_to(rows, SIDE) * up_to(width, DEPTH) * TILE + up_to(rows, SIDE) * SIDE * 8); }
template <class E> Input input_at(int8_t *memory, long rows, long width, Grid grid) {
    const long padded = up_to(rows, SIDE) * SIDE;
    int8_t *after = memory + up_to(rows, SIDE) * up_to(width, DEPTH) * TILE;
    return {memory, reinterpret_cast<float *>(after), grid.symmetric && !E::HIGHER ? nullptr : reinterpret_cast<int32_t *>(after + padded * 4)};
}

// rms_norm of native.cpp.
inline void rms_norm(const uint16_t *x, const uint16_t *weight, float eps, long width, uint16_t *y) {
    __m512 sums = _mm512_setzero_ps();
    for (long c = 0; c < width; c += SIDE) {
        const __mmask16 mask = width - c >= SIDE ? 0xffff : __mmask16((1u << (width - c)) - 1);
        const __m512 value = from_bfloat16(_mm256_maskz_loadu_epi16(mask, x + c));
        sums = _mm512_fmadd_ps(value, value, sums);
    }
    const __m512 factor = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(sums) / float(width) + eps));
    for (long c = 0; c < width; c += SIDE) {
        const __mmask16 mask = width - c >= SIDE ? 0xffff : __mmask16((1u << (width - c)) - 1);
        const __m512 normal = rounded(_mm512_mul_ps(from_bfloat16(_mm256_maskz_loadu_epi16(mask, x + c)), factor));
        const __m512 scaled = _mm512_mul_ps(from_bfloat16(_mm256_maskz_loadu_epi16(mask, weight + c)), normal);
        _mm256_mask_storeu_epi16(y + c, mask, to_bfloat16(scaled));
    }
}

template <class E> void linear(const uint16_t *x, long rows, long stride, const Weight &w, Grid grid, uint16_t *y, int threads) {
    const long most = std::min(rows, CHUNK);
    const Input codes = input_at<E>(scratch(input_bytes(most, w.inputs)), most, w.inputs, grid);
#pragma omp parallel num_threads(threads)
    {
        const E engine;
        for (long t = 0; t < rows; t += CHUNK) {
            quantize_tiles<E>(x + t * stride, std::min(CHUNK, rows - t), w.inputs, stride, grid, codes);
            product<E>(codes, w, std::min(CHUNK, rows - t), y + t * w.outputs);
        }
    }
}

template <class E>
void mlp(const uint16_t *x, long rows, long stride, const Weight &both, Grid grid, const Weight &down, Grid inner_grid, uint16_t *y, int threads) {
    const long most = std::min(rows, CHUNK), inner = down.inputs;
    const size_t outer_bytes = up_to(long(input_bytes(most, both.inputs)), 64) * 64, inner_bytes = up_to(long(input_bytes(most, inner)), 64) * 64;
    int8_t *memory = scratch(outer_bytes + inner_bytes + size_t(most * inner) * 2);
    const Input codes = input_at<E>(memory, most, both.inputs, grid), inner_codes = input_at<E>(memory + outer_bytes, most, inner, inner_grid);
    uint16_t *gated = reinterpret_cast<uint16_t *>(memory + outer_bytes + inner_bytes);
#pragma omp parallel num_threads(threads)
    {
        const E engine;
        for (long t = 0; t < rows; t += CHUNK) {
            const long some = std::min(CHUNK, rows - t);
            quantize_tiles<E>(x + t * stride, some, both.inputs, stride, grid, codes);
            gated_product<E>(codes, both, some, gated);
            quantize_tiles<E>(gated, some, inner, inner, inner_grid, inner_codes);
            product<E>(inner_codes, down, some, y + t * down.outputs);
        }
    }
}

}  // namespace tiles

// The best engine of this processor: 2 AMX, if the system lets this process use its registers, else 1 VNNI.
#ifdef __AMX_INT8__
extern "C" int planish_engine() { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0 ? 2 : 1; }
#define ON(ENGINE, CALL, ...) ENGINE == 2 ? tiles::CALL<tiles::Amx>(__VA_ARGS__) : tiles::CALL<tiles::Vnni>(__VA_ARGS__)
#else
extern "C" int planish_engine() { return 1; }
#define ON(ENGINE, CALL, ...) tiles::CALL<tiles::Vnni>(__VA_ARGS__)
#endif

extern "C" void planish_tiles_rms_norm(const uint16_t *x, const uint16_t *weight, float eps, long rows, long width, long stride, uint16_t *y, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * width > SMALL)
    for (long t = 0; t < rows; t++) tiles::rms_norm(x + t * stride, weight, eps, width, y + t * width);
}

// Tiles of a weight (O, I) of codes; `tiles` has room for them.
extern "C" void planish_tiles(const int8_t *codes, long outputs, long inputs, int8_t *tiles) {
    const long depth = tiles::up_to(inputs, tiles::DEPTH);
    std::memset(tiles, 0, size_t(tiles::up_to(outputs, tiles::SIDE) * depth * tiles::TILE));
    for (long o = 0; o < outputs; o++)
        for (long c = 0; c < inputs; c++)
            tiles[(o / 16 * depth + c / 64) * tiles::TILE + c % 64 / 4 * 64 + o % 16 * 4 + c % 4] = codes[o * inputs + c];
}

extern "C" void planish_tiles_linear(int engine, const uint16_t *x, long rows, long stride, const int8_t *tiles, const float *w_scale,
                                     const int32_t *w_sum, const float *bias, long outputs, long inputs, int bits, int symmetric, float clip,
                                     float least, uint16_t *y, int threads) {
    ON(engine, linear, x, rows, stride, {tiles, w_scale, w_sum, bias, outputs, inputs}, Grid{bits, symmetric, clip, least}, y, threads);
}

extern "C" void planish_tiles_mlp(int engine, const uint16_t *x, long rows, long stride, const int8_t *tiles, const float *w_scale,
                                  const int32_t *w_sum, const float *bias, long inputs, int bits, int symmetric, float clip,
                                  const int8_t *down_tiles, const float *down_scale, const int32_t *down_sum, const float *down_bias, long outputs,
                                  long inner, int down_bits, int down_symmetric, float down_clip, float least, uint16_t *y, int threads) {
    ON(engine, mlp, x, rows, stride, {tiles, w_scale, w_sum, bias, 2 * inner, inputs}, Grid{bits, symmetric, clip, least},
       {down_tiles, down_scale, down_sum, down_bias, outputs, inner}, Grid{down_bits, down_symmetric, down_clip, least}, y, threads);
}
