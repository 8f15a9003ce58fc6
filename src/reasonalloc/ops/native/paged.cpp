// Attention of one query per run over pages of one KV head each, on a CPU; see paged.py.
//
// A page holds the keys and the values of `size` tokens. Keys may lie turned, so that a vector
// holds one channel of several tokens, as vLLM's kernels for processors store them.

#include "attention.cpp"
#include "rkv.cpp"

namespace {

// Where the tokens of runs lie: pages of `width` x `size` keys, then as many values.
struct PagePool {
  const char* memory;
  int64_t kind, pages, size, width, turned;

  int64_t bits() const { return __builtin_ctzll(uint64_t(size)); }  // size is a power of two
  int64_t half() const { return size * width * bytes_of(kind); }    // bytes of a page's keys
  const char* page(int64_t number) const { return memory + number * 2 * half(); }

  bool has(int64_t place) const { return place >= 0 && place >> bits() < pages; }

  // Copies the key and the value of a token to its place (page * size + slot), or from there.
  template <bool to>
  void copy(int64_t place, char* key, char* value) const {
    char* page = const_cast<char*>(this->page(place >> bits()));
    const int64_t slot = place & (size - 1), row = width * bytes_of(kind);
    if (!turned)
      move<to>(page + slot * row, key, row);
    else if (bytes_of(kind) == 4)
      for (int64_t d = 0; d < width; ++d) move<to>(page + (d * size + slot) * 4, key + d * 4, 4);
    else
      for (int64_t d = 0; d < width; ++d) move<to>(page + (d * size + slot) * 2, key + d * 2, 2);
    move<to>(page + half() + slot * row, value, row);
  }
  template <bool to>
  static void move(char* there, char* own, int64_t bytes) {
    std::memcpy(to ? there : own, to ? own : there, size_t(bytes));
  }

  // Of the pages of `length` tokens all must lie in the pool.
  void check(const int32_t* table, int64_t columns, int64_t length) const {
    if (length < 0 || length > columns * size) throw Outside();
    for (int64_t i = 0; i < (length + size - 1) >> bits(); ++i)
      if (table[i] < 0 || table[i] >= pages) throw Outside();
  }
};

// Rows of the tokens of a run from `first` on.
template <typename T>
struct InPages {
  static constexpr bool kScaled = false;
  const PagePool& pool;
  const int32_t* table;
  int64_t first, bits, offset;  // bytes of a page before the rows

  InPages(const PagePool& pool, const int32_t* table, int64_t first, int64_t offset)
      : pool(pool), table(table), first(first), bits(pool.bits()), offset(offset) {}
  typename Plain<T>::Row operator[](int64_t j) const {
    const int64_t at = first + j, stride = pool.width * int64_t(sizeof(T));
    return {pool.page(table[at >> bits]) + offset + (at & (pool.size - 1)) * stride, stride};
  }
  int64_t whole() const { return pool.width / kLanes * kLanes; }
};

// Logits of `many` queries with `count` keys that lie turned, channel d of key j at d * size + j;
// up to the next whole vectors. What is read next is fetched meanwhile: `first` and `second` bytes
// behind what is read.
template <int many, int vectors, typename T>
void multiply_turned(const float* queries, const T* keys, int64_t size, int64_t count,
                     int64_t width, int64_t first, int64_t second, float* logits) {
  for (int64_t j = 0; j < count; j += vectors * kLanes) {
    Lanes sums[many][vectors] = {};
    for (int64_t d = 0; d < width; ++d) {
      Lanes own[vectors];
#pragma GCC unroll 4
      for (int i = 0; i < vectors; ++i) {
        const T* at = keys + d * size + j + i * kLanes;
        own[i] = load(at);
        __builtin_prefetch(reinterpret_cast<const char*>(at) + first, 0, 2);
        __builtin_prefetch(reinterpret_cast<const char*>(at) + second, 0, 2);
      }
#pragma GCC unroll 4
      for (int g = 0; g < many; ++g)
#pragma GCC unroll 4
        for (int i = 0; i < vectors; ++i) sums[g][i] += queries[g * width + d] * own[i];
    }
#pragma GCC unroll 4
    for (int g = 0; g < many; ++g)
#pragma GCC unroll 4
      for (int i = 0; i < vectors; ++i) store(logits + g * kChunk + j + i * kLanes, sums[g][i]);
  }
}

}  // namespace

// The fields of structs.py's `AttendPaged`, in its order.
struct AttendPaged : Attend {
  PagePool pool;
  const int32_t* table;  // [runs, columns]
  int64_t columns;
  const int32_t* run_lengths;  // [runs], new tokens included
  const int64_t* places;       // [runs], of the new tokens: page * size + place
  int64_t noted;               // tokens whose queries go to the ring
  const int64_t *noted_tokens, *noted_rows, *noted_places;
  int64_t ring_rows;

  void store_new(int* failed) const;
  int64_t tokens(int64_t run) const;
  void add_chunks(int64_t run, int64_t chunk, Plan& plan) const;
  void attend_to_chunk(const Plan& plan, const Chunk& chunk, const Scratch& own) const;
};

extern "C" int64_t reasonalloc_bytes_of_attend_paged() { return sizeof(AttendPaged); }

// The new token of every run, and queries that are to be remembered.
inline void AttendPaged::store_new(int* failed) const {
  const int64_t bytes = bytes_of(key_kind), row = width * bytes, heads = kv_heads * group;
#pragma omp for schedule(static)
  for (int64_t run = 0; run < batch * kv_heads; ++run) {
    const int64_t b = run / kv_heads, h = run % kv_heads;
    if (!pool.has(places[run])) {
      *failed = kOutside;
      continue;
    }
    const char* new_key = key + (b * key_strides[0] + h * key_strides[1]) * bytes;
    const char* new_value = value + (b * value_strides[0] + h * value_strides[1]) * bytes;
    pool.copy<true>(places[run], const_cast<char*>(new_key), const_cast<char*>(new_value));
  }
#pragma omp for schedule(static)
  for (int64_t i = 0; i < noted; ++i) {
    const int64_t b = noted_tokens[i], at = noted_rows[i], place = noted_places[i];
    if (b < 0 || b >= batch || at < 0 || at >= ring_rows || place < 0 || place >= window) {
      *failed = kOutside;
      continue;
    }
    for (int64_t h = 0; h < heads; ++h)
      std::memcpy(ring + ((at * window + place) * heads + h) * row,
                  query + (b * query_strides[0] + h * query_strides[1]) * bytes, size_t(row));
  }
}

inline int64_t AttendPaged::tokens(int64_t run) const {
  pool.check(table + run * columns, columns, run_lengths[run]);
  return run_lengths[run];
}

// Of whole pages where a page is not larger than a chunk.
inline void AttendPaged::add_chunks(int64_t run, int64_t chunk, Plan& plan) const {
  if (pool.size <= kChunk) chunk = std::max(pool.size, chunk / pool.size * pool.size);
  for (int64_t done = 0; done < run_lengths[run]; done += chunk)
    plan.chunks.push_back({run, done, 0, int(std::min(chunk, run_lengths[run] - done)), false});
}

inline void AttendPaged::attend_to_chunk(const Plan&, const Chunk& chunk,
                                         const Scratch& own) const {
  const int32_t* pages = table + chunk.run * columns;
  const int64_t size = pool.size;
  scale_queries(*this, chunk.run, own.queries);
  by_kind(int(key_kind), [&](auto zero) {
    using T = decltype(zero);
    if (!pool.turned) {
      multiply_all_keys(*this, own.queries, InPages<T>(pool, pages, chunk.start, 0), chunk.count,
                        own.weights);
    } else {
      const int64_t last = (run_lengths[chunk.run] - 1) >> pool.bits();
      for (int64_t done = 0, many; done < chunk.count; done += many) {
        const int64_t at = chunk.start + done, place = at & (size - 1);
        many = std::min(chunk.count - done, size - place);
        const int64_t page = at >> pool.bits(), next = std::min(page + 1, last);
        const T* keys = reinterpret_cast<const T*>(pool.page(pages[page])) + place;
        const int64_t ahead = pool.page(pages[next]) - pool.page(pages[page]);
        by_queries(group, [&](int64_t g, auto several) {
          constexpr int n = several.value;
          const float* queries = own.queries + g * width;
          float* logits = own.weights + g * kChunk + done;
          if (place % (2 * kLanes) == 0 && size % (2 * kLanes) == 0 && done % (2 * kLanes) == 0)
            multiply_turned<n, 2>(queries, keys, size, many, width, pool.half(), ahead, logits);
          else
            multiply_turned<n, 1>(queries, keys, size, many, width, pool.half(), ahead, logits);
        });
      }
    }
    weigh(*this, chunk.count, own);
    multiply_all_values(*this, own.weights, InPages<T>(pool, pages, chunk.start, pool.half()),
                        chunk.count, own.sums);
  });
}

extern "C" int reasonalloc_attend_paged(const AttendPaged* arguments, int threads) {
  return attend_alone(*arguments, threads);
}

namespace {

constexpr int64_t kAsked = 16;  // queries of a head that are worked off together

// What each token received from each query.
struct Received {
  PagePool pool;
  const float* queries;    // [runs, group, asked, width], scaled
  const int32_t* table;    // [runs, columns]
  const int32_t* visible;  // [runs, asked], first tokens that a query sees; 0: it is none
  const float* sinks;      // [runs, group]; may be null
  float* out;              // [runs, asked, columns * size]
  int64_t runs, group, asked, columns;
  double softcap;

  // Of the `kAsked` queries of a run from `first` on.
  template <typename T>
  void some(int64_t run, int64_t first, std::vector<float>& memory) const;
};

// Turns a page's keys into floats [width, step], unless they lie so.
template <typename T>
const float* turned_floats(const PagePool& pool, int64_t number, int64_t step, float* spare) {
  const T* keys = reinterpret_cast<const T*>(pool.page(number));
  if constexpr (std::is_same_v<T, float>)
    if (pool.turned && step == pool.size) return keys;
  for (int64_t d = 0; d < pool.width; ++d)
    for (int64_t j = 0; j < pool.size; ++j)
      spare[d * step + j] = read(keys + (pool.turned ? d * pool.size + j : j * pool.width + d));
  return spare;
}

template <typename T>
void Received::some(int64_t run, int64_t first, std::vector<float>& memory) const {
  const int64_t width = pool.width, size = pool.size, tokens = columns * size;
  const int64_t step = std::max<int64_t>(size, kTile);  // of a page's channels
  const int64_t many = std::min(kAsked, asked - first), rows = group * many;
  const int64_t padded = (rows + kRows - 1) / kRows * kRows;
  const int32_t *pages = table + run * columns, *sees = visible + run * asked + first;
  float* received = out + (run * asked + first) * tokens;
  std::memset(received, 0, size_t(many * tokens) * 4);
  const int64_t most = *std::max_element(sees, sees + many);
  pool.check(pages, columns, most);
  const int64_t used = (most + size - 1) / size, row = used * step;
  memory.resize(size_t(width * padded + padded * row + width * step));
  float *turned = memory.data(), *logits = turned + width * padded;
  float* spare = logits + padded * row;
  std::memset(turned, 0, size_t(width * padded) * 4);
  std::memset(spare, 0, size_t(width * step) * 4);
  for (int64_t r = 0; r < rows; ++r) {
    const float* query = queries + ((run * group + r / many) * asked + first + r % many) * width;
    for (int64_t d = 0; d < width; ++d) turned[d * padded + r] = query[d];
  }
  for (int64_t p = 0; p < used; ++p) {
    const float* keys = turned_floats<T>(pool, pages[p], step, spare);
    for (int64_t r = 0; r < padded; r += kRows)
      for (int64_t j = 0; j < size; j += kTile) {
        Lanes products[kRows][2];
        tile(turned + r, padded, keys + j, step, width, products);
        for (int k = 0; k < kRows; ++k)
          for (int i = 0; i < 2; ++i) {
            Lanes x = products[k][i];
            if (softcap > 0.0) x = softly_capped(x, float(softcap));
            store(logits + (r + k) * row + p * size + j + i * kLanes, x);
          }
      }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t query = r % many, count = sees[query];
    if (count <= 0) continue;
    float largest, *weights = logits + r * row;
    float total = exponentiate(weights, count, &largest);
    if (sinks) total += std::exp(sinks[run * group + r / many] - largest);
    const float share = 1.0f / (total * float(group));
    float* into = received + query * tokens;
    for (int64_t j = 0; j < count; ++j) into[j] += weights[j] * share;
  }
}

}  // namespace

extern "C" int64_t reasonalloc_bytes_of_received() { return sizeof(Received); }

extern "C" int reasonalloc_received(const Received* arguments, int threads) {
  const Received& a = *arguments;
  const int64_t blocks = (a.asked + kAsked - 1) / kAsked;
  int failed = kDone;
  const bool known = by_kind(int(a.pool.kind), [&](auto zero) {
    failed = for_rows(a.runs * blocks, threads, [&](int64_t number) {
      static thread_local std::vector<float> memory;
      a.some<decltype(zero)>(number / blocks, number % blocks * kAsked, memory);
      if (memory.size() > kKept) memory = {};
    });
  });
  return known ? failed : kOutside;
}

// Copies tokens of a pool from places to others: keys and values, as they are stored. All are read
// before any is written, since places may be both. What goes to place 0, of the page that nobody
// reads, goes nowhere.
extern "C" int reasonalloc_move_tokens(const PagePool* pages, const int64_t* from,
                                       const int64_t* to, int64_t count, int threads) {
  const PagePool& pool = *pages;
  const int64_t row = pool.width * bytes_of(pool.kind);
  for (int64_t i = 0; i < count; ++i)
    if (!pool.has(from[i]) || !pool.has(to[i])) return kOutside;
  std::vector<char> aside;
  try {
    aside.resize(size_t(2 * count * row));
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
  char* own = aside.data();
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; ++i)
      pool.copy<false>(from[i], own + 2 * i * row, own + (2 * i + 1) * row);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; ++i)
      if (to[i] > 0) pool.copy<true>(to[i], own + 2 * i * row, own + (2 * i + 1) * row);
  }
  return kDone;
}
