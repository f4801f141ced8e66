// Integer products with what stands around them, of bfloat16 activations: quantize, multiply, scale in one call; included by native.cpp. Products by
// what engines.h has for this processor: AMX, AVX512-VNNI or AVX2.
//
// Tiles of 16 rows of 64 bytes lie one after the other, on cache lines of their own: AMX's loads that straddle two lines take four times as long.
// A weight (O, I) is [O / 16][I / 64][16][16][4], the inner 4 being neighbours in I. Codes of activations (T, I) are tiles of 16 tokens for AMX,
// [T / 16][I / 64][16][64], rows for VNNI and AVX2, [T][I / 64][64], of two bytes each for AVX2. What is beyond I holds zeros in weights, what is beyond
// T or O anything; it is not written to results.
#include "engines.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <memory>

namespace tiles {

constexpr long CHUNK = 512;  // tokens at a time: their codes stay in the second cache, and so does memory within bounds

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

#ifdef PLANISH_WIDE
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
#endif

// Rows of bfloat16 as codes for the engine; inside of a parallel region.
template <class E> void quantize_tiles(const uint16_t *x, long rows, long width, long stride, Grid grid, Input to) {
    const long depth = up_to(width, DEPTH);
    std::vector<float> row(size_t(width), 0);
    std::vector<int8_t> codes(size_t(depth * DEPTH), 0);
#pragma omp for
    for (long t = 0; t < rows; t++) {
        typename E::Code *at = E::row(to.codes, t, depth);
#ifdef PLANISH_WIDE
        if (grid.symmetric) {
            quantize_symmetric<E::HIGHER>(x + t * stride, width, grid, at, E::STEP, to.scale + t);
            if (E::HIGHER) to.zero[t] = 128;
            continue;
        }
#endif
        for (long c = 0; c < width; c++) row[size_t(c)] = load(x[t * stride + c]);
        quantize(row.data(), width, grid, codes.data(), to.scale + t, to.zero ? to.zero + t : nullptr);
        if (E::HIGHER) {
            for (int8_t &code : codes) code = int8_t(code ^ -128);
            to.zero[t] += 128;
        }
        for (long k = 0; k < depth; k++)
            for (long c = 0; c < DEPTH; c++) at[k * E::STEP + c] = codes[size_t(k * DEPTH + c)];
    }
}

// What 16 outputs need besides their sums.
struct Columns {
    Floats scale, bias;
    Ints sums;
    Mask mask;
    Columns(const Weight &w, long start) {
        mask = first(w.outputs - start);
        scale = load(mask, w.scale + start);
        sums = load(mask, w.sums + start);
        bias = w.bias ? load(mask, w.bias + start) : all(0.0f);
    }
    Floats finish(const int32_t *sum, const Input &x, long t) const {
        Ints exact = aligned(sum);
        if (x.zero) exact = subtract(exact, multiply(all(x.zero[t]), sums));
        return add(multiply(multiply(floats(exact), scale), all(x.scale[t])), bias);
    }
};

inline Floats rounded(Floats x) { return from_bfloat16(to_bfloat16(x)); }

// x / (1 + exp(-x)), by the steps of `exponential`.
inline Floats silu(Floats x) {
    const Floats magic = all(12582912.0f), y = larger(smaller(subtract(all(0.0f), x), all(88.0f)), all(-87.0f));
    const Floats shifted = multiply_add(y, all(1.44269504f), magic), whole = subtract(shifted, magic);
    const Floats r = subtract_product(whole, all(1.42860677e-6f), subtract_product(whole, all(0.693145752f), y));
    Floats p = all(1.98412698e-4f);
    for (const float c : {1.38888889e-3f, 8.33333333e-3f, 4.16666667e-2f, 1.66666667e-1f, 0.5f, 1.0f, 1.0f}) p = multiply_add(p, r, all(c));
    const Ints exponent = left<23>(subtract(bits(shifted), bits(magic)));
    return multiply(x, inverse(add(all(1.0f), of_bits(add(bits(p), exponent)))));
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
            const long from = 2 * b * SIDE;
            E::multiply(E::row(x.codes, from, depth), std::min(2 * SIDE, rows - from), b0, b1, depth, sums);
            work(from, one, one + second, sums);
        }
    }
}

template <class E> void product(const Input &x, const Weight &w, long rows, uint16_t *y) {
    each_block<E>(x, w, rows, up_to(w.outputs, 2 * SIDE), 2, 1, [&](long from, long one, long other, int32_t sums[4][SIDE * SIDE]) {
        const Columns left(w, one * SIDE), right(w, other * SIDE);
        for (long i = 0; i < 2 * SIDE && from + i < rows; i++) {
            const long t = from + i, tile = i / SIDE * 2, at = i % SIDE * SIDE;
            store(left.mask, y + t * w.outputs + one * SIDE, left.finish(sums[tile] + at, x, t));
            store(right.mask, y + t * w.outputs + other * SIDE, right.finish(sums[tile + 1] + at, x, t));
        }
    });
}

// silu(gate) up of a weight whose rows are all gates, then all ups, as many as a multiple of 16.
template <class E> void gated_product(const Input &x, const Weight &w, long rows, uint16_t *y) {
    const long inner = w.outputs / 2, half = inner / SIDE;
    each_block<E>(x, w, rows, half, 1, half, [&](long from, long one, long other, int32_t sums[4][SIDE * SIDE]) {
        const Columns gates(w, one * SIDE), ups(w, other * SIDE);
        for (long i = 0; i < 2 * SIDE && from + i < rows; i++) {
            const long t = from + i, tile = i / SIDE * 2, at = i % SIDE * SIDE;
            const Floats gate = rounded(silu(rounded(gates.finish(sums[tile] + at, x, t))));
            store(first(SIDE), y + t * inner + one * SIDE, multiply(gate, rounded(ups.finish(sums[tile + 1] + at, x, t))));
        }
    });
}

// Room for the codes, scales and zeros of a chunk.
template <class E> size_t code_bytes(long rows, long width) { return size_t(up_to(rows, SIDE) * up_to(width, DEPTH) * TILE) * sizeof(typename E::Code); }
template <class E> size_t input_bytes(long rows, long width) { return code_bytes<E>(rows, width) + size_t(up_to(rows, SIDE) * SIDE * 8); }
template <class E> Input input_at(int8_t *memory, long rows, long width, Grid grid) {
    const long padded = up_to(rows, SIDE) * SIDE;
    int8_t *after = memory + code_bytes<E>(rows, width);
    return {memory, reinterpret_cast<float *>(after), grid.symmetric && !E::HIGHER ? nullptr : reinterpret_cast<int32_t *>(after + padded * 4)};
}

// rms_norm of native.cpp.
inline void rms_norm(const uint16_t *x, const uint16_t *weight, float eps, long width, uint16_t *y) {
    Floats sums = all(0.0f);
    for (long c = 0; c < width; c += SIDE) {
        const Floats value = load(first(width - c), x + c);
        sums = multiply_add(value, value, sums);
    }
    const Floats factor = all(1.0f / std::sqrt(sum(sums) / float(width) + eps));
    for (long c = 0; c < width; c += SIDE) {
        const Mask mask = first(width - c);
        store(mask, y + c, multiply(load(mask, weight + c), rounded(multiply(load(mask, x + c), factor))));
    }
}

template <class E> void linear(const uint16_t *x, long rows, long stride, const Weight &w, Grid grid, uint16_t *y, int threads) {
    const long most = std::min(rows, CHUNK);
    const Input codes = input_at<E>(scratch(input_bytes<E>(most, w.inputs)), most, w.inputs, grid);
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
    const size_t outer_bytes = up_to(long(input_bytes<E>(most, both.inputs)), 64) * 64, inner_bytes = up_to(long(input_bytes<E>(most, inner)), 64) * 64;
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

// The best engine of this processor: 3 AMX, if the system lets this process use its registers, 2 VNNI, 1 AVX2.
#ifdef __AMX_INT8__
extern "C" int planish_engine() { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0 ? 3 : tiles::OWN; }
#define ON(ENGINE, CALL, ...) ENGINE == 3 ? tiles::CALL<tiles::Amx>(__VA_ARGS__) : tiles::CALL<tiles::Own>(__VA_ARGS__)
#else
extern "C" int planish_engine() { return tiles::OWN; }
#define ON(ENGINE, CALL, ...) tiles::CALL<tiles::Own>(__VA_ARGS__)
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
