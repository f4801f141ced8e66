// Attention of bfloat16 on a CPU: softmax(scale Q K' + mask) V, keys taken 64 at a time, sums and softmax in float32; included by native.cpp, behind
// few.h. Products by AVX512-BF16's VDPBF16PS, which adds two products of neighbours to each of 16 sums, or by float32's with AVX2.
//
// B of a product (I, 32 columns) lies as [I / 2][32][2]: pairs of rows beside each other. Keys (K, D) are packed for Q K' in pieces of 32 keys, values
// for P V in pieces of 32 channels, once for all queries of a key-value head. Q is worked on 32 rows at a time, each against all keys it may see.
// A few queries, as in a step of generation, read keys and values as they lie, in float32's products: every task a part of the keys.
namespace attention {

using namespace lanes;
using tiles::at_height, tiles::HEIGHT, tiles::up_to;

constexpr long WIDE = 32, ROWS = 32, KEYS = 64;  // columns of a packed piece; queries and keys of a block
constexpr long PIECE = WIDE * 2;                             // values of one pair of rows in a packed piece
constexpr long MOST = 256;                                   // channels of a head

struct Strided { const uint16_t *at; long batch, head, token; };  // (batches, heads, tokens, channels), channels next to each other
struct Mask { const uint8_t *at; long batch, token; };            // (batches, queries, keys) of 0 and 1, or null
struct Sizes { long batches, heads, key_heads, queries, keys, width; };

#ifdef __AVX512BF16__
constexpr long AT_ONCE = HEIGHT;

// c (R, 32) = or += a (R, 2 pairs) times a packed piece.
template <int R> inline void product(const uint16_t *a, long a_stride, const uint16_t *b, long pairs, float *c, long c_stride, bool add) {
    __m512 sums[R][2];
    for (int r = 0; r < R; r++) {
        sums[r][0] = add ? _mm512_loadu_ps(c + r * c_stride) : _mm512_setzero_ps();
        sums[r][1] = add ? _mm512_loadu_ps(c + r * c_stride + 16) : _mm512_setzero_ps();
    }
    for (long p = 0; p < pairs; p++) {
        const __m512bh one = (__m512bh)_mm512_loadu_si512(b + p * PIECE), two = (__m512bh)_mm512_loadu_si512(b + p * PIECE + 32);
        for (int r = 0; r < R; r++) {
            int32_t pair;
            std::memcpy(&pair, a + r * a_stride + 2 * p, 4);
            const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], x, one);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], x, two);
        }
    }
    for (int r = 0; r < R; r++) {
        _mm512_storeu_ps(c + r * c_stride, sums[r][0]);
        _mm512_storeu_ps(c + r * c_stride + 16, sums[r][1]);
    }
}
#else
constexpr long AT_ONCE = 3;

// c (R, 32) = or += a (R, 2 pairs) times a packed piece; 16 columns at a time.
template <int R> inline void product(const uint16_t *a, long a_stride, const uint16_t *b, long pairs, float *c, long c_stride, bool add) {
    for (long half = 0; half < WIDE; half += SIDE, b += WIDE, c += SIDE) {
        Floats sums[R];
        times<R>([&](auto r) { sums[r] = add ? load(c + r * c_stride) : all(0.0f); });
        for (long p = 0; p < pairs; p++) {
            const Ints both = ints(b + p * PIECE);
            const Floats even = of_bits(left<16>(both)), odd = of_bits(upper(both));
            times<R>([&](auto r) {
                int32_t pair;
                std::memcpy(&pair, a + r * a_stride + 2 * p, 4);
                sums[r] = multiply_add(of_bits(all(int32_t(uint32_t(pair) << 16))), even, sums[r]);
                sums[r] = multiply_add(of_bits(all(int32_t(pair & int32_t(0xffff0000)))), odd, sums[r]);
            });
        }
        times<R>([&](auto r) { store(c + r * c_stride, sums[r]); });
    }
}
#endif

inline void product(long rows, const uint16_t *a, long a_stride, const uint16_t *b, long pairs, float *c, long c_stride, bool add) {
    for (long r = 0; r < rows; r += AT_ONCE)
        at_height(std::min(AT_ONCE, rows - r), [&](auto height) {
            product<decltype(height)::value>(a + r * a_stride, a_stride, b, pairs, c + r * c_stride, c_stride, add);
        });
}

// 32 keys from `first` on as a piece of (D, 32 keys); zeros beyond the last.
inline void pack_keys(const uint16_t *k, long stride, long first, long keys, long width, uint16_t *to) {
#ifdef PLANISH_WIDE
    const __m512i lanes = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(int(stride)));
    for (long half = 0; half < 2; half++) {
        const long start = first + 16 * half, count = std::max(0L, std::min(16L, keys - start));
        const __mmask16 there = __mmask16((1u << count) - 1);
        for (long d = 0; d < width; d += 2) {
            const void *from = k + (count ? start : 0) * stride + d;
            const __m512i pairs = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), there, lanes, from, 2);
            _mm512_storeu_si512(to + d / 2 * PIECE + 32 * half, pairs);
        }
    }
#else
    for (long i = 0; i < WIDE; i++)
        for (long d = 0; d < width; d += 2)
            if (first + i < keys) std::memcpy(to + d / 2 * PIECE + 2 * i, k + (first + i) * stride + d, 4);
            else std::memset(to + d / 2 * PIECE + 2 * i, 0, 4);
#endif
}

// Two values from `first` on as one pair of rows of every piece of (keys, 32 channels); pieces lie `piece` apart.
inline void pack_values(const uint16_t *v, long stride, long first, long keys, long width, long piece, uint16_t *to) {
    for (long d = 0; d < width; d += SIDE) {
        const __m256i one = first < keys ? sixteen(v + first * stride + d) : _mm256_setzero_si256();
        const __m256i two = first + 1 < keys ? sixteen(v + (first + 1) * stride + d) : _mm256_setzero_si256();
        const __m256i low = _mm256_unpacklo_epi16(one, two), high = _mm256_unpackhi_epi16(one, two);
        __m256i *at = reinterpret_cast<__m256i *>(to + d / WIDE * piece + first / 2 * PIECE + d % WIDE * 2);
        _mm256_storeu_si256(at, _mm256_permute2x128_si256(low, high, 0x20));
        _mm256_storeu_si256(at + 1, _mm256_permute2x128_si256(low, high, 0x31));
    }
}

// exp of what is not above 0: a power of two times a polynomial, within 3e-6.
inline Floats exponential(Floats x) {
    const Floats y = multiply(x, all(1.44269504f)), whole = nearest(y), part = subtract(y, whole);
    Floats p = all(1.33335581e-3f);
    for (const float c : {9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.0f}) p = multiply_add(p, part, all(c));
    return by_power(p, whole);
}

// A block of queries: what is kept of each while its keys go by.
template <long R> struct Block {
    alignas(64) float scores[R][KEYS];
    alignas(64) uint16_t shares[R][KEYS];
    alignas(64) float sums[R][MOST];
    float most[R], total[R];
    void begin(long r, long width) {
        most[r] = -INFINITY, total[r] = 0;
        std::memset(sums[r], 0, size_t(width) * 4);
    }
};

// Keys from `first` on that query t may see, of 16: a bit each.
inline uint16_t seen(const uint8_t *mask, long t, long first, long keys, bool causal) {
    const long last = causal ? std::min(keys, t + 1) : keys, count = std::max(0L, std::min(SIDE, last - first));
    if (!mask) return uint16_t((1u << count) - 1);
    uint8_t bytes[SIDE] = {};
    std::memcpy(bytes, mask + first, size_t(count));
    const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i *>(bytes));
    return uint16_t(~_mm_movemask_epi8(_mm_cmpeq_epi8(sixteen, _mm_setzero_si128())));
}

// The scores of one query become shares, and its sums are brought to the new largest score.
template <long R> inline void soften(Block<R> &b, long r, const uint16_t *sees, float scale, long width) {
    if (!(sees[0] | sees[1] | sees[2] | sees[3])) {
        std::memset(b.shares[r], 0, sizeof b.shares[r]);
        return;
    }
    Floats most = all(-INFINITY), total = all(0.0f);
    for (int i = 0; i < 4; i++) most = choose(sees[i], larger(load(b.scores[r] + SIDE * i), most), most);
    const float before = b.most[r], after = std::max(before, largest(most) * scale);
    for (int i = 0; i < 4; i++) {
        const Floats apart = multiply_add(load(b.scores[r] + SIDE * i), all(scale), all(-after));
        const Floats share = choose(sees[i], exponential(apart), all(0.0f));
        total = add(total, share);
        store(lanes::first(SIDE), b.shares[r] + SIDE * i, share);
    }
    const float shrink = before > -INFINITY ? std::exp(before - after) : 0.0f;
    b.most[r] = after, b.total[r] = b.total[r] * shrink + sum(total);
    if (shrink != 1.0f)
        for (long d = 0; d < width; d += SIDE) store(b.sums[r] + d, multiply(load(b.sums[r] + d), all(shrink)));
}

// Queries from `first` on, at most 32, of one head: y (rows, width), rows y_stride apart.
inline void attend(Block<ROWS> &b, const uint16_t *q, long q_stride, long first, long rows, const uint16_t *keys_packed, const uint16_t *values_packed,
                   const uint8_t *mask, long mask_stride, long keys, long width, float scale, bool causal, uint16_t *y, long y_stride) {
    const long piece = up_to(keys, KEYS) * KEYS * WIDE;
    for (long r = 0; r < rows; r++) b.begin(r, width);
    for (long k = 0; k < (causal ? std::min(keys, first + rows) : keys); k += KEYS) {
        uint16_t sees[ROWS][4];
        uint32_t any = 0;
        for (long r = 0; r < rows; r++)
            for (int i = 0; i < 4; i++)
                any |= sees[r][i] = seen(mask ? mask + (first + r) * mask_stride : nullptr, first + r, k + 16 * i, keys, causal);
        if (!any) continue;
        for (long half = 0; half < KEYS; half += WIDE)
            product(rows, q, q_stride, keys_packed + (k + half) * width, width / 2, b.scores[0] + half, KEYS, false);
        for (long r = 0; r < rows; r++) soften(b, r, sees[r], scale, width);
        for (long d = 0; d < width; d += WIDE)
            product(rows, b.shares[0], KEYS, values_packed + d / WIDE * piece + k * WIDE, KEYS / 2, b.sums[0] + d, MOST, true);
    }
    for (long r = 0; r < rows; r++) {
        const Floats share = all(b.total[r] == 0 ? 0.0f : 1.0f / b.total[r]);
        for (long d = 0; d < width; d += SIDE) store(lanes::first(SIDE), y + r * y_stride + d, multiply(load(b.sums[r] + d), share));
    }
}

// How many keys there are up to the last that any query sees: what lies beyond is the room of a static cache.
inline long last_seen(const uint8_t *mask, long stride, long queries, long keys) {
    long last = 0;
    for (long t = queries - 1; t >= 0; t--) {
        const uint8_t *row = mask + t * stride;
        long k = keys;
        for (__m256i some; k - 32 >= last; k -= 32) {
            std::memcpy(&some, row + k - 32, 32);
            if (!_mm256_testz_si256(some, some)) break;
        }
        while (k > last && !row[k - 1]) k--;
        last = std::max(last, k);
    }
    return last;
}

constexpr long FEW = 4, TOGETHER = 4;  // queries for which packing does not pay; rows, of all query heads that share a key-value head, in registers
constexpr long PARTS = 64, TASKS = 4;  // at most so many parts of the keys; tasks for each thread
using Part = Block<TOGETHER>;

// sums (R, width) += shares (R, count), float32, times values as they lie.
template <int R> inline void add_values(const float *shares, const uint16_t *v, long stride, long count, long width, float *sums) {
    for (long d = 0; d < width; d += SIDE) {
        Floats found[R];
        times<R>([&](auto r) { found[r] = load(sums + r * MOST + d); });
        for (long i = 0; i < count; i++) {
            const Floats value = from_bfloat16(sixteen(v + i * stride + d));
            times<R>([&](auto r) { found[r] = multiply_add(all(shares[r * KEYS + i]), value, found[r]); });
        }
        times<R>([&](auto r) { store(sums + r * MOST + d, found[r]); });
    }
}

// What a part of the keys, from `first` up to `end`, adds to R rows of a key-value head; row r is query r / group of the head's query head r % group.
template <int R>
void see_part(Part &b, Strided q, long row, long group, Strided k, Strided v, Mask mask, long first, long end, long width, float scale,
              bool causal) {
    alignas(64) float wide[R][MOST];
    for (int r = 0; r < R; r++) {
        const uint16_t *from = q.at + (row + r) % group * q.head + (row + r) / group * q.token;
        for (long d = 0; d < width; d += SIDE) store(wide[r] + d, from_bfloat16(sixteen(from + d)));
        b.begin(r, width);
    }
    for (long key = first; key < end; key += KEYS) {
        uint16_t sees[R][4];
        uint32_t any = 0;
        const long count = std::min(KEYS, end - key);
        for (int r = 0; r < R; r++)
            for (int i = 0; i < 4; i++) {
                const long t = (row + r) / group;
                any |= sees[r][i] = seen(mask.at ? mask.at + t * mask.token : nullptr, t, key + SIDE * i, end, causal);
            }
        if (!any) continue;
        few::dots<R>(wide[0], MOST, k.at + key * k.token, k.token, count, width, b.scores[0], KEYS);
        for (int r = 0; r < R; r++) {
            soften(b, r, sees[r], scale, width);
            for (long i = 0; i < KEYS; i += SIDE) store(b.scores[r] + i, from_bfloat16(sixteen(b.shares[r] + i)));
        }
        add_values<R>(b.scores[0], v.at + key * v.token, v.token, count, width, b.sums[0]);
    }
}

// What was found in parts of the keys, as one: row r's output.
inline void join(const Part *blocks, long parts, long r, long width, uint16_t *y) {
    float most = -INFINITY, total = 0, weights[PARTS];
    for (long p = 0; p < parts; p++) most = std::max(most, blocks[p].most[r]);
    for (long p = 0; p < parts; p++) {
        weights[p] = blocks[p].total[r] == 0 ? 0.0f : std::exp(blocks[p].most[r] - most);
        total += weights[p] * blocks[p].total[r];
    }
    const Floats share = all(total == 0 ? 0.0f : 1.0f / total);
    for (long d = 0; d < width; d += SIDE) {
        Floats found = all(0.0f);
        for (long p = 0; p < parts; p++) found = multiply_add(all(weights[p]), load(blocks[p].sums[r] + d), found);
        store(lanes::first(SIDE), y + d, multiply(found, share));
    }
}

// `attention` of at most FEW queries, without packing: every part of the keys by itself, then the parts of each row as one.
inline void attend_few(Strided q, Strided k, Strided v, Mask mask, Sizes n, float scale, bool causal, uint16_t *y, int threads) {
    const long group = n.heads / n.key_heads, rows = group * n.queries, pieces = up_to(rows, TOGETHER), tasks = n.batches * n.key_heads * pieces;
    long keys = mask.at ? 0 : n.keys;
    for (long at = 0; mask.at && at < n.batches; at++) keys = std::max(keys, last_seen(mask.at + at * mask.batch, mask.token, n.queries, n.keys));
    const long parts = std::max(1L, std::min({PARTS, up_to(keys, KEYS), up_to(TASKS * threads, std::max(1L, tasks))}));
    const long length = up_to(up_to(keys, parts), KEYS) * KEYS;
    Part *found = reinterpret_cast<Part *>(tiles::scratch(size_t(tasks * parts) * sizeof(Part)));
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic)
        for (long task = 0; task < tasks * parts; task++) {
            const long part = task % parts, row = task / parts % pieces * TOGETHER, both = task / parts / pieces;
            const long at = both / n.key_heads, head = both % n.key_heads;
            const Strided mine{q.at + at * q.batch + head * group * q.head, q.batch, q.head, q.token};
            const Strided its_k{k.at + at * k.batch + head * k.head, k.batch, k.head, k.token};
            const Strided its_v{v.at + at * v.batch + head * v.head, v.batch, v.head, v.token};
            const Mask sees{mask.at ? mask.at + at * mask.batch : nullptr, mask.batch, mask.token};
            at_height(std::min(TOGETHER, rows - row), [&](auto height) {
                see_part<std::min<int>(TOGETHER, decltype(height)::value)>(found[task], mine, row, group, its_k, its_v, sees, part * length,
                                                                           std::min(keys, (part + 1) * length), n.width, scale, causal);
            });
        }
#pragma omp for
        for (long both = 0; both < n.batches * n.key_heads; both++)
            for (long row = 0; row < rows; row++) {
                const long at = both / n.key_heads, head = both % n.key_heads * group + row % group;
                uint16_t *to = y + ((at * n.queries + row / group) * n.heads + head) * n.width;
                join(found + (both * pieces + row / TOGETHER) * parts, parts, row % TOGETHER, n.width, to);
            }
    }
}

inline void attention(Strided q, Strided k, Strided v, Mask mask, Sizes n, float scale, bool causal, uint16_t *y, int threads) {
    if (n.queries <= FEW) return attend_few(q, k, v, mask, n, scale, causal, y, threads);
    const long room = up_to(n.keys, KEYS) * KEYS, group = n.heads / n.key_heads, blocks = up_to(n.queries, ROWS);
    uint16_t *keys_packed = reinterpret_cast<uint16_t *>(tiles::scratch(size_t(4 * room * n.width))), *values_packed = keys_packed + room * n.width;
#pragma omp parallel num_threads(threads)
    {
        const std::unique_ptr<Block<ROWS>> block(new Block<ROWS>);
        for (long both = 0; both < n.batches * n.key_heads; both++) {
            const long at = both / n.key_heads, head = both % n.key_heads;
            const uint8_t *sees = mask.at ? mask.at + at * mask.batch : nullptr;
            const long keys = sees ? last_seen(sees, mask.token, n.queries, n.keys) : n.keys, padded = up_to(keys, KEYS) * KEYS;
#pragma omp for
            for (long first = 0; first < padded; first += WIDE) {
                pack_keys(k.at + at * k.batch + head * k.head, k.token, first, keys, n.width, keys_packed + first * n.width);
                for (long pair = first; pair < first + WIDE; pair += 2)
                    pack_values(v.at + at * v.batch + head * v.head, v.token, pair, keys, n.width, padded * WIDE, values_packed);
            }
#pragma omp for schedule(dynamic)
            for (long task = 0; task < group * blocks; task++) {  // long rows of a causal pass first
                const long mine = head * group + task % group, first = (blocks - 1 - task / group) * ROWS;
                attend(*block, q.at + at * q.batch + mine * q.head + first * q.token, q.token, first, std::min(ROWS, n.queries - first), keys_packed,
                       values_packed, sees, mask.token, keys, n.width, scale, causal, y + ((at * n.queries + first) * n.heads + mine) * n.width,
                       n.heads * n.width);
            }
        }
    }
}

}  // namespace attention

// q: (batches, heads, queries, width), k, v: (batches, key_heads, keys, width), width a multiple of 32 up to 256; strides of all but the last. mask:
// (batches, queries, keys) of bytes, or null; causal: query t sees keys 0 to t. y: (batches, queries, heads, width), dense. A query that sees no key: 0.
extern "C" void planish_attention_bfloat16(const uint16_t *q, long q_batch, long q_head, long q_token, const uint16_t *k, long k_batch, long k_head,
                                           long k_token, const uint16_t *v, long v_batch, long v_head, long v_token, const uint8_t *mask,
                                           long mask_batch, long mask_token, long batches, long heads, long key_heads, long queries, long keys,
                                           long width, float scale, int causal, uint16_t *y, int threads) {
    attention::attention({q, q_batch, q_head, q_token}, {k, k_batch, k_head, k_token}, {v, v_batch, v_head, v_token}, {mask, mask_batch, mask_token},
                         {batches, heads, key_heads, queries, keys, width}, scale, causal, y, threads);
}
