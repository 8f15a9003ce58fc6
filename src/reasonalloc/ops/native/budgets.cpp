// What a boundary decides, on a CPU: how many tokens each head keeps, and which; see budgets.py.

#include "lanes.h"

namespace {

// A score as a number whose order is that of PyTorch's sorting: not-a-number above all, 0 = -0.
inline int32_t order_of(float score) {
  if (score != score) return std::numeric_limits<int32_t>::max();
  int32_t bits;
  std::memcpy(&bits, &score, 4);
  if ((bits & 0x7fffffff) == 0) bits = 0;
  return bits < 0 ? bits ^ 0x7fffffff : bits;
}

// Largest first; of equals the first one.
struct Ranked {
  int32_t order;
  int32_t place;
  bool operator<(const Ranked& other) const {
    return order != other.order ? order > other.order : place < other.place;
  }
};

// Integers nearest to `values` that sum to `total`, none above `upper`; see rounding.py.
void round_to_total(const double* values, int64_t total, const int64_t* upper, int64_t n,
                    int64_t* out) {
  constexpr double quantum = 1e-6;
  std::vector<std::pair<double, int64_t>> order;
  int64_t missing = total;
  for (int64_t i = 0; i < n; ++i) {
    out[i] = std::min(int64_t(std::floor(values[i] + quantum / 2)), upper[i]);
    missing -= out[i];
    const double rest = std::nearbyint((values[i] - double(out[i])) / quantum);
    order.emplace_back(out[i] >= upper[i] ? std::numeric_limits<double>::infinity() : -rest, i);
  }
  std::sort(order.begin(), order.end());
  for (int64_t i = 0; i < std::min(missing, n); ++i) ++out[order[i].second];
}

void robustify(const double* demand, int64_t total, const int64_t* lower, const int64_t* upper,
               double exponent, int64_t n, int64_t* out) {
  std::vector<double> weight(n), breaks(2 * n), sums(2 * n), values(n);
  for (int64_t i = 0; i < n; ++i) {
    weight[i] = std::pow(demand[i] > 1e-12 ? demand[i] : 1e-12, exponent);
    weight[i] = std::max(weight[i], std::numeric_limits<double>::min());
    breaks[i] = double(lower[i]) / weight[i];
    breaks[n + i] = double(upper[i]) / weight[i];
  }
  auto clipped = [&](double scale, int64_t i) {
    return std::min(std::max(scale * weight[i], double(lower[i])), double(upper[i]));
  };
  std::sort(breaks.begin(), breaks.end());
  int64_t below = 0;
  for (int64_t b = 0; b < 2 * n; ++b) {
    for (int64_t i = 0; i < n; ++i) sums[b] += clipped(breaks[b], i);
    below += sums[b] <= double(total);
  }
  const int64_t left = std::clamp<int64_t>(below - 1, 0, 2 * n - 1);
  const int64_t right = std::min(left + 1, 2 * n - 1);
  const double rise = sums[right] - sums[left];
  double step = rise > 0 ? (double(total) - sums[left]) / std::max(rise, 1e-300) : 0.0;
  step = std::clamp(step, 0.0, 1.0);
  const double scale = breaks[left] + step * (breaks[right] - breaks[left]);
  for (int64_t i = 0; i < n; ++i) values[i] = clipped(scale, i);
  round_to_total(values.data(), total, upper, n, out);
}

}  // namespace

extern "C" int reasonalloc_robustify(const double* demand, const int64_t* total,
                                     const int64_t* lower, const int64_t* upper, double exponent,
                                     int64_t rows, int64_t n, int64_t* out) {
  return for_rows(rows, 1, [&](int64_t row) {
    robustify(demand + row * n, total[row], lower + row * n, upper + row * n, exponent, n,
              out + row * n);
  });
}

// Candidates of each head that reach the k-th best of their layer, k = total - heads * window.
extern "C" int reasonalloc_pooled_counts(const float* scores, const int64_t* lengths,
                                         const int64_t* total, int64_t window, int scaled,
                                         int64_t batch, int64_t heads, int64_t n, int64_t* counts,
                                         int threads) {
  return for_rows(batch, threads, [&](int64_t b) {
    const int64_t all = heads * n, wanted = total[b] - heads * window;
    std::vector<float> own(scores + b * all, scores + (b + 1) * all);
    if (scaled)
      for (int64_t h = 0; h < heads; ++h) {
        const float factor = float(std::max<int64_t>(lengths[b * heads + h] - window, 1));
        for (int64_t j = 0; j < n; ++j) own[h * n + j] *= factor;
      }
    std::vector<int32_t> order(all);
    for (int64_t j = 0; j < all; ++j) order[j] = order_of(own[j]);
    const int64_t k = std::clamp<int64_t>(wanted - 1, 0, all - 1);
    std::nth_element(order.begin(), order.begin() + k, order.end(), std::greater<int32_t>());
    const int32_t least = order[k], lowest = order_of(-std::numeric_limits<float>::infinity());
    for (int64_t h = 0; h < heads; ++h) {
      int64_t& count = counts[b * heads + h] = 0;
      for (int64_t j = 0; wanted > 0 && j < n; ++j) {
        const float score = own[h * n + j];
        const int32_t place = order_of(score);
        // What is not a number reaches nothing, and nothing reaches it.
        count += score == score && place >= least && place > lowest;
      }
    }
  });
}

// See selection.py; `forced` may be null.
extern "C" int reasonalloc_select(const float* scores, const int64_t* lengths,
                                  const int64_t* budgets, int64_t window, double recent_fraction,
                                  const bool* forced, int64_t runs, int64_t n, bool* keep,
                                  int threads) {
  return for_rows(runs, threads, [&](int64_t run) {
    static thread_local std::vector<Ranked> order;
    const int64_t length = lengths[run], budget = budgets[run];
    if (length < 0 || length > n || budget < 0) throw Outside();
    int64_t recent = std::max(int64_t(std::floor(double(budget) * recent_fraction)), window);
    if (forced) {
      int64_t count = 0;
      for (int64_t j = 0; j < n; ++j) count += forced[run * n + j];
      recent = std::min(recent, std::max(budget - count, window));
    }
    recent = std::min(recent, budget);
    const int64_t open = std::max<int64_t>(length - recent, 0);
    const int64_t best = std::clamp<int64_t>(budget - recent, 0, open);
    order.clear();
    for (int64_t j = 0; j < open; ++j) {
      float score = scores[run * n + j];
      if (forced && forced[run * n + j]) score = std::numeric_limits<float>::infinity();
      // As `clamp_min`: the lowest number, but not-a-number stays.
      if (score < std::numeric_limits<float>::lowest())
        score = std::numeric_limits<float>::lowest();
      order.push_back({order_of(score), int32_t(j)});
    }
    if (best > 0 && best < open) std::nth_element(order.begin(), order.begin() + best, order.end());
    bool* own = keep + run * n;
    std::memset(own, 0, size_t(n));
    for (int64_t j = 0; j < best; ++j) own[order[j].place] = true;
    for (int64_t j = open; j < length; ++j) own[j] = true;
  });
}
