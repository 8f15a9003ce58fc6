// Operations on one or two tensors, element by element, and sums of rows; see program.py.
//
// Tensors have up to four dimensions with any strides; blocks of the innermost one are brought to
// float, worked off in vectors and written in the type of the result.

#include "../ops/native/lanes.h"

extern "C" {

struct Operand {
  char* at;
  int64_t kind;        // 0 float, 1 bfloat16, 2 half, 3 int64, 4 int32, 5 bool
  int64_t strides[4];  // in elements
};

// The fields of structs.py's `Instruction`, in its order.
struct Instruction {
  int64_t operation;
  int64_t barrier;  // what follows reads or replaces what other threads may still be at
  int64_t share;    // 0: one thread, 1: blocks are divided, 2: so is the first dimension
  int64_t sizes[4];
  Operand out, a, b, c;
  double number, factor;
};

int64_t reasonalloc_bytes_of_operand() { return sizeof(Operand); }
int64_t reasonalloc_bytes_of_instruction() { return sizeof(Instruction); }
}

namespace {

constexpr int64_t kBlock = 512;

// An element of any kind, where speed does not matter.
inline float read_any(const char* at, int64_t kind, int64_t index) {
  switch (kind) {
    case 0: return reinterpret_cast<const float*>(at)[index];
    case 3: return float(reinterpret_cast<const int64_t*>(at)[index]);
    case 4: return float(reinterpret_cast<const int32_t*>(at)[index]);
    case 5: return at[index] ? 1.0f : 0.0f;
  }
  float value = 0.0f;
  by_kind(int(kind),
          [&](auto zero) { value = read(reinterpret_cast<const decltype(zero)*>(at) + index); });
  return value;
}

// `count` elements as floats, zeros behind them up to a whole vector: where they lie if they can
// be read there, else in `buffer`.
inline const float* fetch(const Operand& o, int64_t offset, int64_t count, float* buffer) {
  const int64_t step = o.strides[3];
  if (o.kind == 0) {
    const float* at = reinterpret_cast<const float*>(o.at) + offset;
    if (step == 1 && count % kLanes == 0) return at;
    if (step == 1) {
      std::memcpy(buffer, at, size_t(count) * 4);
    } else {
      for (int64_t j = 0; j < count; ++j) buffer[j] = at[j * step];
    }
  } else if (step == 1 && o.kind <= 2) {
    by_kind(int(o.kind), [&](auto zero) {
      const auto* at = reinterpret_cast<const decltype(zero)*>(o.at) + offset;
      int64_t j = 0;
      for (; j + kLanes <= count; j += kLanes) store(buffer + j, load(at + j));
      for (; j < count; ++j) buffer[j] = read(at + j);
    });
  } else {
    for (int64_t j = 0; j < count; ++j) buffer[j] = read_any(o.at, o.kind, offset + j * step);
  }
  for (int64_t j = count; j < whole_vectors(count); ++j) buffer[j] = 0.0f;
  return buffer;
}

// Where the results of a block may be written as floats.
inline float* results_of(const Operand& o, int64_t offset, int64_t count, float* buffer) {
  const bool there = o.kind == 0 && o.strides[3] == 1 && count % kLanes == 0;
  return there ? reinterpret_cast<float*>(o.at) + offset : buffer;
}

inline void put(const Operand& o, int64_t offset, int64_t count, const float* results) {
  by_kind(int(o.kind), [&](auto zero) {
    auto* at = reinterpret_cast<decltype(zero)*>(o.at) + offset;
    if (static_cast<const void*>(at) == results) return;
    for (int64_t j = 0; j < count; ++j) write(at + j * o.strides[3], results[j]);
  });
}

// Calls `run(offset of out, of a, of b, count)` for every block that is this thread's.
template <typename Run>
void for_blocks(const Instruction& i, int64_t thread, int64_t threads, Run run) {
  const int64_t inner = i.sizes[3], per_row = (inner + kBlock - 1) / kBlock;
  const int64_t per_first = i.sizes[1] * i.sizes[2] * per_row, all = i.sizes[0] * per_first;
  int64_t begin = 0, end = thread == 0 ? all : 0;
  if (i.share == 1) {
    begin = all * thread / threads;
    end = all * (thread + 1) / threads;
  } else if (i.share == 2) {
    begin = i.sizes[0] * thread / threads * per_first;
    end = i.sizes[0] * (thread + 1) / threads * per_first;
  }
  for (int64_t block = begin; block < end; ++block) {
    const int64_t start = block % per_row * kBlock, row = block / per_row;
    const int64_t at[3] = {row / (i.sizes[1] * i.sizes[2]), row / i.sizes[2] % i.sizes[1],
                           row % i.sizes[2]};
    auto offset = [&](const Operand& o) {
      return at[0] * o.strides[0] + at[1] * o.strides[1] + at[2] * o.strides[2] +
             start * o.strides[3];
    };
    run(offset(i.out), offset(i.a), offset(i.b), std::min(kBlock, inner - start));
  }
}

template <typename F>
void unary(const Instruction& i, int64_t thread, int64_t threads, F f) {
  alignas(64) float x_memory[kBlock], y_memory[kBlock];
  for_blocks(i, thread, threads, [&](int64_t out, int64_t a, int64_t, int64_t count) {
    const float* x = fetch(i.a, a, count, x_memory);
    float* y = results_of(i.out, out, count, y_memory);
    for (int64_t j = 0; j < count; j += kLanes) store(y + j, f(load(x + j)));
    put(i.out, out, count, y);
  });
}

// The same with a function of one number.
template <typename F>
void scalar(const Instruction& i, int64_t thread, int64_t threads, F f) {
  alignas(64) float x_memory[kBlock], y_memory[kBlock];
  for_blocks(i, thread, threads, [&](int64_t out, int64_t a, int64_t, int64_t count) {
    const float* x = fetch(i.a, a, count, x_memory);
    for (int64_t j = 0; j < count; ++j) y_memory[j] = f(x[j]);
    put(i.out, out, count, y_memory);
  });
}

// Without a second tensor it is `number`.
template <typename F>
void binary(const Instruction& i, int64_t thread, int64_t threads, F f) {
  alignas(64) float x_memory[kBlock], y_memory[kBlock], z_memory[kBlock];
  const bool constant = i.b.at == nullptr;
  if (constant)
    for (int64_t j = 0; j < kBlock; ++j) y_memory[j] = float(i.number);
  for_blocks(i, thread, threads, [&](int64_t out, int64_t a, int64_t b, int64_t count) {
    const float* x = fetch(i.a, a, count, x_memory);
    const float* y = constant ? y_memory : fetch(i.b, b, count, y_memory);
    float* z = results_of(i.out, out, count, z_memory);
    for (int64_t j = 0; j < count; j += kLanes) store(z + j, f(load(x + j), load(y + j)));
    put(i.out, out, count, z);
  });
}

inline Lanes logistic(Lanes x) {
  Ints negative = x < 0.0f;
  Lanes e = exp_of_negative(negative ? x : -x);
  return (negative ? e : Lanes{} + 1.0f) / (1.0f + e);
}

// Sum over the innermost dimension, times `factor`; rows are divided as blocks are elsewhere.
void sum_rows(const Instruction& i, int64_t thread, int64_t threads) {
  alignas(64) float memory[kBlock];
  Instruction rows = i;
  rows.sizes[3] = 1;
  for_blocks(rows, thread, threads, [&](int64_t out, int64_t a, int64_t, int64_t) {
    float total = 0.0f;
    for (int64_t start = 0; start < i.sizes[3]; start += kBlock) {
      const int64_t count = std::min(kBlock, i.sizes[3] - start);
      const float* x = fetch(i.a, a + start * i.a.strides[3], count, memory);
      Lanes sums = {};
      for (int64_t j = 0; j < count; j += kLanes) sums += load(x + j);
      total += sum(sums);
    }
    const float result = total * float(i.factor);
    put(i.out, out, 1, &result);
  });
}

}  // namespace
