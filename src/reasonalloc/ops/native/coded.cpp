// Attention where all but the newest tokens are coded, on a CPU; see coded.py, and ops/codes.py for
// how the bytes of a token lie.
//
// The tail of a head is a run as in attention.cpp. Its coded tokens are chunks as well, whose codes
// become floats in registers. Of int8 and fp8 the products with raw codes are scaled, once per
// token: after the keys, and before the values as part of the weights.

#include "attention.cpp"

namespace {

constexpr int kGroup = 32;  // numbers that share a scale and an offset in int4
constexpr int kRowsAhead = 16;  // between a coded row that is read and the one that is fetched
constexpr int kLaidOut = 32;  // coded keys whose numbers are laid out at a time

// In the order of codes.py's KINDS.
enum Code { kAuto = 0, kInt8 = 1, kInt4 = 2, kFp8 = 3, kInt4Rotated = 4 };

// As many bytes as a vector has lanes, with their signs.
inline Ints bytes_at(const char* at) {
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
#elif defined(__AVX2__)
  return (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)));
#else
  typedef int8_t Bytes __attribute__((vector_size(kLanes), aligned(1), may_alias));
  return __builtin_convertvector(*reinterpret_cast<const Bytes*>(at), Ints);
#endif
}

// A number of half precision. No float on the way is denormal.
inline float half_at(const char* at) {
#ifdef REASONALLOC_HALF
  _Float16 half;
  std::memcpy(&half, at, sizeof half);
  return float(half);
#else
  uint16_t bits;
  std::memcpy(&bits, at, sizeof bits);
  const int exponent = bits >> 10 & 31, mantissa = bits & 0x3ff;
  const float size = exponent == 31  ? std::numeric_limits<float>::quiet_NaN()
                     : exponent == 0 ? float(mantissa) * 0x1p-24f
                                     : std::ldexp(float(1024 + mantissa), exponent - 25);
  return bits & 0x8000 ? -size : size;
#endif
}

struct Int8 {
  static Lanes vector(const char* at) { return __builtin_convertvector(bytes_at(at), Lanes); }
  static float number(const char* at) { return float(*reinterpret_cast<const int8_t*>(at)); }
};

// e4m3. What is smaller than its smallest normal number, 2^-6, has the exponent 0 and is made from
// the normal number with the same mantissa, as floats would be denormal on the way.
struct Fp8 {
  static Lanes vector(const char* at) {
    const Ints wide = bytes_at(at);
    const Ints bits = (wide << 20 & int32_t(0x87f00000)) + (120 << 23);
    const Lanes normal = (Lanes)bits;
    const Ints sign = bits & int32_t(0x80000000);
    const Lanes least = (Lanes)(sign | 0x3c800000);  // 2^-6
    return (wide & 0x78) == 0 ? normal + normal - least : normal;
  }
  static float number(const char* at) {
    const uint8_t code = uint8_t(*at);
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    const float size =
        exponent ? std::ldexp(float(8 + mantissa), exponent - 10) : float(mantissa) * 0x1p-9f;
    return code & 0x80 ? -size : size;
  }
};

// Fetches a coded row while another one is read: `spread` of its bytes per number of a vector.
struct Ahead {
  const char* row;
  int64_t spread;
  void fetch(int64_t d) const { __builtin_prefetch(row + d * spread); }
};

// Coded vectors lie `at` bytes behind the first ones of `rows`, anywhere. There are kRowsAhead more
// rows in the list than are read.
template <typename Code>
struct Scaled {
  static constexpr bool kScaled = true;
  struct Row {
    const char* at;
    Ahead ahead;
    void fetch(int64_t d) const { ahead.fetch(d); }
    Lanes vector(int64_t d) const { return Code::vector(at + d); }
    float number(int64_t d) const { return Code::number(at + d); }
  };
  const char* const* rows;
  int64_t at, spread, width;
  const float* numbers;
  Row operator[](int64_t j) const { return {rows[j] + at, {rows[j + kRowsAhead], spread}}; }
  int64_t whole() const { return width / kLanes * kLanes; }
};

struct Int4 {
  static constexpr bool kScaled = false;
  struct Row {
    const char* at;
    const float* numbers;
    int64_t width;
    Ahead ahead;
    void fetch(int64_t d) const { ahead.fetch(d); }
    Lanes vector(int64_t d) const {
      const Place own = place(d);
      const Ints codes = bytes_at(own.at) >> own.shift & 15;
      return __builtin_convertvector(codes, Lanes) * own.pair[0] + own.pair[1];
    }
    float number(int64_t d) const {
      const Place own = place(d);
      return float(uint8_t(*own.at) >> own.shift & 15) * own.pair[0] + own.pair[1];
    }

   private:
    struct Place {
      const char* at;
      int shift;
      const float* pair;  // scale and offset
    };
    Place place(int64_t number) const {
      const uint64_t d = uint64_t(number), group = d / kGroup, in_group = d % kGroup;
      const uint64_t half = std::min<uint64_t>(kGroup, uint64_t(width) - group * kGroup) / 2;
      const bool high = in_group >= half;
      const char* codes = at + group * kGroup / 2;
      return {high ? codes + in_group - half : codes + in_group, high ? 4 : 0, numbers + 2 * group};
    }
  };
  const char* const* rows;
  int64_t at, spread, width;
  const float* numbers;
  Row operator[](int64_t j) const {
    const int64_t groups = (width + kGroup - 1) / kGroup;
    return {rows[j] + at, numbers + j * 2 * groups, width, {rows[j + kRowsAhead], spread}};
  }
  // A vector lies in one half of a group.
  int64_t whole() const {
    const int64_t last = width % kGroup;
    return last / 2 % kLanes ? width - last : width;
  }
};

// Vectors that are not coded, in such rows.
template <typename T>
struct Uncoded {
  static constexpr bool kScaled = false;
  struct Row : Plain<T>::Row {
    Ahead ahead;
    void fetch(int64_t d) const { ahead.fetch(d); }
  };
  const char* const* rows;
  int64_t at, spread, width;
  Row operator[](int64_t j) const { return {{rows[j] + at, 0}, {rows[j + kRowsAhead], spread}}; }
  int64_t whole() const { return width / kLanes * kLanes; }
};

// How many numbers scale a vector.
inline int64_t numbers_of(int64_t code, int64_t width) {
  if (code == kAuto) return 0;
  return code == kInt4 || code == kInt4Rotated ? 2 * ((width + kGroup - 1) / kGroup) : 1;
}

// Coded vectors of `count` rows of `bytes`: in a row the first byte of their codes and of their
// numbers.
struct Coded {
  int64_t code, kind;  // `kind` of what is not coded
  const char* const* rows;
  int64_t codes_at, numbers_at, bytes, width;
  int count;

  // Calls `run` with the rows; the numbers that scale them are laid out as floats before.
  template <typename Run>
  void decoded(float* floats, Run run) const {
    const int64_t each = numbers_of(code, width), spread = (bytes + width - 1) / width;
    for (int64_t j = 0; j < count; ++j)
      for (int64_t i = 0; i < each; ++i)
        floats[j * each + i] = half_at(rows[j] + numbers_at + 2 * i);
    switch (code) {
      case kInt8: return run(Scaled<Int8>{rows, codes_at, spread, width, floats});
      case kFp8: return run(Scaled<Fp8>{rows, codes_at, spread, width, floats});
      case kAuto:
        by_kind(int(kind),
                [&](auto zero) { run(Uncoded<decltype(zero)>{rows, codes_at, spread, width}); });
        return;
      default: return run(Int4{rows, codes_at, spread, width, floats});
    }
  }
};

// Rows of a Hadamard matrix as large as a vector.
struct Signs {
  float row[kLanes][kLanes];
  constexpr Signs() : row() {
    for (int i = 0; i < kLanes; ++i)
      for (int j = 0; j < kLanes; ++j) {
        row[i][j] = 1.0f;
        for (int both = i & j; both; both &= both - 1) row[i][j] = -row[i][j];
      }
  }
};

// Replaces numbers by their product with a Hadamard matrix of the largest power of two that divides
// `width`, block by block.
void rotate(float* x, int64_t width) {
  static constexpr Signs signs;
  const int64_t size = width & -width;
  int64_t half = 1;
  if (size >= kLanes) {  // within vectors first
    for (int64_t i = 0; i < width; i += kLanes) {
      Lanes sums = {};
      for (int lane = 0; lane < kLanes; ++lane) sums += x[i + lane] * load(signs.row[lane]);
      store(x + i, sums);
    }
    for (half = kLanes; half < size; half *= 2)
      for (int64_t block = 0; block < width; block += 2 * half)
        for (int64_t i = block; i < block + half; i += kLanes) {
          const Lanes a = load(x + i), b = load(x + i + half);
          store(x + i, a + b);
          store(x + i + half, a - b);
        }
  }
  for (; half < size; half *= 2)
    for (int64_t block = 0; block < width; block += 2 * half)
      for (int64_t i = block; i < block + half; ++i) {
        const float a = x[i], b = x[i + half];
        x[i] = a + b;
        x[i + half] = a - b;
      }
  const float factor = 1.0f / std::sqrt(float(size));
  for (int64_t i = 0; i < width; ++i) x[i] *= factor;
}

}  // namespace

// The fields of structs.py's `Format`, in its order: codes of keys and values, bytes of a row, and
// where in it the codes of the value and the numbers of both begin.
struct Format {
  int64_t key_code, value_code, width, value_at, key_numbers_at, value_numbers_at;

  // Keys and values of rows.
  Coded keys(const char* const* rows, int count, int64_t kind, int64_t dim) const {
    return {key_code, kind, rows, 0, key_numbers_at, width, dim, count};
  }
  Coded values(const char* const* rows, int count, int64_t kind, int64_t dim) const {
    return {value_code, kind, rows, value_at, value_numbers_at, width, dim, count};
  }
};

namespace {

// Floats that a thread needs for chunks of coded tokens: the weights of its values, scaled, and the
// numbers of a chunk.
inline int64_t spare_floats(const Attend& a, const Format* formats, int64_t count) {
  int64_t most = 1;
  for (const Format* f = formats; f < formats + count; ++f)
    most = std::max(
        {most, numbers_of(f->key_code, a.width), numbers_of(f->value_code, a.value_width)});
  return kChunk * (most + a.group);
}

// The queries of a run as coded keys need them.
void scale_queries_for(const Format& format, const Attend& a, int64_t run, float* queries) {
  scale_queries(a, run, queries);
  if (format.key_code == kInt4Rotated)
    for (int64_t g = 0; g < a.group; ++g) rotate(queries + g * a.width, a.width);
}

// Attends to a chunk of coded tokens that lie at `rows`. With the keys, which come first, the
// values are fetched.
void attend_to_rows(const Attend& a, const Format& format, const float* queries,
                    const char* const* rows, int count, float* spare, const Scratch& own) {
  float *scaled = spare, *numbers = spare + a.group * kChunk;
  for (int done = 0; done < count; done += kLaidOut) {
    const int many = std::min(kLaidOut, count - done);
    format.keys(rows + done, many, a.key_kind, a.width).decoded(numbers, [&](auto decoded) {
      multiply_all_keys(a, queries, decoded, many, own.weights + done);
    });
  }
  weigh(a, count, own);
  format.values(rows, count, a.value_kind, a.value_width).decoded(numbers, [&](auto decoded) {
    const float* weights = own.weights;
    if constexpr (decltype(decoded)::kScaled) {
      for (int64_t g = 0; g < a.group; ++g)
        for (int64_t j = g * kChunk; j < g * kChunk + count; ++j)
          scaled[j] = own.weights[j] * numbers[j - g * kChunk];
      weights = scaled;
    }
    multiply_all_values(a, weights, decoded, count, own.sums);
  });
}

}  // namespace

// The fields of structs.py's `AttendCoded`: what is not coded, and then the coded runs.
struct AttendCoded : Attend {
  const char* pool;
  int64_t pool_bytes;  // of a sequence
  const Format* formats;  // of every head
  const int64_t *starts, *run_offsets, *run_lengths;

  int64_t tokens(int64_t run) const;
  void add_chunks(int64_t run, int64_t chunk, Plan& plan) const;
  void reserve(int threads, Plan& plan) const;
  void prepare_queries(Plan& plan) const;
  void attend_to_chunk(const Plan& plan, const Chunk& chunk, const Scratch& own) const;

 private:
  const Format& format_of(int64_t run) const { return formats[run % kv_heads]; }
};

extern "C" int64_t reasonalloc_bytes_of_attend_coded() { return sizeof(AttendCoded); }
extern "C" int64_t reasonalloc_bytes_of_format() { return sizeof(Format); }

// All of a run's tokens must lie within the storage, coded or not.
inline int64_t AttendCoded::tokens(int64_t run) const {
  const int64_t start = starts[run], offset = run_offsets[run], length = run_lengths[run];
  if (start < 0 || offset < 0 || length < 0 || start > pool_bytes || offset > before - length ||
      length > (pool_bytes - start) / format_of(run).width)
    throw Outside();
  return length + Attend::tokens(run);
}

inline void AttendCoded::add_chunks(int64_t run, int64_t chunk, Plan& plan) const {
  const int64_t b = run / kv_heads, width = format_of(run).width;
  const int64_t start = b * pool_bytes + starts[run];
  const int64_t slot = b * (before + slots) + run_offsets[run];
  for (int64_t done = 0; done < run_lengths[run]; done += chunk)
    plan.chunks.push_back({run, start + done * width, slot + done,
                           int(std::min(chunk, run_lengths[run] - done)), true});
  Attend::add_chunks(run, chunk, plan);
}

inline void AttendCoded::reserve(int threads, Plan& plan) const {
  plan.queries.resize(size_t(batch * kv_heads * group * width));
  plan.spare.resize(size_t(threads * spare_floats(*this, formats, kv_heads)));
}

// Of every run once, however many chunks it has.
inline void AttendCoded::prepare_queries(Plan& plan) const {
#pragma omp for schedule(static)
  for (int64_t run = 0; run < batch * kv_heads; ++run)
    scale_queries_for(format_of(run), *this, run, plan.queries.data() + run * group * width);
}

inline void AttendCoded::attend_to_chunk(const Plan& plan, const Chunk& chunk,
                                         const Scratch& own) const {
  if (!chunk.coded) return Attend::attend_to_chunk(plan, chunk, own);
  const Format& format = format_of(chunk.run);
  const char* rows[kChunk + kRowsAhead];
  for (int j = 0; j < chunk.count + kRowsAhead; ++j)
    rows[j] = pool + chunk.start + j * format.width;
  float* spare = const_cast<float*>(plan.spare.data());
  spare += omp_get_thread_num() * spare_floats(*this, formats, kv_heads);
  attend_to_rows(*this, format, plan.queries.data() + chunk.run * group * width, rows, chunk.count,
                 spare, own);
}

extern "C" int reasonalloc_attend_coded(const AttendCoded* arguments, int threads) {
  return attend_alone(*arguments, threads);
}
