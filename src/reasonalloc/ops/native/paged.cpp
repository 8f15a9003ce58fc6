// Attention of one query per run over pages of one KV head each, on a CPU; see paged.py.
//
// A page holds the keys and the values of `size` tokens. Keys may lie turned, so that a vector
// holds one channel of several tokens, as vLLM's kernels for processors store them.
//
// A run may begin with pages of coded tokens, whose rows lie as ops/page_rows.py says. What is not
// coded begins in a page of its own, and is worked off as in runs without coded pages.

#include "coded.cpp"
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

// The fields of structs.py's `CodedRuns`, in its order: what runs begin with.
struct CodedRuns {
  const Format* formats;   // `width` is from row to row of a page
  int64_t count;           // of the formats
  const int32_t* of;       // the number of the format, of every head or run
  const int32_t* lengths;  // [runs], coded tokens; null: no run has any
  const int32_t* begins;   // [runs], places where the others begin: whole pages of coded ones

  // The format of a head.
  const Format& format(int64_t head) const {
    if (of[head] < 0 || of[head] >= count) throw Outside();
    return formats[of[head]];
  }
  // How many rows of a format a page holds.
  static int64_t per_page(const PagePool& pool, const Format& format) {
    const int64_t rows = 2 * pool.half() / format.width;
    if (rows < 1) throw Outside();
    return rows;
  }
  static int64_t pages(const PagePool& pool, const Format& format, int64_t tokens) {
    const int64_t each = per_page(pool, format);
    return (tokens + each - 1) / each;
  }
  // The others of a run must begin behind its coded pages. Whether these lie in the pool is to be
  // looked at besides.
  void check(const PagePool& pool, const Format& format, int64_t run) const {
    if (lengths[run] < 0 || begins[run] != pages(pool, format, lengths[run]) * pool.size)
      throw Outside();
  }
  // Finds the rows of `count` coded tokens of a run from `first` on, and of kRowsAhead more: where
  // the run, of `length`, has no more, its last one.
  static void find(const PagePool& pool, const Format& format, const int32_t* table, int64_t length,
                   int64_t first, int64_t count, const char** rows) {
    const int64_t each = per_page(pool, format),
                  there = std::min(count + kRowsAhead, length - first);
    int64_t page = first / each, at = first % each;
    for (int64_t j = 0; j < there; ++j) {
      rows[j] = pool.page(table[page]) + at * format.width;
      if (++at == each) at = 0, ++page;
    }
    for (int64_t j = there; j < count + kRowsAhead; ++j) rows[j] = rows[there - 1];
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
#pragma GCC unroll 6
      for (int i = 0; i < vectors; ++i) {
        const T* at = keys + d * size + j + i * kLanes;
        own[i] = load(at);
        __builtin_prefetch(reinterpret_cast<const char*>(at) + first, 0, 2);
        __builtin_prefetch(reinterpret_cast<const char*>(at) + second, 0, 2);
      }
#pragma GCC unroll 6
      for (int g = 0; g < many; ++g)
#pragma GCC unroll 6
        for (int i = 0; i < vectors; ++i) sums[g][i] += queries[g * width + d] * own[i];
    }
#pragma GCC unroll 6
    for (int g = 0; g < many; ++g)
#pragma GCC unroll 6
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
  CodedRuns coded;  // its `of` are of every KV head

  void store_new(int* failed) const;
  int64_t tokens(int64_t run) const;
  void add_chunks(int64_t run, int64_t chunk, Plan& plan) const;
  void reserve(int threads, Plan& plan) const;
  void prepare_queries(Plan& plan) const;
  void attend_to_chunk(const Plan& plan, const Chunk& chunk, const Scratch& own) const;

 private:
  const Format& format_of(int64_t run) const { return coded.format(run % kv_heads); }
  bool has_coded(int64_t run) const { return coded.lengths && coded.lengths[run] > 0; }
  void attend_to_coded(const Plan& plan, const Chunk& chunk, const Scratch& own) const;
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
  const int64_t length = run_lengths[run];
  pool.check(table + run * columns, columns, length);
  if (!coded.lengths) return length;
  coded.check(pool, format_of(run), run);
  if (coded.begins[run] > length) throw Outside();
  return coded.lengths[run] + length - coded.begins[run];
}

// What is not coded: of whole pages where a page is not larger than a chunk.
inline void AttendPaged::add_chunks(int64_t run, int64_t chunk, Plan& plan) const {
  const auto add = [&](int64_t first, int64_t end, int64_t most, bool are_coded) {
    for (int64_t done = first; done < end; done += most)
      plan.chunks.push_back({run, done, 0, int(std::min(most, end - done)), are_coded});
  };
  if (coded.lengths) add(0, coded.lengths[run], chunk, true);
  if (pool.size <= kChunk) chunk = std::max(pool.size, chunk / pool.size * pool.size);
  add(coded.lengths ? coded.begins[run] : 0, run_lengths[run], chunk, false);
}

inline void AttendPaged::reserve(int threads, Plan& plan) const {
  if (!coded.lengths) return;
  plan.queries.resize(size_t(batch * kv_heads * group * width));
  plan.spare.resize(size_t(threads * spare_floats(*this, coded.formats, coded.count)));
}

// Of every run that has coded tokens once, however many chunks these are.
inline void AttendPaged::prepare_queries(Plan& plan) const {
  if (!coded.lengths) return;
#pragma omp for schedule(static)
  for (int64_t run = 0; run < batch * kv_heads; ++run)
    if (has_coded(run))
      scale_queries_for(format_of(run), *this, run, plan.queries.data() + run * group * width);
}

inline void AttendPaged::attend_to_coded(const Plan& plan, const Chunk& chunk,
                                         const Scratch& own) const {
  const Format& format = format_of(chunk.run);
  const char* rows[kChunk + kRowsAhead];
  CodedRuns::find(pool, format, table + chunk.run * columns, coded.lengths[chunk.run], chunk.start,
                  chunk.count, rows);
  float* spare = const_cast<float*>(plan.spare.data());
  spare += omp_get_thread_num() * spare_floats(*this, coded.formats, coded.count);
  attend_to_rows(*this, format, plan.queries.data() + chunk.run * group * width, rows, chunk.count,
                 spare, own);
}

inline void AttendPaged::attend_to_chunk(const Plan& plan, const Chunk& chunk,
                                         const Scratch& own) const {
  if (chunk.coded) return attend_to_coded(plan, chunk, own);
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
  float* out;              // [runs, asked, tokens]
  int64_t runs, group, asked, columns, tokens;
  double softcap;
  CodedRuns coded;  // its `of` are of every run

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

// Lays out coded vectors as floats [count, dim].
inline void lay_out(const Coded& vectors, float* numbers, float* out) {
  vectors.decoded(numbers, [&](auto decoded) {
    const int64_t whole = decoded.whole(), width = vectors.width;
    for (int64_t j = 0; j < vectors.count; ++j) {
      const auto row = decoded[j];
      float factor = 1.0f, *own = out + j * width;
      if constexpr (decltype(decoded)::kScaled) factor = numbers[j];
      for (int64_t d = 0; d < whole; d += kLanes) store(own + d, row.vector(d) * factor);
      for (int64_t d = whole; d < width; ++d) own[d] = row.number(d) * factor;
    }
  });
}

// Logits of `padded` queries, [width, padded], with `count` keys, up to a whole tile: channel d of
// key j at d * step + j. To `logits`, whose rows are `row` apart.
void multiply_tiles(const float* queries, int64_t padded, const float* keys, int64_t step,
                    int64_t count, int64_t width, float softcap, float* logits, int64_t row) {
  for (int64_t r = 0; r < padded; r += kRows)
    for (int64_t j = 0; j < count; j += kTile) {
      Lanes products[kRows][2];
      tile(queries + r, padded, keys + j, step, width, products);
      for (int k = 0; k < kRows; ++k)
        for (int i = 0; i < 2; ++i) {
          Lanes x = products[k][i];
          if (softcap > 0.0f) x = softly_capped(x, softcap);
          store(logits + (r + k) * row + j + i * kLanes, x);
        }
    }
}

template <typename T>
void Received::some(int64_t run, int64_t first, std::vector<float>& memory) const {
  const int64_t width = pool.width, size = pool.size;
  const int64_t step = std::max<int64_t>(size, kTile);  // of a page's channels
  const int64_t many = std::min(kAsked, asked - first), rows = group * many;
  const int64_t padded = (rows + kRows - 1) / kRows * kRows;
  const int32_t *pages = table + run * columns, *sees = visible + run * asked + first;
  float* received = out + (run * asked + first) * tokens;
  std::fill_n(received, many * tokens, 0.0f);
  const int64_t most = *std::max_element(sees, sees + many);
  if (most < 0 || most > tokens) throw Outside();
  if (most == 0) return;
  const Format* format = nullptr;
  int64_t held = 0, begin = 0;  // coded tokens that are seen, place behind the coded pages
  if (coded.lengths) {
    format = &coded.format(run);
    coded.check(pool, *format, run);
    held = std::min<int64_t>(most, coded.lengths[run]), begin = coded.begins[run];
    pool.check(pages, columns, CodedRuns::pages(pool, *format, held) * size);
  }
  if (held < most) pool.check(pages, columns, begin + most - held);
  const int64_t used = (most - held + size - 1) / size;
  const int64_t row = (held + used * size + kTile - 1) / kTile * kTile + kTile;
  const bool rotated = held > 0 && format->key_code == kInt4Rotated;
  const int64_t numbers = held > 0 ? numbers_of(format->key_code, width) : 0;
  memory.resize(size_t((1 + rotated) * width * padded + padded * row + width * step +
                       kTile * (held > 0 ? width + numbers : 0)));
  float *turned = memory.data(), *turned_alike = turned + rotated * width * padded;
  float *logits = turned_alike + width * padded, *spare = logits + padded * row;
  float *plain = spare + width * step, *scales = plain + kTile * width;
  std::memset(turned, 0, size_t((1 + rotated) * width * padded) * 4);
  std::memset(spare, 0, size_t(width * step) * 4);
  for (int64_t r = 0; r < rows; ++r) {
    const float* query = queries + ((run * group + r / many) * asked + first + r % many) * width;
    for (int64_t d = 0; d < width; ++d) turned[d * padded + r] = query[d];
    if (!rotated) continue;
    std::memcpy(plain, query, size_t(width) * 4);
    rotate(plain, width);
    for (int64_t d = 0; d < width; ++d) turned_alike[d * padded + r] = plain[d];
  }
  for (int64_t done = 0; done < held; done += kTile) {
    const char* at[kTile + kRowsAhead];
    const int count = int(std::min<int64_t>(kTile, held - done));
    CodedRuns::find(pool, *format, pages, held, done, count, at);
    lay_out(format->keys(at, count, pool.kind, width), scales, plain);
    for (int64_t d = 0; d < width; ++d)
      for (int64_t j = 0; j < count; ++j) spare[d * step + j] = plain[j * width + d];
    multiply_tiles(turned_alike, padded, spare, step, count, width, float(softcap), logits + done,
                   row);
  }
  for (int64_t p = 0; p < used; ++p) {
    const float* keys = turned_floats<T>(pool, pages[begin / size + p], step, spare);
    multiply_tiles(turned, padded, keys, step, size, width, float(softcap),
                   logits + held + p * size, row);
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
