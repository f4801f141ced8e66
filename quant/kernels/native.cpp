// The passes over activations around an integer product on a CPU, each in one: what they compute is defined in cpu.py, bit for bit but for the
// order of sums and the last bit of exp. Compiled where it runs, by native.py. A row is a token; rows lie `stride` values apart, results densely.
// bfloat16 is uint16_t. A token that is not finite has scale NaN and codes 0. Reductions compare bit patterns or name themselves to `omp simd`,
// so that compilers vectorize them without flags that would give up NaN.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int32_t INFINITE = 0x7f800000;
constexpr long SMALL = 1 << 14;  // values up to which one thread is quicker than waking others

inline float from_bits(uint32_t bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline uint32_t to_bits(float x) { uint32_t bits; std::memcpy(&bits, &x, 4); return bits; }
inline float load(float x) { return x; }
inline float load(uint16_t x) { return from_bits(uint32_t(x) << 16); }
template <class T> inline T narrow(float x);
template <> inline float narrow(float x) { return x; }
template <> inline uint16_t narrow(float x) {
    const uint32_t bits = to_bits(x), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bits & 0x7fffffff) > uint32_t(INFINITE) ? uint16_t(0x7fc0) : uint16_t(rounded);
}
template <class T> inline void store(float x, T *to) { *to = narrow<T>(x); }
template <class T> inline float as(float x) { return load(narrow<T>(x)); }

// 2^(x log2 e): the integer part goes into the exponent, a polynomial does the rest. Within 2 units in the last place.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float shifted = x * 1.44269504f + 12582912.0f, whole = shifted - 12582912.0f;
    const float r = (x - whole * 0.693145752f) - whole * 1.42860677e-6f;
    float p = 1.98412698e-4f;
    p = p * r + 1.38888889e-3f;
    p = p * r + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return from_bits(to_bits(p) + ((to_bits(shifted) - 0x4b400000u) << 23));
}

// x / y, correctly rounded: the remainder of a first guess corrects it (Markstein 1990, theorem 8.5 of his book of 2000). Several times faster.
inline float quotient(float x, float y, float inverse) {
#ifdef __FP_FAST_FMAF
    const float guess = x * inverse;
    return __builtin_fmaf(__builtin_fmaf(-guess, y, x), inverse, guess);
#else
    return x / y;
#endif
}

struct Grid { int bits, symmetric; float clip, least; };

void quantize(const float *row, long width, Grid grid, int8_t *codes, float *scale_out, int32_t *zero_out) {
    const float top = float((1 << (grid.bits - 1)) - 1), bottom = -top - 1;
    int32_t largest = 0;
#pragma omp simd reduction(max : largest)
    for (long c = 0; c < width; c++) { const int32_t bits = int32_t(to_bits(row[c]) & 0x7fffffff); largest = bits > largest ? bits : largest; }
    float scale, zero = 0;
    if (largest >= INFINITE) {
        scale = NAN;
    } else if (grid.symmetric) {
        scale = from_bits(largest) * grid.clip / top;
    } else {
        float low = 0, high = 0;
#pragma omp simd reduction(min : low) reduction(max : high)
        for (long c = 0; c < width; c++) { low = row[c] < low ? row[c] : low; high = row[c] > high ? row[c] : high; }
        low *= grid.clip, high *= grid.clip;
        scale = (high - low) / (top - bottom);
        scale = scale < grid.least ? 1.0f : scale;
        zero = std::nearbyint(bottom - low / scale);
        zero = zero < bottom ? bottom : zero > top ? top : zero;
    }
    scale = scale < grid.least ? 1.0f : scale == INFINITY ? NAN : scale;
    *scale_out = scale;
    if (zero_out) *zero_out = std::isnan(scale) ? 0 : int32_t(zero);
    if (std::isnan(scale)) { std::memset(codes, 0, size_t(width)); return; }
    const float inverse = 1.0f / scale;
#pragma omp simd
    for (long c = 0; c < width; c++) {
        float q = quotient(row[c], scale, inverse) + zero;
        q = q < bottom ? bottom : q > top ? top : q;
        codes[c] = int8_t(int32_t(to_bits(q + 12582912.0f)) - 0x4b400000);  // to nearest, ties to even
    }
}

// Calls work(row number, a buffer of `width` floats) for all rows, in parallel.
template <class Work> void each_row(long rows, long width, int threads, Work work) {
#pragma omp parallel num_threads(threads) if (rows > 1 && rows * width > SMALL)
    {
        std::vector<float> buffer(static_cast<size_t>(width));
#pragma omp for
        for (long t = 0; t < rows; t++) work(t, buffer.data());
    }
}

template <class T>
void quantize_rows(const T *x, long rows, long width, long stride, Grid grid, int8_t *codes, float *scale, int32_t *zero, int threads) {
    each_row(rows, width, threads, [=](long t, float *row) {
        for (long c = 0; c < width; c++) row[c] = load(x[t * stride + c]);
        quantize(row, width, grid, codes + t * width, scale + t, zero ? zero + t : nullptr);
    });
}

template <class T> inline void normalize(const T *x, const T *weight, long width, float eps, float *row) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long c = 0; c < width; c++) { row[c] = load(x[c]); sum += row[c] * row[c]; }
    const float factor = 1.0f / std::sqrt(sum / float(width) + eps);
    for (long c = 0; c < width; c++) row[c] = as<T>(load(weight[c]) * as<T>(row[c] * factor));
}

template <class T> void rms_norm(const T *x, const T *weight, float eps, long rows, long width, long stride, T *y, int threads) {
    each_row(rows, width, threads, [=](long t, float *row) {
        normalize(x + t * stride, weight, width, eps, row);
        for (long c = 0; c < width; c++) store(row[c], y + t * width + c);
    });
}

template <class T>
void rms_norm_quantize(const T *x, const T *weight, float eps, long rows, long width, long stride, Grid grid, int8_t *codes, float *scale,
                       int32_t *zero, int threads) {
    each_row(rows, width, threads, [=](long t, float *row) {
        normalize(x + t * stride, weight, width, eps, row);
        quantize(row, width, grid, codes + t * width, scale + t, zero ? zero + t : nullptr);
    });
}

template <class T>
void silu_mul_quantize(const T *gate, long gate_stride, const T *up, long up_stride, long rows, long width, Grid grid, int8_t *codes, float *scale,
                       int32_t *zero, int threads) {
    each_row(rows, width, threads, [=](long t, float *row) {
        const T *g = gate + t * gate_stride, *u = up + t * up_stride;
        for (long c = 0; c < width; c++) row[c] = load(g[c]) / (1.0f + exponential(-load(g[c])));
        for (long c = 0; c < width; c++) row[c] = as<T>(as<T>(row[c]) * load(u[c]));
        quantize(row, width, grid, codes + t * width, scale + t, zero ? zero + t : nullptr);
    });
}

// y = (x - zero sums) scale + bias. scale: one a row, or one for all (scale_step 0), or none; zero likewise; sums: per column, in x's unit.
template <class T>
void finish(const float *x, const float *scale, long scale_step, const int32_t *zero, long zero_step, const float *sums, const float *bias, long rows,
            long width, T *y, int threads) {
    each_row(rows, width, threads, [=](long t, float *row) {
        const float factor = scale ? scale[t * scale_step] : 1.0f, shift = zero ? float(zero[t * zero_step]) : 0.0f;
        const float *from = x + t * width;
        for (long c = 0; c < width; c++) row[c] = (zero ? from[c] - shift * sums[c] : from[c]) * factor;
        for (long c = 0; c < width; c++) store(bias ? row[c] + bias[c] : row[c], y + t * width + c);
    });
}

// Of a product (gate; up) (rows, 2 width): both as `finish` makes them, then silu(gate) up quantized as silu_mul_quantize does.
template <class T>
void finish_silu_mul_quantize(const float *x, const float *scale, const int32_t *zero, const float *sums, const float *bias, long rows, long width,
                              Grid grid, int8_t *codes, float *scale_out, int32_t *zero_out, int threads) {
    each_row(rows, 2 * width, threads, [=](long t, float *row) {
        const float factor = scale[t], shift = zero ? float(zero[t]) : 0.0f;
        const float *from = x + t * 2 * width;
        for (long c = 0; c < 2 * width; c++) row[c] = (zero ? from[c] - shift * sums[c] : from[c]) * factor;
        if (bias) for (long c = 0; c < 2 * width; c++) row[c] += bias[c];
        for (long c = 0; c < 2 * width; c++) row[c] = as<T>(row[c]);
        for (long c = 0; c < width; c++) row[c] = as<T>(row[c] / (1.0f + exponential(-row[c])));
        for (long c = 0; c < width; c++) row[c] = as<T>(row[c] * row[c + width]);
        quantize(row, width, grid, codes + t * width, scale_out + t, zero_out ? zero_out + t : nullptr);
    });
}

// Rotary embedding: x cos + (-x2, x1) sin, each product and the sum rounded. x: (batches, heads, tokens, width) at any strides but the last; y: the same
// as (batches, tokens, heads, width) lies in memory; cos, sin: (batches or one, tokens, width).
template <class T>
void rotary(const T *x, long batch_stride, long head_stride, long token_stride, long batches, long heads, long tokens, long width, const T *cos,
            const T *sin, long angles_stride, T *y, int threads) {
    each_row(batches * tokens, heads * width, threads, [=](long row, float *) {
        const long b = row / tokens, t = row % tokens, half = width / 2;
        const T *c = cos + b * angles_stride + t * width, *s = sin + b * angles_stride + t * width;
        for (long h = 0; h < heads; h++) {
            const T *from = x + b * batch_stride + h * head_stride + t * token_stride;
            T *to = y + (row * heads + h) * width;
#pragma omp simd
            for (long i = 0; i < half; i++) {
                const float one = load(from[i]), two = load(from[i + half]);
                store(as<T>(one * load(c[i])) + as<T>(-two * load(s[i])), to + i);
                store(as<T>(two * load(c[i + half])) + as<T>(one * load(s[i + half])), to + i + half);
            }
        }
    });
}

// Packed 4-bit codes (outputs, inputs / 2), see nibbles.py, times group scales, as values.
template <class T>
void dequantize(const uint8_t *packed, const float *scale, const float *zero, long outputs, long inputs, long groups, T *weight, int threads) {
    const long size = inputs / groups, half = inputs / 2;
    each_row(outputs, inputs, threads, [=](long o, float *row) {
        const uint8_t *bytes = packed + o * half;
        for (long c = 0; c < half; c++) {
            row[c] = float(int8_t(uint8_t(bytes[c] << 4)) >> 4);
            row[c + half] = float(int8_t(bytes[c]) >> 4);
        }
        for (long g = 0; g < groups; g++) {
            const float factor = scale[o * groups + g], shift = zero ? zero[o * groups + g] : 0.0f;
            for (long c = g * size; c < (g + 1) * size; c++) store((row[c] - shift) * factor, weight + o * inputs + c);
        }
    });
}

}  // namespace

#define EXPORT(T, SUFFIX)                                                                                                                             \
    extern "C" void planish_quantize_##SUFFIX(const T *x, long rows, long width, long stride, int bits, int symmetric, float clip, float least,        \
                                              int8_t *codes, float *scale, int32_t *zero, int threads) {                                              \
        quantize_rows(x, rows, width, stride, Grid{bits, symmetric, clip, least}, codes, scale, zero, threads);                                       \
    }                                                                                                                                                 \
    extern "C" void planish_rms_norm_##SUFFIX(const T *x, const T *weight, float eps, long rows, long width, long stride, T *y, int threads) {         \
        rms_norm(x, weight, eps, rows, width, stride, y, threads);                                                                                    \
    }                                                                                                                                                 \
    extern "C" void planish_rms_norm_quantize_##SUFFIX(const T *x, const T *weight, float eps, long rows, long width, long stride, int bits,           \
                                                       int symmetric, float clip, float least, int8_t *codes, float *scale, int32_t *zero,            \
                                                       int threads) {                                                                                 \
        rms_norm_quantize(x, weight, eps, rows, width, stride, Grid{bits, symmetric, clip, least}, codes, scale, zero, threads);                      \
    }                                                                                                                                                 \
    extern "C" void planish_silu_mul_quantize_##SUFFIX(const T *gate, long gate_stride, const T *up, long up_stride, long rows, long width, int bits,  \
                                                       int symmetric, float clip, float least, int8_t *codes, float *scale, int32_t *zero,            \
                                                       int threads) {                                                                                 \
        silu_mul_quantize(gate, gate_stride, up, up_stride, rows, width, Grid{bits, symmetric, clip, least}, codes, scale, zero, threads);            \
    }                                                                                                                                                 \
    extern "C" void planish_finish_##SUFFIX(const float *x, const float *scale, long scale_step, const int32_t *zero, long zero_step,                  \
                                            const float *sums, const float *bias, long rows, long width, T *y, int threads) {                             \
        finish(x, scale, scale_step, zero, zero_step, sums, bias, rows, width, y, threads);                                                           \
    }                                                                                                                                                 \
    extern "C" void planish_finish_silu_mul_quantize_##SUFFIX(const float *x, const float *scale, const int32_t *zero, const float *sums,              \
                                                              const float *bias, long rows, long width, int bits, int symmetric, float clip,          \
                                                              float least, int8_t *codes, float *scale_out, int32_t *zero_out, int threads) {         \
        finish_silu_mul_quantize<T>(x, scale, zero, sums, bias, rows, width, Grid{bits, symmetric, clip, least}, codes, scale_out, zero_out, threads); \
    }                                                                                                                                                 \
    extern "C" void planish_dequantize_##SUFFIX(const uint8_t *packed, const float *scale, const float *zero, long outputs, long inputs, long groups,  \
                                                T *weight, int threads) {                                                                             \
        dequantize(packed, scale, zero, outputs, inputs, groups, weight, threads);                                                                    \
    }                                                                                                                                                 \
    extern "C" void planish_rotary_##SUFFIX(const T *x, long batch_stride, long head_stride, long token_stride, long batches, long heads, long tokens, \
                                            long width, const T *cos, const T *sin, long angles_stride, T *y, int threads) {                          \
        rotary(x, batch_stride, head_stride, token_stride, batches, heads, tokens, width, cos, sin, angles_stride, y, threads);                       \
    }

EXPORT(float, float32)
EXPORT(uint16_t, bfloat16)

#include "clip.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__) && defined(__linux__)
#define PLANISH_WIDE
#endif
#if defined(PLANISH_WIDE) || (defined(__AVX2__) && defined(__FMA__) && defined(__linux__))
#include "tiles.h"
#include "few.h"
#include "weight_only.h"
#if defined(__AVX512BF16__) || !defined(PLANISH_WIDE)
#include "attention.h"
#endif
#else
extern "C" int planish_engine() { return 0; }
#endif
