// AMX's tile instructions as tiles.h uses them, in software, for processors without. Traps on what AMX would fault at, and where it would be slow:
// another configuration than 8 tiles of 16 rows of 64 bytes, none at all, tiles off their cache lines.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_dpbssd
#undef _tile_stored

namespace emulated {

inline thread_local int8_t tile[8][16][64];
inline thread_local bool configured = false;

inline void demand(bool met) {
    if (!met) __builtin_trap();
}

inline void configure(const void *from) {
    const uint8_t *bytes = static_cast<const uint8_t *>(from);
    demand(bytes[0] == 1);
    for (int i = 0; i < 8; i++) demand(bytes[16 + 2 * i] == 64 && bytes[17 + 2 * i] == 0 && bytes[48 + i] == 16);
    configured = true;
}

inline void zero(int i) {
    demand(configured);
    std::memset(tile[i], 0, sizeof tile[i]);
}

inline void load(int i, const void *from, long step) {
    demand(configured && reinterpret_cast<uintptr_t>(from) % 64 == 0 && step == 64);
    for (int r = 0; r < 16; r++) std::memcpy(tile[i][r], static_cast<const int8_t *>(from) + r * step, 64);
}

inline void store(int i, void *to, long step) {
    for (int r = 0; r < 16; r++) std::memcpy(static_cast<int8_t *>(to) + r * step, tile[i][r], 64);
}

inline void multiply(int to, int a, int b) {
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 16; n++) {
            int32_t sum;
            std::memcpy(&sum, &tile[to][m][4 * n], 4);
            for (int k = 0; k < 64; k++) sum += int(tile[a][m][k]) * int(tile[b][k / 4][4 * n + k % 4]);
            std::memcpy(&tile[to][m][4 * n], &sum, 4);
        }
}

}  // namespace emulated

#define _tile_loadconfig(from) emulated::configure(from)
#define _tile_release() emulated::configured = false
#define _tile_zero(i) emulated::zero(i)
#define _tile_loadd(i, from, step) emulated::load(i, from, step)
#define _tile_stored(i, to, step) emulated::store(i, to, step)
#define _tile_dpbssd(to, a, b) emulated::multiply(to, a, b)
