// Products of a few rows with a weight matrix, [rows, width] times [outputs, width] transposed.
//
// The weights are read once, in the order in which they lie; tiles of outputs and rows are summed
// in registers, in float. Of up to four rows each output is a dot product along the width. More
// rows are first laid out as a panel, [width, rows], so that vectors hold one number of several
// rows and every weight is multiplied with all of them.

#include "../ops/native/lanes.h"

namespace {

constexpr int kNarrow = kLanes < 8 ? kLanes : 8;  // a panel's rows come in multiples of 8
constexpr int kStrip = kRegisters / 2;            // outputs that are worked off together
constexpr int64_t kFar = 128 * 1024;              // bytes that a second-level cache has to spare

struct Product {
  const float* rows;   // or a panel
  int64_t row_stride;  // of a panel: between its columns
  int64_t weight_stride;
  int64_t width;
  const float* bias;  // may be null
  int64_t out_stride;
};

// How far ahead weights are fetched, in elements: where the same row of the next tile begins; if
// that is far, a little ahead in this one.
template <typename W>
int64_t ahead(const Product& p, int64_t outputs) {
  const int64_t tile = outputs * p.weight_stride, size = int64_t(sizeof(W));
  return tile * size <= kFar ? tile : 4096 / size;
}

// To the second-level cache: the first has no room for a tile.
template <typename W>
void fetch_weights(const W* at) {
  __builtin_prefetch(at, 0, 2);
}

template <typename W, typename O, int outputs, int inputs>
void tile_of_dots(const Product& p, const W* weights, const float* rows, const float* bias,
                  O* out) {
  Lanes sums[outputs][inputs] = {};
  const int64_t whole = p.width / kLanes * kLanes, next = ahead<W>(p, outputs);
  for (int64_t d = 0; d < whole; d += kLanes) {
    Lanes w[outputs];
    for (int o = 0; o < outputs; ++o) {
      const W* at = weights + o * p.weight_stride + d;
      fetch_weights(at + next);
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

// `outputs` outputs of `inputs` rows, as many at a time as the registers hold.
template <typename W, typename O, int outputs, int inputs>
void strip_of_dots(const Product& p, const W* weights, const float* bias, O* out) {
  constexpr int kMost = inputs == 1 ? 8 : kRegisters / (inputs == 2 ? 4 : 8);
  constexpr int kTile = outputs < kMost ? outputs : kMost;
  for (int o = 0; o < outputs; o += kTile)
    tile_of_dots<W, O, kTile, inputs>(p, weights + o * p.weight_stride, p.rows,
                                      bias ? bias + o : nullptr, out + o);
}

template <typename W, typename O, int outputs>
void strip_of_dots(const Product& p, const W* weights, const float* bias, int64_t rows, O* out) {
  auto* strip = rows >= 4   ? strip_of_dots<W, O, outputs, 4>
                : rows == 3 ? strip_of_dots<W, O, outputs, 3>
                : rows == 2 ? strip_of_dots<W, O, outputs, 2>
                            : strip_of_dots<W, O, outputs, 1>;
  strip(p, weights, bias, out);
}

// `outputs` outputs of `vectors * lanes` rows of a panel, of which `rows` are wanted.
template <typename W, typename O, int outputs, int vectors, int lanes>
void tile_of_panel(const Product& p, const W* weights, const float* panel, const float* bias,
                   int64_t rows, O* out) {
  using Vector = typename Wide<lanes>::Value;
  constexpr int64_t kLine = 64 / sizeof(W);
  Vector sums[outputs][vectors] = {};
  auto add = [&](const float* column, auto weight) {
    Vector x[vectors];
    for (int v = 0; v < vectors; ++v) x[v] = Wide<lanes>::load(column + v * lanes);
#pragma GCC unroll 16
    for (int o = 0; o < outputs; ++o)
      for (int v = 0; v < vectors; ++v) sums[o][v] += weight(o) * x[v];
  };
  const int64_t whole = p.width / kLine * kLine, next = ahead<W>(p, outputs);
  for (int64_t k = 0; k < whole; k += kLine) {
    alignas(64) float line[outputs][kLine];  // in one place, whatever lies between the outputs
    for (int o = 0; o < outputs; ++o) {
      const W* at = weights + o * p.weight_stride + k;
      fetch_weights(at + next);
      for (int j = 0; j < kLine; j += kLanes) store(line[o] + j, load(at + j));
    }
    for (int j = 0; j < kLine; ++j)
      add(panel + (k + j) * p.row_stride, [&](int o) { return line[o][j]; });
  }
  for (int64_t k = whole; k < p.width; ++k)
    add(panel + k * p.row_stride, [&](int o) { return read(weights + o * p.weight_stride + k); });
  for (int r = 0; r < std::min(rows, int64_t(vectors * lanes)); ++r)
    for (int o = 0; o < outputs; ++o) {
      const float total = sums[o][r / lanes][r % lanes];
      write(out + r * p.out_stride + o, bias ? total + bias[o] : total);
    }
}

// `outputs` outputs of all rows of a panel.
template <typename W, typename O, int outputs>
void strip_of_panel(const Product& p, const W* weights, const float* bias, int64_t rows, O* out) {
  constexpr int kHalf = outputs > 1 ? outputs / 2 : 1;
  constexpr int kPair = kLanes + (kLanes > kNarrow ? kNarrow : 0);  // more rows: two vectors
  for (int64_t r = 0; r < rows;) {
    const int64_t left = rows - r;
    const float* panel = p.rows + r;
    O* to = out + r * p.out_stride;
    if (left > kPair) {
      for (int o = 0; o < outputs; o += kHalf)
        tile_of_panel<W, O, kHalf, 2, kLanes>(p, weights + o * p.weight_stride, panel,
                                              bias ? bias + o : nullptr, left, to + o);
      r += 2 * kLanes;
    } else if (left > kNarrow) {
      tile_of_panel<W, O, outputs, 1, kLanes>(p, weights, panel, bias, left, to);
      r += kLanes;
    } else {
      tile_of_panel<W, O, outputs, 1, kNarrow>(p, weights, panel, bias, left, to);
      r += kNarrow;
    }
  }
}

// The share of one thread; up to four rows, or a panel of any number.
template <typename W, typename O>
void multiply(const Product& p, const W* weights, int64_t outputs, int64_t rows, bool panel, O* out,
              int64_t thread, int64_t threads) {
  const int64_t strips = (outputs + kStrip - 1) / kStrip;
  const int64_t end = std::min(outputs, strips * (thread + 1) / threads * kStrip);
  auto strips_of = [&](auto size, int64_t first, int64_t last) {
    for (int64_t o = first; o < last; o += size) {
      const W* own = weights + o * p.weight_stride;
      const float* bias = p.bias ? p.bias + o : nullptr;
      if (panel)
        strip_of_panel<W, O, size>(p, own, bias, rows, out + o);
      else
        strip_of_dots<W, O, size>(p, own, bias, rows, out + o);
    }
  };
  const int64_t begin = strips * thread / threads * kStrip;
  const int64_t whole = begin + std::max(int64_t(0), end - begin) / kStrip * kStrip;
  strips_of(std::integral_constant<int, kStrip>{}, begin, whole);
  strips_of(std::integral_constant<int, 1>{}, whole, end);
}

// Rows [count, width] as a panel [width, padded], in which the last row is repeated; the share of
// one thread.
template <typename X>
void lay_out(const X* rows, int64_t stride, int64_t count, int64_t width, float* panel,
             int64_t padded, int64_t thread, int64_t threads) {
  const int64_t begin = width * thread / threads, end = width * (thread + 1) / threads;
  for (int64_t r = 0; r < padded; r += 8) {
    const X* own[8];
    for (int i = 0; i < 8; ++i) own[i] = rows + std::min(r + i, count - 1) * stride;
    for (int64_t k = begin; k < end; ++k) {
      const float column[8] = {read(own[0] + k), read(own[1] + k), read(own[2] + k),
                               read(own[3] + k), read(own[4] + k), read(own[5] + k),
                               read(own[6] + k), read(own[7] + k)};
      std::memcpy(panel + k * padded + r, column, sizeof column);
    }
  }
}

}  // namespace
