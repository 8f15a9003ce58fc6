// Attention of one query per sequence over ragged runs, on a CPU; see attention.py.
//
// A new token is stored first, if there is one, and its query noted in the window.
//
// The work is divided into chunks of a run, which threads take in turns: a long run is shared, as
// in flash-decoding, and heads of different lengths cost what they hold. Every chunk leaves, for
// each query head of its group, the largest logit, the sum of the weights and the weighted sum of
// the values; a second pass puts the chunks of a run together. Arithmetic is in float.

#include "lanes.h"

namespace {

constexpr int kChunk = 256;  // most tokens of a run that one thread takes at a time
constexpr int kLeast = 32;   // fewest
constexpr int kTurns = 4;    // pieces that each thread should find, so that none waits long
constexpr int kQueries = 4;  // query heads that are worked off together, in registers
constexpr int kVectors = kRegisters / 8;  // and vectors of a value's row
constexpr int kAhead = 8;    // rows between the one that is read and the one that is fetched

// Logits of `many` queries with `count` keys; queries are floats, `width` wide, scaled already.
template <typename T, int many>
void multiply_keys(const float* queries, const T* keys, int count, int width, float* logits) {
  const int whole = width / kLanes * kLanes;
  for (int j = 0; j < count; ++j) {
    const T* key = keys + int64_t(j) * width;
    Lanes sums[many] = {};
    for (int d = 0; d < whole; d += kLanes) {
      __builtin_prefetch(key + kAhead * width + d);
      Lanes k = load(key + d);
      for (int g = 0; g < many; ++g) sums[g] += load(queries + g * width + d) * k;
    }
    for (int g = 0; g < many; ++g) {
      float dot = sum(sums[g]);
      for (int d = whole; d < width; ++d) dot += queries[g * width + d] * read(key + d);
      logits[g * kChunk + j] = dot;
    }
  }
}

// Weighted sums of `count` values, `vectors` vectors of their rows, for `many` queries.
template <typename T, int many, int vectors>
void add_values(const float* weights, const T* values, int count, int width, float* out) {
  Lanes sums[many][vectors] = {};
  for (int j = 0; j < count; ++j) {
    const T* value = values + int64_t(j) * width;
    Lanes row[vectors];
    for (int i = 0; i < vectors; ++i) {
      __builtin_prefetch(value + kAhead * width + i * kLanes);
      row[i] = load(value + i * kLanes);
    }
    for (int g = 0; g < many; ++g) {
      float weight = weights[g * kChunk + j];
      for (int i = 0; i < vectors; ++i) sums[g][i] += weight * row[i];
    }
  }
  for (int g = 0; g < many; ++g)
    for (int i = 0; i < vectors; ++i) store(out + g * width + i * kLanes, sums[g][i]);
}

template <typename T, int many>
void multiply_values(const float* weights, const T* values, int count, int width, float* out) {
  int d = 0;
  for (; d + kVectors * kLanes <= width; d += kVectors * kLanes)
    add_values<T, many, kVectors>(weights, values + d, count, width, out + d);
  for (; d + kLanes <= width; d += kLanes)
    add_values<T, many, 1>(weights, values + d, count, width, out + d);
  for (; d < width; ++d)
    for (int g = 0; g < many; ++g) {
      float total = 0.0f;
      for (int j = 0; j < count; ++j)
        total += weights[g * kChunk + j] * read(values + int64_t(j) * width + d);
      out[g * width + d] = total;
    }
}

template <typename K, typename V, int many>
void chunk_of(const float* queries, const K* keys, const V* values, int count, int width,
              int value_width, float softcap, float* weights, float* largest, float* total,
              float* out) {
  multiply_keys<K, many>(queries, keys, count, width, weights);
  for (int g = 0; g < many; ++g) {
    float* own = weights + g * kChunk;
    if (softcap > 0.0f)
      for (int j = 0; j < count; j += kLanes) store(own + j, softly_capped(load(own + j), softcap));
    total[g] = exponentiate(own, count, largest + g);
  }
  multiply_values<V, many>(weights, values, count, value_width, out);
}

struct Chunk {
  int64_t run;    // of batch * kv_heads
  int64_t start;  // slot of the layer's storage, all sequences in one
  int count;
};

// What all threads of a team share while they attend.
struct Plan {
  std::vector<Chunk> chunks;
  std::vector<int64_t> first;  // chunk of each run
  std::vector<float> scratch;
};

}  // namespace

extern "C" {

// The fields of structs.py's `Attend`, in its order. Strides are in elements, of the batch and of
// the heads; rows are contiguous.
struct Attend {
  const char* query;
  int64_t query_kind, query_strides[2];
  const char* key;  // of the new token; null: nothing is stored
  int64_t key_strides[2];
  const char* value;
  int64_t value_strides[2];
  char* keys;
  int64_t key_kind;
  char* values;
  int64_t value_kind;
  int32_t* positions;
  const int64_t* offsets;
  int64_t* lengths;
  const int64_t* seen;
  float* state;  // may be null
  int64_t channels;
  char* ring;  // may be null
  int64_t window;
  char* out;        // of the values' type
  float* received;  // may be null
  int64_t batch, kv_heads, group, slots, width, value_width;
  double scaling, softcap;  // softcap 0: none
};

int64_t reasonalloc_bytes_of_attend() { return sizeof(Attend); }
}

namespace {

// Bytes of an element of a kind.
inline int64_t bytes_of(int64_t kind) { return kind == 0 ? 4 : 2; }

// Stores the new token of every run and notes its query. By all threads of a team.
void store_token(const Attend& a, int* failed) {
  const int64_t key_bytes = bytes_of(a.key_kind), value_bytes = bytes_of(a.value_kind);
  const int64_t query_bytes = bytes_of(a.query_kind), heads = a.kv_heads * a.group;
#pragma omp for schedule(static)
  for (int64_t b = 0; b < a.batch; ++b) {
    for (int64_t h = 0; h < a.kv_heads; ++h) {
      const int64_t run = b * a.kv_heads + h, slot = a.offsets[run] + a.lengths[run];
      if (slot >= a.slots) {
        *failed = kFull;
        continue;
      }
      if (a.offsets[run] < 0 || a.lengths[run] < 0 || a.seen[b] < 0) {
        *failed = kOutside;
        continue;
      }
      const int64_t at = b * a.slots + slot;
      std::memcpy(a.keys + at * a.width * key_bytes,
                  a.key + (b * a.key_strides[0] + h * a.key_strides[1]) * key_bytes,
                  size_t(a.width * key_bytes));
      std::memcpy(a.values + at * a.value_width * value_bytes,
                  a.value + (b * a.value_strides[0] + h * a.value_strides[1]) * value_bytes,
                  size_t(a.value_width * value_bytes));
      a.positions[at] = int32_t(a.seen[b]);
      for (int64_t c = 0; c < a.channels; ++c) a.state[at * a.channels + c] = 0.0f;
      ++a.lengths[run];
    }
    if (!a.ring || a.seen[b] < 0) continue;
    char* place = a.ring + (b * a.window + a.seen[b] % a.window) * heads * a.width * query_bytes;
    for (int64_t h = 0; h < heads; ++h)
      std::memcpy(place + h * a.width * query_bytes,
                  a.query + (b * a.query_strides[0] + h * a.query_strides[1]) * query_bytes,
                  size_t(a.width * query_bytes));
  }
}

// Divides the runs into chunks; all of them must lie within the storage.
void make_plan(const Attend& a, int threads, Plan& plan) {
  const int64_t runs = a.batch * a.kv_heads;
  plan.chunks.clear();
  plan.first.clear();
  int64_t tokens = 0;
  for (int64_t run = 0; run < runs; ++run) {
    const int64_t offset = a.offsets[run], length = a.lengths[run];
    if (offset < 0 || length < 0 || offset > a.slots - length) throw Outside();
    tokens += length;
  }
  const int64_t fair = tokens / (int64_t(threads) * kTurns) / kLanes * kLanes;
  const int64_t chunk = std::clamp<int64_t>(fair, kLeast, kChunk);
  for (int64_t run = 0; run < runs; ++run) {
    plan.first.push_back(int64_t(plan.chunks.size()));
    const int64_t start = run / a.kv_heads * a.slots + a.offsets[run];
    for (int64_t done = 0; done < a.lengths[run]; done += chunk)
      plan.chunks.push_back({run, start + done, int(std::min(chunk, a.lengths[run] - done))});
  }
  plan.first.push_back(int64_t(plan.chunks.size()));
  // Of a chunk: weights, largest logits, sums of weights, weighted sums of values, the queries.
  const int64_t per_chunk = a.group * (kChunk + 2 + a.value_width + a.width);
  plan.scratch.resize(plan.chunks.size() * size_t(per_chunk));
  if (a.received) std::memset(a.received, 0, size_t(a.batch * a.slots) * 4);
}

template <typename K, typename V>
void attend_to_chunk(const Attend& a, const Chunk& own, float* scratch) {
  float* weights = scratch;
  float* largest = weights + a.group * kChunk;
  float* total = largest + a.group;
  float* sums = total + a.group;
  float* queries = sums + a.group * a.value_width;
  const int64_t b = own.run / a.kv_heads, head = own.run % a.kv_heads * a.group;
  by_kind(int(a.query_kind), [&](auto zero) {
    using Q = decltype(zero);
    for (int64_t g = 0; g < a.group; ++g) {
      const Q* query = reinterpret_cast<const Q*>(a.query) + b * a.query_strides[0] +
                       (head + g) * a.query_strides[1];
      for (int64_t d = 0; d < a.width; ++d)
        queries[g * a.width + d] = read(query + d) * float(a.scaling);
    }
  });
  const K* keys = reinterpret_cast<const K*>(a.keys) + own.start * a.width;
  const V* values = reinterpret_cast<const V*>(a.values) + own.start * a.value_width;
  for (int64_t g = 0; g < a.group; g += kQueries) {
    auto* work = a.group - g >= 4   ? chunk_of<K, V, 4>
                 : a.group - g == 3 ? chunk_of<K, V, 3>
                 : a.group - g == 2 ? chunk_of<K, V, 2>
                                    : chunk_of<K, V, 1>;
    work(queries + g * a.width, keys, values, own.count, int(a.width), int(a.value_width),
         float(a.softcap), weights + g * kChunk, largest + g, total + g, sums + g * a.value_width);
  }
}

// Puts the chunks of a run together.
template <typename V>
void join_chunks(const Attend& a, const Plan& plan, int64_t run, float* scratch) {
  const int64_t per_chunk = a.group * (kChunk + 2 + a.value_width + a.width);
  const int64_t begin = plan.first[run], end = plan.first[run + 1];
  for (int64_t g = 0; g < a.group; ++g) {
    V* own = reinterpret_cast<V*>(a.out) + (run * a.group + g) * a.value_width;
    float top = kLowest;
    for (int64_t c = begin; c < end; ++c)
      top = std::max(top, scratch[c * per_chunk + a.group * kChunk + g]);
    float total = 0.0f;
    for (int64_t c = begin; c < end; ++c) {
      float* largest = scratch + c * per_chunk + a.group * kChunk;
      largest[g] = std::exp(largest[g] - top);
      total += largest[g] * largest[a.group + g];
    }
    const float share = begin < end ? 1.0f / total : 0.0f;  // empty: zeros
    for (int64_t d = 0; d < a.value_width; ++d) {
      float x = 0.0f;
      for (int64_t c = begin; c < end; ++c) {
        const float* largest = scratch + c * per_chunk + a.group * kChunk;
        x += largest[g] * largest[2 * a.group + g * a.value_width + d];
      }
      write(own + d, x * share);
    }
    if (!a.received) continue;
    for (int64_t c = begin; c < end; ++c) {
      const float* weights = scratch + c * per_chunk;
      const float factor = weights[a.group * kChunk + g] * share;
      for (int j = 0; j < plan.chunks[c].count; ++j)
        a.received[plan.chunks[c].start + j] += weights[g * kChunk + j] * factor;
    }
  }
}

// All of it, by all threads of a team, who share `plan` and `failed`.
void attend(const Attend& a, Plan& plan, int* failed) {
  if (a.key) store_token(a, failed);
#pragma omp single
  {
    try {
      if (*failed == kDone) make_plan(a, omp_get_num_threads(), plan);
    } catch (const std::bad_alloc&) {
      *failed = kNoMemory;
    } catch (const Outside&) {
      *failed = kOutside;
    }
  }
  if (*failed != kDone) return;
  const int64_t chunks = int64_t(plan.chunks.size()), runs = a.batch * a.kv_heads;
  const int64_t per_chunk = a.group * (kChunk + 2 + a.value_width + a.width);
  float* scratch = plan.scratch.data();
#pragma omp for schedule(dynamic, 1)
  for (int64_t c = 0; c < chunks; ++c) {
    by_kind(int(a.key_kind), [&](auto key_zero) {  // under autocast keys and values differ in type
      by_kind(int(a.value_kind), [&](auto value_zero) {
        attend_to_chunk<decltype(key_zero), decltype(value_zero)>(a, plan.chunks[c],
                                                                  scratch + c * per_chunk);
      });
    });
  }
#pragma omp for schedule(static)
  for (int64_t run = 0; run < runs; ++run)
    by_kind(int(a.value_kind),
            [&](auto zero) { join_chunks<decltype(zero)>(a, plan, run, scratch); });
}

}  // namespace

extern "C" int reasonalloc_attend(const Attend* arguments, int threads) {
  static thread_local Plan plan;  // the memory stays for the next call of this thread
  Plan& own = plan;
  int failed = kDone;
#pragma omp parallel num_threads(threads)
  attend(*arguments, own, &failed);
  return failed;
}
