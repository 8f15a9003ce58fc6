// Attention of one query per sequence over ragged runs, on a CPU; see attention.py.
//
// The work is divided into chunks of a run, which threads take in turns: a long run is shared, as
// in flash-decoding, and heads of different lengths cost what they hold. Every chunk leaves, for
// each query head of its group, the largest logit, the sum of the weights and the weighted sum of
// the values; a second pass puts the chunks of a run together. Arithmetic is in float.

namespace {

constexpr int kChunk = 256;  // most tokens of a run that one thread takes at a time
constexpr int kLeast = 32;   // fewest
constexpr int kTurns = 4;    // pieces that each thread should find, so that none waits long
constexpr int kQueries = 4;  // query heads that are worked off together, in registers
constexpr int kVectors = 4;  // and vectors of a value's row
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

template <typename K, typename V>
void decode(const float* query, const K* keys, const V* values, const int64_t* offsets,
            const int64_t* lengths, V* out, float* received, int64_t batch, int64_t kv_heads,
            int64_t group, int64_t slots, int64_t width, int64_t value_width, float scaling,
            float softcap, int threads) {
  // The memory stays for the next call of this thread.
  static thread_local std::vector<Chunk> chunk_memory;
  static thread_local std::vector<int64_t> first_memory;
  static thread_local std::vector<float> scratch_memory;
  std::vector<Chunk>& chunks = chunk_memory;
  std::vector<int64_t>& first = first_memory;
  const int64_t runs = batch * kv_heads;
  chunks.clear();
  first.clear();
  int64_t tokens = 0;
  for (int64_t run = 0; run < runs; ++run) tokens += lengths[run];
  const int64_t fair = tokens / (int64_t(threads) * kTurns) / kLanes * kLanes;
  const int64_t chunk = std::clamp<int64_t>(fair, kLeast, kChunk);
  for (int64_t run = 0; run < runs; ++run) {
    first.push_back(int64_t(chunks.size()));
    const int64_t start = run / kv_heads * slots + offsets[run];
    for (int64_t done = 0; done < lengths[run]; done += chunk)
      chunks.push_back({run, start + done, int(std::min(chunk, lengths[run] - done))});
  }
  first.push_back(int64_t(chunks.size()));
  const int64_t count = int64_t(chunks.size());
  // Of a chunk: weights, largest logits, sums of weights, weighted sums of values.
  const int64_t per_chunk = group * (kChunk + 2 + value_width);
  scratch_memory.resize(size_t(count * per_chunk));
  float* scratch = scratch_memory.data();
  if (received) std::memset(received, 0, size_t(batch * slots) * 4);

#pragma omp parallel num_threads(threads)
  {
    static thread_local std::vector<float> queries;
    queries.resize(size_t(group * width));
#pragma omp for schedule(dynamic, 1)
    for (int64_t c = 0; c < count; ++c) {
      const Chunk& own = chunks[c];
      for (int64_t i = 0; i < group * width; ++i)
        queries[i] = query[own.run * group * width + i] * scaling;
      float* weights = scratch + c * per_chunk;
      float* largest = weights + group * kChunk;
      float* total = largest + group;
      float* sums = total + group;
      for (int64_t g = 0; g < group; g += kQueries) {
        auto* work = group - g >= 4  ? chunk_of<K, V, 4>
                     : group - g == 3 ? chunk_of<K, V, 3>
                     : group - g == 2 ? chunk_of<K, V, 2>
                                      : chunk_of<K, V, 1>;
        work(queries.data() + g * width, keys + own.start * width,
             values + own.start * value_width, own.count, int(width), int(value_width),
             softcap, weights + g * kChunk, largest + g, total + g, sums + g * value_width);
      }
    }
#pragma omp for schedule(static)
    for (int64_t run = 0; run < runs; ++run) {
      for (int64_t g = 0; g < group; ++g) {
        V* own = out + (run * group + g) * value_width;
        float top = kLowest;
        for (int64_t c = first[run]; c < first[run + 1]; ++c)
          top = std::max(top, scratch[c * per_chunk + group * kChunk + g]);
        float total = 0.0f;
        for (int64_t c = first[run]; c < first[run + 1]; ++c) {
          float* largest = scratch + c * per_chunk + group * kChunk;
          largest[g] = std::exp(largest[g] - top);
          total += largest[g] * largest[group + g];
        }
        const float share = first[run] < first[run + 1] ? 1.0f / total : 0.0f;  // empty: zeros
        for (int64_t d = 0; d < value_width; ++d) {
          float x = 0.0f;
          for (int64_t c = first[run]; c < first[run + 1]; ++c) {
            const float* largest = scratch + c * per_chunk + group * kChunk;
            x += largest[g] * largest[2 * group + g * value_width + d];
          }
          write(own + d, x * share);
        }
        if (!received) continue;
        for (int64_t c = first[run]; c < first[run + 1]; ++c) {
          const float* weights = scratch + c * per_chunk;
          const float factor = weights[group * kChunk + g] * share;
          for (int j = 0; j < chunks[c].count; ++j)
            received[chunks[c].start + j] += weights[g * kChunk + j] * factor;
        }
      }
    }
  }
}

}  // namespace

// out is of the values' type; softcap 0: none; received may be null.
extern "C" void reasonalloc_ragged_decode(const float* query, const void* keys, const void* values,
                                          const int64_t* offsets, const int64_t* lengths, void* out,
                                          float* received, int64_t batch, int64_t kv_heads,
                                          int64_t group, int64_t slots, int64_t width,
                                          int64_t value_width, float scaling, float softcap,
                                          int key_kind, int value_kind, int threads) {
  by_kind(key_kind, [&](auto key_zero) {  // under autocast keys and values differ in type
    using K = decltype(key_zero);
    by_kind(value_kind, [&](auto value_zero) {
      using V = decltype(value_zero);
      decode(query, static_cast<const K*>(keys), static_cast<const V*>(values), offsets, lengths,
             static_cast<V*>(out), received, batch, kv_heads, group, slots, width, value_width,
             scaling, softcap, threads);
    });
  });
}
