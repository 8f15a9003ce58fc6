// Products of a few rows with a weight matrix, [rows, width] times [outputs, width] transposed.
//
// The weights are read once, from memory to registers, in the order in which they lie; a tile of
// outputs and rows is summed in registers. Sums are in float.

namespace {

constexpr int kOutputs = kRegisters == 16 && kLanes > 4 ? 3 : 4;  // of a tile
constexpr int kInputs = 4;                                        // rows of a tile
constexpr int kFetch = 8192;                                      // bytes that are fetched ahead

struct Product {
  const float* rows;
  int64_t row_stride;
  int64_t weight_stride;
  int64_t width;
  const float* bias;  // may be null
  int64_t out_stride;
};

template <typename W, typename O, int outputs, int inputs>
void tile_of_product(const Product& p, const W* weights, const float* rows, const float* bias,
                     O* out) {
  Lanes sums[outputs][inputs] = {};
  const int64_t whole = p.width / kLanes * kLanes;
  for (int64_t d = 0; d < whole; d += kLanes) {
    Lanes w[outputs];
    for (int o = 0; o < outputs; ++o) {
      const W* at = weights + o * p.weight_stride + d;
      __builtin_prefetch(reinterpret_cast<const char*>(at) + kFetch);
      w[o] = load(at);
    }
    for (int i = 0; i < inputs; ++i) {
      Lanes x = load(rows + i * p.row_stride + d);
      for (int o = 0; o < outputs; ++o) sums[o][i] += w[o] * x;
    }
  }
  for (int o = 0; o < outputs; ++o)
    for (int i = 0; i < inputs; ++i) {
      float total = sum(sums[o][i]);
      for (int64_t d = whole; d < p.width; ++d)
        total += read(weights + o * p.weight_stride + d) * rows[i * p.row_stride + d];
      write(out + i * p.out_stride + o, bias ? total + bias[o] : total);
    }
}

// `outputs` outputs from `first` on, of all rows.
template <typename W, typename O, int outputs>
void strip_of_product(const Product& p, const W* weights, int64_t first, int64_t rows, O* out) {
  const W* own = weights + first * p.weight_stride;
  const float* bias = p.bias ? p.bias + first : nullptr;
  for (int64_t i = 0; i < rows; i += kInputs) {
    auto* tile = rows - i >= 4   ? tile_of_product<W, O, outputs, 4>
                 : rows - i == 3 ? tile_of_product<W, O, outputs, 3>
                 : rows - i == 2 ? tile_of_product<W, O, outputs, 2>
                                 : tile_of_product<W, O, outputs, 1>;
    tile(p, own, p.rows + i * p.row_stride, bias, out + i * p.out_stride + first);
  }
}

// The share of one thread.
template <typename W, typename O>
void multiply(const Product& p, const W* weights, int64_t outputs, int64_t rows, O* out,
              int64_t thread, int64_t threads) {
  const int64_t strips = (outputs + kOutputs - 1) / kOutputs;
  int64_t o = strips * thread / threads * kOutputs;
  const int64_t end = std::min(outputs, strips * (thread + 1) / threads * kOutputs);
  for (; o + kOutputs <= end; o += kOutputs)
    strip_of_product<W, O, kOutputs>(p, weights, o, rows, out);
  for (; o < end; ++o) strip_of_product<W, O, 1>(p, weights, o, rows, out);
}

}  // namespace
