// Products of float rows with a matrix of packed 4-bit codes (nibbles.py) and group scales, decoded in registers and summed in float32, by AVX2;
// included by native.cpp, behind tiles.h.
//
// 32 bytes hold 32 codes c (low nibbles) and the 32 codes c + inputs / 2 (high ones). A code becomes a float by two look-ups of 16: the upper and the
// lower byte of its bfloat16. That leaves each 32 in another order, [0 2 4 6 16 18 20 22] [1 3 5 7 17 19 21 23] [8 10 12 14 24 26 28 30]
// [9 11 13 15 25 27 29 31], in which the rows lie, too: [rows][32-byte chunks][low, high][32].
namespace weight_only {

using namespace lanes;
using tiles::at_height, tiles::up_to;

constexpr long CHUNK = 32;   // bytes
constexpr int TOGETHER = 4;  // rows whose sums stay in registers
constexpr long ROWS = 16, OUTPUTS = 32;  // of a block: what is read of the matrix for it stays in the first cache

struct Matrix {
    const uint8_t *packed;
    const float *scale, *zero;  // (outputs, groups); zero: or null
    long outputs, inputs, groups;
    long half() const { return inputs / 2; }
    long chunks() const { return up_to(half(), CHUNK); }
};

// A row as the codes will lie, zeros where there are none, and the sums of each 32.
template <class T> void lay_out(const T *x, const Matrix &m, float *to, float *sums) {
    static constexpr uint8_t FROM[CHUNK] = {0, 2,  4,  6,  16, 18, 20, 22, 1, 3,  5,  7,  17, 19, 21, 23,
                                            8, 10, 12, 14, 24, 26, 28, 30, 9, 11, 13, 15, 25, 27, 29, 31};
    for (long k = 0; k < m.chunks(); k++)
        for (long side = 0; side < 2; side++, to += CHUNK, sums++) {
            *sums = 0;
            for (long i = 0; i < CHUNK; i++) {
                const long c = k * CHUNK + FROM[i];
                to[i] = c < m.half() ? ::load(x[side * m.half() + c]) : 0.0f;
                *sums += to[i];
            }
        }
}

struct Decoded { __m256 at[4]; };

// 32 codes, as nibbles in the lower halves of bytes.
inline Decoded decode(__m256i nibbles) {
    const __m256i upper = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 0x3f, 0x40, 0x40, 0x40, 0x40, 0x40, 0x40, int8_t(0xc1), int8_t(0xc0), int8_t(0xc0),
                                                                    int8_t(0xc0), int8_t(0xc0), int8_t(0xc0), int8_t(0xc0), int8_t(0xbf)));
    const __m256i lower = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, int8_t(0x80), 0, 0x40, int8_t(0x80), int8_t(0xa0), int8_t(0xc0), int8_t(0xe0), 0,
                                                                    int8_t(0xe0), int8_t(0xc0), int8_t(0xa0), int8_t(0x80), 0x40, 0, int8_t(0x80)));
    const __m256i high = _mm256_shuffle_epi8(upper, nibbles), low = _mm256_shuffle_epi8(lower, nibbles);
    const __m256i one = _mm256_unpacklo_epi8(low, high), two = _mm256_unpackhi_epi8(low, high), odd = _mm256_set1_epi32(int(0xffff0000));
    return {{_mm256_castsi256_ps(_mm256_slli_epi32(one, 16)), _mm256_castsi256_ps(_mm256_and_si256(one, odd)),
             _mm256_castsi256_ps(_mm256_slli_epi32(two, 16)), _mm256_castsi256_ps(_mm256_and_si256(two, odd))}};
}

// y[row] = x times row o of the matrix. x_sums: of each 32. groups: of each 32.
template <int R> inline void dots(const float *x, long x_stride, const float *x_sums, const Matrix &m, const int32_t *groups, long o, float *y) {
    const long half = m.half(), chunks = m.chunks();
    const uint8_t *bytes = m.packed + o * half;
    const float *scale = m.scale + o * m.groups, *zero = m.zero ? m.zero + o * m.groups : nullptr;
    const __m256i nibble = _mm256_set1_epi8(15);
    alignas(32) uint8_t last[CHUNK] = {};
    if (half % CHUNK) std::memcpy(last, bytes + half / CHUNK * CHUNK, size_t(half % CHUNK));
    __m256 total[R];
    float shift[R] = {};
    times<R>([&](auto r) { total[r] = _mm256_setzero_ps(); });
    for (long k = 0; k < chunks; k++, x += 2 * CHUNK) {
        const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(half - k * CHUNK < CHUNK ? last : bytes + k * CHUNK));
        times<2>([&](auto side) {
            const Decoded codes = decode(_mm256_and_si256(side ? _mm256_srli_epi16(both, 4) : both, nibble));
            const long group = groups[2 * k + side];
            const __m256 factor = _mm256_broadcast_ss(scale + group);
            times<R>([&](auto r) {
                const float *at = x + r * x_stride + side * CHUNK;
                __m256 sums = _mm256_mul_ps(_mm256_loadu_ps(at), codes.at[0]);
                sums = _mm256_fmadd_ps(_mm256_loadu_ps(at + 8), codes.at[1], sums);
                sums = _mm256_fmadd_ps(_mm256_loadu_ps(at + 16), codes.at[2], sums);
                sums = _mm256_fmadd_ps(_mm256_loadu_ps(at + 24), codes.at[3], sums);
                total[r] = _mm256_fmadd_ps(sums, factor, total[r]);
            });
            if (zero)
                for (int r = 0; r < R; r++) shift[r] += scale[group] * zero[group] * x_sums[(r * chunks + k) * 2 + side];
        });
    }
    times<R>([&](auto r) {
        __m128 four = _mm_add_ps(_mm256_castps256_ps128(total[r]), _mm256_extractf128_ps(total[r], 1));
        four = _mm_add_ps(four, _mm_movehl_ps(four, four));
        y[r] = _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1))) - shift[r];
    });
}

// y (rows, outputs) = x (rows, inputs) times the matrix + bias, rounded once.
template <class T> void linear(const T *x, long rows, long stride, const Matrix &m, const T *bias, T *y, int threads) {
    const long width = 2 * m.chunks() * CHUNK, sums = width / CHUNK, size = m.inputs / m.groups;
    std::vector<int32_t> groups(size_t(sums), 0);  // one for all, or each of whole chunks
    for (long i = 0; i < sums && m.groups > 1; i++) groups[size_t(i)] = int32_t((i / 2 * CHUNK + i % 2 * m.half()) / size);
    float *laid = reinterpret_cast<float *>(tiles::scratch(size_t(rows * (width + sums)) * sizeof(float))), *laid_sums = laid + rows * width;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (long t = 0; t < rows; t++) lay_out(x + t * stride, m, laid + t * width, laid_sums + t * sums);
#pragma omp for
        for (long first = 0; first < m.outputs; first += OUTPUTS)
            for (long block = 0; block < rows; block += ROWS)
                for (long o = first; o < std::min(m.outputs, first + OUTPUTS); o++)
                    for (long t = block, end = std::min(rows, block + ROWS); t < end; t += TOGETHER) {
                        float found[TOGETHER];
                        const long some = std::min(long(TOGETHER), end - t);
                        at_height(some, [&](auto height) {
                            constexpr int R = std::min(TOGETHER, int(decltype(height)::value));
                            dots<R>(laid + t * width, width, laid_sums + t * sums, m, groups.data(), o, found);
                        });
                        for (long r = 0; r < some; r++) ::store(found[r] + (bias ? ::load(bias[o]) : 0.0f), y + (t + r) * m.outputs + o);
                    }
    }
}

}  // namespace weight_only

// packed: (outputs, inputs / 2); scale, zero: (outputs, groups), zero or null; groups of whole chunks and a half of whole chunks, or one group.
#define PLANISH_WEIGHT_ONLY(T, SUFFIX)                                                                                                                \
    extern "C" void planish_weight_only_##SUFFIX(const T *x, long rows, long stride, const uint8_t *packed, const float *scale, const float *zero,     \
                                                 const T *bias, long outputs, long inputs, long groups, T *y, int threads) {                           \
        weight_only::linear(x, rows, stride, {packed, scale, zero, outputs, inputs, groups}, bias, y, threads);                                        \
    }
PLANISH_WEIGHT_ONLY(float, float32)
PLANISH_WEIGHT_ONLY(uint16_t, bfloat16)
