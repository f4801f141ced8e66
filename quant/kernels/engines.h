// What multiplies tiles of codes (tiles.h says how they lie): AMX; AVX512-VNNI, whose left operand is unsigned: codes of activations are stored 128 higher
// there, and so are their zero points; or AVX2, in 16 bits, whose pairs add up in 32. Each takes up to 32 rows and two blocks of 16 outputs, and writes
// their sums as four squares: rows 0 to 15 by either block, then rows 16 to 31.
#include "lanes.h"

#include <algorithm>
#include <type_traits>

namespace tiles {

using namespace lanes;

constexpr long DEPTH = 64, TILE = SIDE * DEPTH;

inline long up_to(long size, long unit) { return (size + unit - 1) / unit; }

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
    using Code = int8_t;
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

#ifdef PLANISH_WIDE
// Products of rows, 8 at a time, with 2 x 16 outputs in vectors.
struct Vnni {
    using Code = int8_t;
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
using Own = Vnni;
constexpr int OWN = 2;
#else
// Products of rows, 3 at a time, with 8 outputs in two vectors of sums of pairs; of a row alone with 16. More sums than that GCC keeps in memory.
struct Pairs {
    using Code = int16_t;
    static constexpr bool HIGHER = false;
    static constexpr long STEP = DEPTH, AT_ONCE = 3;
    static int16_t *row(int8_t *codes, long t, long depth) { return reinterpret_cast<int16_t *>(codes) + t * depth * DEPTH; }

    // b: rows of 64 bytes, of which every vector takes 16: 4 outputs by 4 neighbours.
    template <int R, int V> static void some(const int16_t *a, const int8_t *b, long depth, int32_t *to) {
        __m256i sums[R][V], w[V];
        times<R>([&](auto r) { times<V>([&](auto v) { sums[r][v] = _mm256_setzero_si256(); }); });
        for (long k = 0; k < depth * DEPTH; k += 4) {
            times<V>([&](auto v) { w[v] = _mm256_cvtepi8_epi16(_mm_load_si128(reinterpret_cast<const __m128i *>(b + 16 * k) + v)); });
            times<R>([&](auto r) {
                int64_t four;
                std::memcpy(&four, a + r * depth * DEPTH + k, 8);
                const __m256i x = _mm256_set1_epi64x(four);
                times<V>([&](auto v) { sums[r][v] = _mm256_add_epi32(sums[r][v], _mm256_madd_epi16(x, w[v])); });
            });
        }
        times<R>([&](auto r) {
            times<V / 2>([&](auto v) {
                const __m256i eight = _mm256_permute4x64_epi64(_mm256_hadd_epi32(sums[r][2 * v], sums[r][2 * v + 1]), 0xd8);
                _mm256_store_si256(reinterpret_cast<__m256i *>(to + r * SIDE + 8 * v), eight);
            });
        });
    }

    // to: 16 sums for every row.
    static void some(const int16_t *a, long rows, const int8_t *b, long depth, int32_t *to) {
        if (rows == 1) return some<1, 4>(a, b, depth, to);
        for (long half = 0; half < 2; half++, b += DEPTH / 2, to += SIDE / 2) rows == 2 ? some<2, 2>(a, b, depth, to) : some<3, 2>(a, b, depth, to);
    }

    static void multiply(const int16_t *a, long rows, const int8_t *b0, const int8_t *b1, long depth, int32_t sums[4][SIDE * SIDE]) {
        for (long side = 0; side < 2; side++)
            for (long block = 0; block < rows; block += SIDE)
                for (long r = block, end = std::min(rows, block + SIDE); r < end; r += AT_ONCE)
                    some(a + r * depth * DEPTH, std::min(AT_ONCE, end - r), side ? b1 : b0, depth, sums[block / SIDE * 2 + side] + (r - block) * SIDE);
    }
};
using Own = Pairs;
constexpr int OWN = 1;
#endif

}  // namespace tiles
