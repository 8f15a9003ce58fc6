// R-KV's scores of the tokens of every run, on a CPU; see rkv.py.
//
// A run's keys are read once, normalised and turned so that a vector holds one channel of several
// keys; everything else happens in that copy, which fits a core's cache for usual budgets.

#include "lanes.h"

namespace {

constexpr int kRows = 4;           // rows of a tile of products
constexpr int kTile = 2 * kLanes;  // columns of it: two vectors

// Products of kRows rows with kTile columns; both turned: channel d of row r is rows[d * row_step +
// r], that of column c is columns[d * column_step + c].
inline void tile(const float* rows, int64_t row_step, const float* columns, int64_t column_step,
                 int64_t width, Lanes out[kRows][2]) {
  Lanes sums[kRows][2] = {};
  for (int64_t d = 0; d < width; ++d) {
    Lanes left = load(columns + d * column_step);
    Lanes right = load(columns + d * column_step + kLanes);
    hold(left), hold(right);
    for (int r = 0; r < kRows; ++r) {
      float x = rows[d * row_step + r];
      sums[r][0] += x * left;
      sums[r][1] += x * right;
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int i = 0; i < 2; ++i) out[r][i] = sums[r][i];
}

// Whether a tile has a product above the threshold.
inline bool any_above(const Lanes products[kRows][2], float threshold) {
  Lanes most = kLarger(products[0][0], products[0][1]);
  for (int r = 1; r < kRows; ++r)
    for (int i = 0; i < 2; ++i) most = kLarger(products[r][i], most);
  return largest_of(most) > threshold;
}

struct Run {
  int64_t length;
  int64_t padded;  // to a multiple of kTile
  int64_t width;
  const float* units;  // [width, padded]: keys of length 1, zeros behind the last one
};

// In each row the latest key, but itself, whose cosine is above the threshold: its place plus 1, or
// 0; anything behind the last row. Every pair is looked at once, the latest columns first: when a
// column's turn comes, it is known whether a later key is similar, and if none is, the rows before
// it are candidates from the last one on. A tile in which all have found theirs is left out.
void latest_similar(const Run& run, float threshold, int32_t* latest) {
  for (int64_t j = 0; j < run.padded; ++j) latest[j] = j < run.length ? 0 : 1;
  Ints lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  auto all_found = [&](int64_t first, int64_t count) {
    bool all = true;
    for (int64_t j = first; j < first + count; ++j) all = all && latest[j] > 0;
    return all;
  };
  for (int64_t column = run.padded - kTile; column >= 0; column -= kTile) {
    for (int64_t first = column + kTile - kRows; first >= 0; first -= kRows) {
      const bool diagonal = first >= column;
      if (all_found(first, kRows) && (diagonal || all_found(column, kTile))) continue;
      Lanes cosine[kRows][2];
      tile(run.units + first, run.padded, run.units + column, run.padded, run.width, cosine);
      if (!any_above(cosine, threshold)) continue;
      Ints of_columns[2] = {};
      for (int r = 0; r < kRows; ++r) {
        const int32_t row = int32_t(first + r);
        Ints of_row = {};
        for (int i = 0; i < 2; ++i) {
          Ints place = lane + int32_t(column + i * kLanes);
          Ints similar = (cosine[r][i] > threshold) & (place != row);
          of_row = kLarger(similar & (place + 1), of_row);
          of_columns[i] = kLarger(similar & (row + 1), of_columns[i]);
        }
        if (latest[row] == 0) latest[row] = folded(of_row, kLarger);
      }
      if (diagonal) continue;  // its columns are rows as well
      for (int i = 0; i < 2; ++i) {
        int32_t* at = latest + column + i * kLanes;
        Ints own;
        std::memcpy(&own, at, sizeof own);
        own = own == 0 ? of_columns[i] : own;
        std::memcpy(at, &own, sizeof own);
      }
    }
  }
}

// The same by several threads, each of which looks at all columns of its rows, from the last one on
// until every row of a tile has found one.
void latest_similar(const Run& run, float threshold, int threads, int32_t* latest) {
  Ints lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 8)
  for (int64_t first = 0; first < run.length; first += kRows) {
    Ints found[kRows] = {};
    for (int64_t r = first; r < first + kRows; ++r) latest[r] = 0;
    for (int64_t column = run.padded - kTile; column >= 0; column -= kTile) {
      Lanes cosine[kRows][2];
      tile(run.units + first, run.padded, run.units + column, run.padded, run.width, cosine);
      if (!any_above(cosine, threshold)) continue;
      bool all = true;
      for (int r = 0; r < kRows; ++r) {
        for (int i = 0; i < 2; ++i) {
          Ints place = lane + int32_t(column + i * kLanes);
          Ints similar = (cosine[r][i] > threshold) & (place != int32_t(first + r));
          found[r] = kLarger(similar & (place + 1), found[r]);
        }
        latest[first + r] = folded(found[r], kLarger);
        all = all && (latest[first + r] > 0 || first + r >= run.length);
      }
      if (all) break;
    }
  }
}

// Mean cosine of keys to the others, the latest similar ones not counted; `cosine` is that of two
// keys.
template <typename Cosine>
void redundancy_of(const Run& run, float threshold, int threads, std::vector<int32_t>& latest,
                   float* out, Cosine cosine) {
  const float* units = run.units;
  for (int64_t j = 0; j < run.padded; ++j) out[j] = 0.0f;
  for (int64_t d = 0; d < run.width; ++d) {
    const float* channel = units + d * run.padded;
    Lanes sums = {};
    for (int64_t j = 0; j < run.padded; j += kLanes) sums += load(channel + j);
    const float total = sum(sums);
    for (int64_t j = 0; j < run.padded; j += kLanes) {
      Lanes x = load(channel + j);
      store(out + j, load(out + j) + x * (total - x));
    }
  }
  latest.resize(size_t(run.padded));
  if (threads == 1)
    latest_similar(run, threshold, latest.data());
  else
    latest_similar(run, threshold, threads, latest.data());
  for (int64_t i = 0; i < run.length; ++i)
    if (latest[i] > 0) out[latest[i] - 1] -= cosine(i, latest[i] - 1);
  for (int64_t j = 0; j < run.length; ++j) out[j] /= float(run.length);
}

// Turns logits [padded] of the first `count` places into their softmax times `factor`, the rest
// into zeros. A sink stands in its denominator.
void softmax(float* logits, int64_t count, int64_t padded, float factor,
             const float* sink = nullptr) {
  float largest;
  float total = exponentiate(logits, count, &largest);
  if (sink) total += std::exp(*sink - largest);
  const float share = factor / total;
  for (int64_t j = 0; j < count; ++j) logits[j] *= share;
  for (int64_t j = count; j < padded; ++j) logits[j] = 0.0f;
}

// Mean over the window of the softmax of the group's largest logits, over the evictable tokens and
// the largest of the group's sinks, if it has any.
void importance_of(const Run& run, const float* lengths_of_keys, const float* queries,
                   int64_t group, int64_t window, float softcap, const float* sinks,
                   std::vector<float>& memory, float* out) {
  for (int64_t j = 0; j < run.padded; ++j) out[j] = 0.0f;
  const int64_t evictable = run.length - window;
  if (evictable <= 0) return;
  const int64_t rows = group * window, step = (rows + kRows - 1) / kRows * kRows;
  memory.resize(size_t(run.width * step + step * run.padded));
  float* turned = memory.data();
  float* logits = turned + run.width * step;
  std::memset(turned, 0, size_t(run.width * step) * 4);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t d = 0; d < run.width; ++d) turned[d * step + r] = queries[r * run.width + d];
  for (int64_t first = 0; first < step; first += kRows)
    for (int64_t column = 0; column < run.padded; column += kTile) {
      Lanes products[kRows][2];
      tile(turned + first, step, run.units + column, run.padded, run.width, products);
      for (int r = 0; r < kRows; ++r)
        for (int i = 0; i < 2; ++i) {
          const int64_t j = column + i * kLanes;
          Lanes x = products[r][i] * load(lengths_of_keys + j);
          if (softcap > 0.0f) x = softly_capped(x, softcap);
          store(logits + (first + r) * run.padded + j, x);
        }
    }
  const float* sink = sinks ? std::max_element(sinks, sinks + group) : nullptr;
  for (int64_t w = 0; w < window; ++w) {
    float* own = logits + w * run.padded;
    for (int64_t g = 1; g < group; ++g) {
      const float* other = logits + (g * window + w) * run.padded;
      for (int64_t j = 0; j < run.padded; j += kLanes) {
        Lanes x = load(own + j), y = load(other + j);
        store(own + j, x > y ? x : y);
      }
    }
    softmax(own, evictable, run.padded, 1.0f / float(window), sink);
    for (int64_t j = 0; j < run.padded; j += kLanes) store(out + j, load(out + j) + load(own + j));
  }
}

constexpr size_t kKept = 1 << 20;  // floats that a thread keeps for its next run

struct RkvMemory {
  std::vector<float> units, norms, redundancy, importance, logits;
  std::vector<int32_t> latest;
};

template <typename T>
void score_run(const float* queries, const T* keys, const int64_t* index, int64_t length,
               int64_t group, int64_t window, int64_t width, float lam, int64_t kernel,
               float threshold, float softcap, const float* sinks, int threads, RkvMemory& memory,
               float* scores) {
  const int64_t padded = (length + kTile - 1) / kTile * kTile;
  memory.units.resize(size_t(width * padded));
  memory.norms.assign(size_t(padded), 0.0f);
  memory.redundancy.resize(size_t(padded));
  memory.importance.resize(size_t(padded));
  const int64_t whole = width / kLanes * kLanes;
  auto dot = [&](int64_t i, int64_t j) {
    const T *left = keys + index[i] * width, *right = keys + index[j] * width;
    Lanes sums = {};
    for (int64_t d = 0; d < whole; d += kLanes) sums += load(left + d) * load(right + d);
    float total = sum(sums);
    for (int64_t d = whole; d < width; ++d) total += read(left + d) * read(right + d);
    return total;
  };
  for (int64_t j = 0; j < length; ++j) memory.norms[j] = std::sqrt(dot(j, j)) + 1e-8f;
  for (int64_t first = 0; first < padded; first += kLanes) {  // turn a vector of keys at a time
    const T* own[kLanes];
    float scales[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const int64_t j = first + i;
      own[i] = keys + index[std::min(j, length - 1)] * width;
      scales[i] = j < length ? 1.0f / memory.norms[j] : 0.0f;
    }
    for (int64_t d = 0; d < width; ++d) {
      Lanes channel;
      for (int i = 0; i < kLanes; ++i) channel[i] = read(own[i] + d);
      Lanes unit = channel * load(scales);
      store(memory.units.data() + d * padded + first, unit);
    }
  }
  const Run run{length, padded, width, memory.units.data()};
  float* redundancy = memory.redundancy.data();
  float* importance = memory.importance.data();
  redundancy_of(run, threshold, threads, memory.latest, redundancy, [&](int64_t i, int64_t j) {
    return dot(i, j) / (memory.norms[i] * memory.norms[j]);
  });
  softmax(redundancy, length, padded, 1.0f - lam);
  importance_of(run, memory.norms.data(), queries, group, window, softcap, sinks, memory.logits,
                importance);
  for (int64_t j = 0; j < length; ++j) {
    float most = 0.0f;  // the largest importance within the pooling kernel
    const int64_t stop = std::min(length, j + kernel / 2 + 1);
    for (int64_t i = std::max<int64_t>(0, j - kernel / 2); i < stop; ++i)
      most = std::max(most, importance[i]);
    scores[j] = lam * most - redundancy[j];
  }
}

template <typename T>
int rkv_scores(const float* queries, const T* keys, const int64_t* index, const int64_t* lengths,
               float* scores, int64_t batch, int64_t kv_heads, int64_t group, int64_t window,
               int64_t stored, int64_t n, int64_t width, int64_t kernel, float lam, float threshold,
               float softcap, const float* sinks, int threads) {
  const int64_t runs = batch * kv_heads;
  auto score = [&](int64_t run, int shared_by) {
    static thread_local RkvMemory memory;
    std::memset(scores + run * n, 0, size_t(n) * 4);
    if (lengths[run] < 0 || lengths[run] > n) throw Outside();
    for (int64_t j = run * n; j < run * n + lengths[run]; ++j)
      if (index[j] < 0 || index[j] >= stored) throw Outside();
    if (lengths[run] > 0)
      score_run(queries + run * group * window * width, keys + run / kv_heads * stored * width,
                index + run * n, lengths[run], group, window, width, lam, kernel, threshold,
                softcap, sinks ? sinks + run % kv_heads * group : nullptr, shared_by, memory,
                scores + run * n);
    if (memory.units.size() > kKept) memory = {};  // of a long prompt
  };
  const bool shared = runs < threads;  // threads share a run
  return for_rows(runs, shared ? 1 : threads,
                  [&](int64_t run) { score(run, shared ? threads : 1); });
}

}  // namespace

// queries are scaled.
extern "C" int reasonalloc_rkv_scores(const float* queries, const void* keys, const int64_t* index,
                                      const int64_t* lengths, float* scores, int64_t batch,
                                      int64_t kv_heads, int64_t group, int64_t window,
                                      int64_t stored, int64_t n, int64_t width, int64_t kernel,
                                      float lam, float threshold, float softcap, const float* sinks,
                                      int kind, int threads) {
  int failed = kDone;
  by_kind(kind, [&](auto zero) {
    using T = decltype(zero);
    failed = rkv_scores(queries, static_cast<const T*>(keys), index, lengths, scores, batch,
                        kv_heads, group, window, stored, n, width, kernel, lam, threshold, softcap,
                        sinks, threads);
  });
  return failed;
}
