// The clip search of a weight's rows: which candidate loses least, what solvers/clip.py defines; included by native.cpp.
namespace clip {

constexpr long PIECE = 256;   // weights after which a candidate that has lost already is left
constexpr long COARSE = 8;  // candidates from one of those to the next that are tried first

inline float multiply_add(float a, float b, float c) {
#ifdef __FP_FAST_FMAF
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// x^power for x from 0 on, within 1e-5; 0 and what is below 2^-126 give about that.
inline float raised(float x, float power) {
    const int32_t bits = int32_t(to_bits(x)), exponent = (bits - 0x3f3504f3) >> 23;  // so that the mantissa lies around 1, from sqrt(1/2) on
    const float mantissa = from_bits(uint32_t(bits) - (uint32_t(exponent) << 23)), t = (mantissa - 1.0f) / (mantissa + 1.0f), square = t * t;
    float log = 0.222222222f;
    log = multiply_add(log, square, 0.285714286f);
    log = multiply_add(log, square, 0.4f);
    log = multiply_add(log, square, 0.666666667f);
    log = multiply_add(log, square, 2.0f) * t;
    float y = power * (float(exponent) + log * 1.44269504f);
    y = y < -126.0f ? -126.0f : y > 127.0f ? 127.0f : y;
    const float shifted = y + 12582912.0f, part = y - (shifted - 12582912.0f);
    float p = 1.33335581e-3f;
    p = multiply_add(p, part, 9.61812911e-3f);
    p = multiply_add(p, part, 5.55041087e-2f);
    p = multiply_add(p, part, 2.40226507e-1f);
    p = multiply_add(p, part, 6.93147181e-1f);
    p = multiply_add(p, part, 1.0f);
    return p * from_bits((to_bits(shifted) - 0x4b400000u + 127u) << 23);
}

// Sum of |w / scale - code|^power over so many weights.
inline float loss(const float *w, long count, float scale, float low, float high, float power) {
    const float inverse = 1.0f / scale;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long c = 0; c < count; c++) {
        const float step = quotient(w[c], scale, inverse);
        float code = (step + 12582912.0f) - 12582912.0f;  // to nearest, ties to even
        code = code < low ? low : code > high ? high : code;
        sum += raised(std::fabs(step - code), power);
    }
    return sum;
}

// The candidate of least unit loss for each of `rows`; scale, zero (or null) and unit: (candidates, rows). largest: (rows, some), a row's largest
// weights, whose loss alone rules most candidates out.
inline void search(const float *w, const float *largest, long rows, long width, long some, const float *scale, const float *zero, const float *unit,
                   long candidates, float bottom, float top, float power, int64_t *best, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * width > SMALL)
    for (long r = 0; r < rows; r++) {
        float least = INFINITY;
        best[r] = 0;
        const auto attempt = [&](long f) {
            const long at = f * rows + r;
            const float low = bottom - (zero ? zero[at] : 0.0f), high = low + top - bottom;
            if (!(unit[at] * loss(largest + r * some, some, scale[at], low, high, power) < least)) return;
            float sum = 0;
            for (long c = 0; c < width && unit[at] * sum < least; c += PIECE)
                sum += loss(w + r * width + c, width - c < PIECE ? width - c : PIECE, scale[at], low, high, power);
            if (unit[at] * sum < least) least = unit[at] * sum, best[r] = f;
        };
        for (long f = 0; f < candidates; f += COARSE) attempt(f);
        for (long f = 0; f < candidates; f++)
            if (f % COARSE) attempt(f);
    }
}

}  // namespace clip

extern "C" void planish_clip_search(const float *w, const float *largest, long rows, long width, long some, const float *scale, const float *zero,
                                    const float *unit, long candidates, float bottom, float top, float power, int64_t *best, int threads) {
    clip::search(w, largest, rows, width, some, scale, zero, unit, candidates, bottom, top, power, best, threads);
}
