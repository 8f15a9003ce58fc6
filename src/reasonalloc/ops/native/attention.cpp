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
constexpr int kQueries = 6;  // most query heads that are worked off together, in registers
constexpr int kKeys = kRegisters / 8;     // and keys
constexpr int kVectors = kRegisters / 8;  // and vectors of a value's row
constexpr int kAhead = 8;    // rows between the one that is read and the one that is fetched

// Rows that lie `stride` bytes apart, at any address. What rows of every kind have: how many of
// their `width` numbers are read in whole vectors, and of a row its vectors and its other numbers.
// Of kScaled rows every number is to be multiplied by the row's entry of `numbers`.
template <typename T>
struct Plain {
  static constexpr bool kScaled = false;
  struct Row {
    const char* at;
    int64_t stride;
    void fetch(int64_t d) const {
      __builtin_prefetch(at + kAhead * stride + d * int64_t(sizeof(T)));
    }
    Lanes vector(int64_t d) const { return load(reinterpret_cast<const T*>(at) + d); }
    float number(int64_t d) const {
      T own;
      std::memcpy(&own, at + d * int64_t(sizeof own), sizeof own);
      return read(&own);
    }
  };
  const char* first;
  int64_t stride, width;
  Row operator[](int64_t j) const { return {first + j * stride, stride}; }
  int64_t whole() const { return width / kLanes * kLanes; }
};

// Logits of `many` queries with `rows` keys from key j on; queries are floats, scaled already.
template <int many, int rows, typename Keys>
inline void multiply_some_keys(const float* queries, const Keys& keys, int j, int64_t width,
                               float* logits) {
  const int64_t whole = keys.whole();
  decltype(keys[j]) own[rows];
  for (int r = 0; r < rows; ++r) own[r] = keys[j + r];
  Lanes sums[many][rows] = {};
  for (int64_t d = 0; d < whole; d += kLanes) {
    Lanes numbers[rows];
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
      own[r].fetch(d);
      numbers[r] = own[r].vector(d);
    }
#pragma GCC unroll 6
    for (int g = 0; g < many; ++g) {
      const Lanes query = load(queries + g * width + d);
#pragma GCC unroll 6
      for (int r = 0; r < rows; ++r) sums[g][r] += query * numbers[r];
    }
  }
#pragma GCC unroll 6
  for (int g = 0; g < many; ++g) {
    float dots[rows];
    sums_of<rows>(sums[g], dots);
    for (int r = 0; r < rows; ++r) {
      float dot = dots[r];
      for (int64_t d = whole; d < width; ++d) dot += queries[g * width + d] * own[r].number(d);
      if constexpr (Keys::kScaled) dot *= keys.numbers[j + r];
      logits[g * kChunk + j + r] = dot;
    }
  }
}

template <int many, typename Keys>
void multiply_keys(const float* queries, const Keys& keys, int count, int64_t width,
                   float* logits) {
  int j = 0;
  for (; j + kKeys <= count; j += kKeys)
    multiply_some_keys<many, kKeys>(queries, keys, j, width, logits);
  for (; j < count; ++j) multiply_some_keys<many, 1>(queries, keys, j, width, logits);
}

// Weighted sums of `count` values from number `d` on, `vectors` vectors of them.
template <int many, int vectors, typename Values>
void add_values(const float* weights, const Values& values, int count, int64_t d, int64_t width,
                float* out) {
  Lanes sums[many][vectors] = {};
  for (int j = 0; j < count; ++j) {
    const auto value = values[j];
    Lanes row[vectors];
#pragma GCC unroll 6
    for (int i = 0; i < vectors; ++i) {
      value.fetch(d + i * kLanes);
      row[i] = value.vector(d + i * kLanes);
    }
#pragma GCC unroll 6
    for (int g = 0; g < many; ++g) {
      float weight = weights[g * kChunk + j];
#pragma GCC unroll 6
      for (int i = 0; i < vectors; ++i) sums[g][i] += weight * row[i];
    }
  }
#pragma GCC unroll 6
  for (int g = 0; g < many; ++g)
#pragma GCC unroll 6
    for (int i = 0; i < vectors; ++i) store(out + g * width + d + i * kLanes, sums[g][i]);
}

template <int many, typename Values>
void multiply_values(const float* weights, const Values& values, int count, int64_t width,
                     float* out) {
  const int64_t whole = values.whole();
  int64_t d = 0;
  for (; d + kVectors * kLanes <= whole; d += kVectors * kLanes)
    add_values<many, kVectors>(weights, values, count, d, width, out);
  for (; d < whole; d += kLanes) add_values<many, 1>(weights, values, count, d, width, out);
  for (; d < width; ++d)
    for (int g = 0; g < many; ++g) {
      float total = 0.0f;
      for (int j = 0; j < count; ++j) total += weights[g * kChunk + j] * values[j].number(d);
      out[g * width + d] = total;
    }
}

// Calls `run` with the first of as many query heads as are worked off together, and their number:
// parts of a group that differ by one at most.
template <typename Run>
void by_queries(int64_t group, Run run) {
  const int64_t parts = (group + kQueries - 1) / kQueries;
  for (int64_t part = 0, g = 0, many; part < parts; ++part, g += many) {
    many = group / parts + (part < group % parts);
    switch (many) {
      case 1: run(g, std::integral_constant<int, 1>{}); break;
      case 2: run(g, std::integral_constant<int, 2>{}); break;
      case 3: run(g, std::integral_constant<int, 3>{}); break;
      case 4: run(g, std::integral_constant<int, 4>{}); break;
      case 5: run(g, std::integral_constant<int, 5>{}); break;
      default: run(g, std::integral_constant<int, kQueries>{});
    }
  }
}

struct Chunk {
  int64_t run;    // of batch * kv_heads
  int64_t start;  // row of the keys and values; of coded tokens the byte of their pool
  int64_t slot;   // of `received`; like rows and bytes of all sequences in one
  int count;
  bool coded;
};

// What all threads of a team share while they attend.
struct Plan {
  std::vector<Chunk> chunks;
  std::vector<int64_t> first;  // chunk of each run
  std::vector<float> scratch;  // of every chunk
  std::vector<float> queries;  // of coded keys
  std::vector<float> spare;    // of every thread
  std::vector<float> own;      // of every thread: weights and queries
};

struct Scratch;

}  // namespace

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
  const int64_t* offsets;  // null: run h of a sequence has `room` slots from h * room on
  int64_t* lengths;
  const int64_t* seen;
  float* state;  // may be null
  int64_t channels;
  char* ring;  // may be null
  int64_t window;
  char* out;        // of the values' type
  float* received;  // may be null
  int64_t batch, kv_heads, group, slots, width, value_width;
  int64_t room;
  int64_t before;  // slots of other tokens before these in `positions`, `state` and `received`
  double scaling, softcap;  // softcap 0: none
  const float* sinks;       // of every query head; may be null

  // What is done otherwise where other tokens are coded, or runs lie in pages.
  void store_new(int* failed) const;
  int64_t tokens(int64_t run) const;
  void add_chunks(int64_t run, int64_t chunk, Plan& plan) const;
  void reserve(int, Plan&) const {}
  void prepare_queries(Plan&) const {}
  void attend_to_chunk(const Plan& plan, const Chunk& chunk, const Scratch& own) const;
};

extern "C" int64_t reasonalloc_bytes_of_attend() { return sizeof(Attend); }

namespace {

// Bytes of an element of a kind.
inline int64_t bytes_of(int64_t kind) { return kind == 0 ? 4 : 2; }

inline int64_t first_slot(const Attend& a, int64_t run) {
  return a.offsets ? a.offsets[run] : run % a.kv_heads * a.room;
}

// Behind the last one that a run may have.
inline int64_t last_slot(const Attend& a, int64_t run) {
  return a.offsets ? a.slots : first_slot(a, run) + a.room;
}

// Where the slots of a sequence begin in `positions`, `state` and `received`.
inline int64_t noted_slot(const Attend& a, int64_t b) {
  return b * (a.before + a.slots) + a.before;
}

// Stores the new token of every run and notes its query. By all threads of a team.
void store_token(const Attend& a, int* failed) {
  const int64_t key_bytes = bytes_of(a.key_kind), value_bytes = bytes_of(a.value_kind);
  const int64_t query_bytes = bytes_of(a.query_kind), heads = a.kv_heads * a.group;
#pragma omp for schedule(static)
  for (int64_t b = 0; b < a.batch; ++b) {
    for (int64_t h = 0; h < a.kv_heads; ++h) {
      const int64_t run = b * a.kv_heads + h, first = first_slot(a, run);
      const int64_t slot = first + a.lengths[run];
      if (slot >= last_slot(a, run)) {
        *failed = kFull;
        continue;
      }
      if (first < 0 || a.lengths[run] < 0 || a.seen[b] < 0) {
        *failed = kOutside;
        continue;
      }
      const int64_t at = b * a.slots + slot, noted = noted_slot(a, b) + slot;
      std::memcpy(a.keys + at * a.width * key_bytes,
                  a.key + (b * a.key_strides[0] + h * a.key_strides[1]) * key_bytes,
                  size_t(a.width * key_bytes));
      std::memcpy(a.values + at * a.value_width * value_bytes,
                  a.value + (b * a.value_strides[0] + h * a.value_strides[1]) * value_bytes,
                  size_t(a.value_width * value_bytes));
      a.positions[noted] = int32_t(a.seen[b]);
      for (int64_t c = 0; c < a.channels; ++c) a.state[noted * a.channels + c] = 0.0f;
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

// What a chunk leaves behind, of every query head of its group. Its weights and its queries are of
// the thread, but weights that are asked for stay.
struct Scratch {
  float *largest, *total, *sums, *weights, *queries;

  // own: of the thread; null where the chunk has been worked off.
  Scratch(const Attend& a, float* at, float* own)
      : largest(at),
        total(largest + a.group),
        sums(total + a.group),
        weights(a.received ? sums + a.group * a.value_width : own),
        queries(own ? own + a.group * kChunk : nullptr) {}

  static int64_t numbers(const Attend& a) {
    return a.group * (2 + a.value_width + (a.received ? kChunk : 0));
  }
  static int64_t of_thread(const Attend& a) { return a.group * (kChunk + a.width); }
};

// Divides the runs into chunks.
template <typename Arguments>
void make_plan(const Arguments& a, int threads, Plan& plan) {
  const int64_t runs = a.batch * a.kv_heads;
  plan.chunks.clear();
  plan.first.clear();
  int64_t tokens = 0;
  for (int64_t run = 0; run < runs; ++run) tokens += a.tokens(run);
  const int64_t fair = tokens / (int64_t(threads) * kTurns) / kLanes * kLanes;
  const int64_t chunk = std::clamp<int64_t>(fair, kLeast, kChunk);
  for (int64_t run = 0; run < runs; ++run) {
    plan.first.push_back(int64_t(plan.chunks.size()));
    a.add_chunks(run, chunk, plan);
  }
  plan.first.push_back(int64_t(plan.chunks.size()));
  plan.scratch.resize(plan.chunks.size() * size_t(Scratch::numbers(a)));
  plan.own.resize(size_t(threads * Scratch::of_thread(a)));
  a.reserve(threads, plan);
  if (a.received) std::memset(a.received, 0, size_t(a.batch * (a.before + a.slots)) * 4);
}

// The queries of a run as floats, scaled.
void scale_queries(const Attend& a, int64_t run, float* out) {
  const int64_t b = run / a.kv_heads, head = run % a.kv_heads * a.group;
  by_kind(int(a.query_kind), [&](auto zero) {
    using Q = decltype(zero);
    for (int64_t g = 0; g < a.group; ++g) {
      const Q* query = reinterpret_cast<const Q*>(a.query) + b * a.query_strides[0] +
                       (head + g) * a.query_strides[1];
      for (int64_t d = 0; d < a.width; ++d)
        out[g * a.width + d] = read(query + d) * float(a.scaling);
    }
  });
}

template <typename Keys>
void multiply_all_keys(const Attend& a, const float* queries, const Keys& keys, int count,
                       float* logits) {
  by_queries(a.group, [&](int64_t g, auto many) {
    multiply_keys<many.value>(queries + g * a.width, keys, count, a.width, logits + g * kChunk);
  });
}

template <typename Values>
void multiply_all_values(const Attend& a, const float* weights, const Values& values, int count,
                         float* out) {
  by_queries(a.group, [&](int64_t g, auto many) {
    multiply_values<many.value>(weights + g * kChunk, values, count, a.value_width,
                                out + g * a.value_width);
  });
}

// Logits into weights.
void weigh(const Attend& a, int count, const Scratch& own) {
  const float softcap = float(a.softcap);
  for (int64_t g = 0; g < a.group; ++g) {
    float* weights = own.weights + g * kChunk;
    if (softcap > 0.0f)
      for (int j = 0; j < count; j += kLanes)
        store(weights + j, softly_capped(load(weights + j), softcap));
    own.total[g] = exponentiate(weights, count, own.largest + g);
  }
}

// Puts the chunks of a run together.
template <typename V>
void join_chunks(const Attend& a, const Plan& plan, int64_t run, float* scratch) {
  const int64_t per_chunk = Scratch::numbers(a);
  const int64_t begin = plan.first[run], end = plan.first[run + 1];
  for (int64_t g = 0; g < a.group; ++g) {
    V* out = reinterpret_cast<V*>(a.out) + (run * a.group + g) * a.value_width;
    const float* sink = a.sinks ? a.sinks + run % a.kv_heads * a.group + g : nullptr;
    float top = sink ? *sink : kLowest;
    for (int64_t c = begin; c < end; ++c)
      top = std::max(top, Scratch(a, scratch + c * per_chunk, nullptr).largest[g]);
    float total = sink ? std::exp(*sink - top) : 0.0f;
    for (int64_t c = begin; c < end; ++c) {
      const Scratch own(a, scratch + c * per_chunk, nullptr);
      own.largest[g] = std::exp(own.largest[g] - top);
      total += own.largest[g] * own.total[g];
    }
    const float share = begin < end ? 1.0f / total : 0.0f;  // empty: zeros
    const auto add = [&](auto x, int64_t d) {
      for (int64_t c = begin; c < end; ++c) {
        const Scratch own(a, scratch + c * per_chunk, nullptr);
        const float* sums = own.sums + g * a.value_width + d;
        if constexpr (std::is_same_v<decltype(x), Lanes>)
          x += own.largest[g] * load(sums);
        else
          x += own.largest[g] * *sums;
      }
      return x * share;
    };
    const int64_t whole = a.value_width / kLanes * kLanes;
    for (int64_t d = 0; d < whole; d += kLanes) {
      float numbers[kLanes];
      store(numbers, add(Lanes{}, d));
      for (int i = 0; i < kLanes; ++i) write(out + d + i, numbers[i]);
    }
    for (int64_t d = whole; d < a.value_width; ++d) write(out + d, add(0.0f, d));
    if (!a.received) continue;
    for (int64_t c = begin; c < end; ++c) {
      const Scratch own(a, scratch + c * per_chunk, nullptr);
      const float factor = own.largest[g] * share;
      for (int j = 0; j < plan.chunks[c].count; ++j)
        a.received[plan.chunks[c].slot + j] += own.weights[g * kChunk + j] * factor;
    }
  }
}

// All of it, by all threads of a team, who share `plan` and `failed`.
template <typename Arguments>
void attend(const Arguments& a, Plan& plan, int* failed) {
  a.store_new(failed);
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
  a.prepare_queries(plan);
  const int64_t chunks = int64_t(plan.chunks.size()), runs = a.batch * a.kv_heads;
  float* scratch = plan.scratch.data();
  float* own = plan.own.data() + omp_get_thread_num() * Scratch::of_thread(a);
#pragma omp for schedule(dynamic, 1)
  for (int64_t c = 0; c < chunks; ++c)
    a.attend_to_chunk(plan, plan.chunks[c], Scratch(a, scratch + c * Scratch::numbers(a), own));
#pragma omp for schedule(static)
  for (int64_t run = 0; run < runs; ++run)
    by_kind(int(a.value_kind),
            [&](auto zero) { join_chunks<decltype(zero)>(a, plan, run, scratch); });
}

// All of it by a team of its own; returns a `Failure`.
template <typename Arguments>
int attend_alone(const Arguments& arguments, int threads) {
  static thread_local Plan plan;  // the memory stays for the next call of this thread
  Plan& own = plan;
  int failed = kDone;
#pragma omp parallel num_threads(threads)
  attend(arguments, own, &failed);
  return failed;
}

}  // namespace

inline void Attend::store_new(int* failed) const {
  if (key) store_token(*this, failed);
}

// All of a run's tokens must lie within the storage.
inline int64_t Attend::tokens(int64_t run) const {
  const int64_t first = first_slot(*this, run), length = lengths[run];
  if (first < 0 || length < 0 || first > last_slot(*this, run) - length) throw Outside();
  return length;
}

inline void Attend::add_chunks(int64_t run, int64_t chunk, Plan& plan) const {
  const int64_t b = run / kv_heads, first = first_slot(*this, run);
  for (int64_t done = 0; done < lengths[run]; done += chunk)
    plan.chunks.push_back({run, b * slots + first + done, noted_slot(*this, b) + first + done,
                           int(std::min(chunk, lengths[run] - done)), false});
}

inline void Attend::attend_to_chunk(const Plan&, const Chunk& chunk, const Scratch& own) const {
  scale_queries(*this, chunk.run, own.queries);
  by_kind(int(key_kind), [&](auto zero) {  // under autocast keys and values differ in type
    using K = decltype(zero);
    const int64_t stride = width * int64_t(sizeof(K));
    const Plain<K> rows = {keys + chunk.start * stride, stride, width};
    multiply_all_keys(*this, own.queries, rows, chunk.count, own.weights);
  });
  weigh(*this, chunk.count, own);
  by_kind(int(value_kind), [&](auto zero) {
    using V = decltype(zero);
    const int64_t stride = value_width * int64_t(sizeof(V));
    const Plain<V> rows = {values + chunk.start * stride, stride, value_width};
    multiply_all_values(*this, own.weights, rows, chunk.count, own.sums);
  });
}

extern "C" int reasonalloc_attend(const Attend* arguments, int threads) {
  return attend_alone(*arguments, threads);
}
