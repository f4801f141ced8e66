// Products of a few rows with a bfloat16 matrix that is read as it lies, in float32: reading it is what takes the time then; included by
// native.cpp, behind tiles.h.
namespace few {

using namespace lanes;

constexpr int MOST = 4;  // rows

// y (R, count) = x (R, width), float32, times `count` rows of b; width: a multiple of 16.
template <int R> inline void dots(const float *x, long x_stride, const uint16_t *b, long stride, long count, long width, float *y, long y_stride) {
    for (long i = 0; i < count; i++, b += stride) {
        Floats sums[R];
        times<R>([&](auto r) { sums[r] = all(0.0f); });
        for (long c = 0; c < width; c += SIDE) {
            const Floats value = from_bfloat16(sixteen(b + c));
            times<R>([&](auto r) { sums[r] = multiply_add(load(x + r * x_stride + c), value, sums[r]); });
        }
        times<R>([&](auto r) { y[r * y_stride + i] = sum(sums[r]); });
    }
}

// y (rows, outputs) = x (rows, inputs) w' + bias, rounded once.
inline void linear(const uint16_t *x, long rows, long stride, const uint16_t *w, const uint16_t *bias, long outputs, long inputs, uint16_t *y,
                   int threads) {
    constexpr long PIECE = 64;
    std::vector<float> wide(size_t(rows * inputs));
    for (long r = 0; r < rows; r++)
        for (long c = 0; c < inputs; c++) wide[size_t(r * inputs + c)] = ::load(x[r * stride + c]);
#pragma omp parallel for num_threads(threads)
    for (long first = 0; first < outputs; first += PIECE) {
        float sums[MOST][PIECE];
        const long count = std::min(PIECE, outputs - first);
        tiles::at_height(rows, [&](auto height) {
            dots<std::min(MOST, int(decltype(height)::value))>(wide.data(), inputs, w + first * inputs, inputs, count, inputs, sums[0], PIECE);
        });
        for (long r = 0; r < rows; r++)
            for (long i = 0; i < count; i++) y[r * outputs + first + i] = narrow<uint16_t>(sums[r][i] + (bias ? ::load(bias[first + i]) : 0.0f));
    }
}

}  // namespace few

// x: (rows, inputs), rows `stride` apart, at most 4; w: (outputs, inputs), dense, inputs a multiple of 16; bias: (outputs), or null; y: dense.
extern "C" void planish_few_bfloat16(const uint16_t *x, long rows, long stride, const uint16_t *w, const uint16_t *bias, long outputs, long inputs,
                                     uint16_t *y, int threads) {
    few::linear(x, rows, stride, w, bias, outputs, inputs, y, threads);
}
