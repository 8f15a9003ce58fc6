// A decode step as a list of instructions, run by a team of threads in one go; see program.py.

#include "../ops/native/coded.cpp"
#include "elementwise.cpp"
#include "products.cpp"

namespace {

// In the order of structs.py's `Operation`.
// clang-format off
#define REASONALLOC_OPERATIONS(X)                                                            \
  X(Copy) X(Negate) X(Cosine) X(Sine) X(InverseRoot) X(Logistic) X(Silu) X(Gelu) X(GeluTanh) \
  X(Tanh) X(Exp) X(Relu) X(Square) X(Power) X(Add) X(Subtract) X(Multiply) X(Divide) X(Sum)  \
  X(Count) X(Embed) X(Product) X(Attend) X(Panel) X(AttendCoded)
// clang-format on

#define REASONALLOC_NUMBER(name) k##name,
enum Operation { REASONALLOC_OPERATIONS(REASONALLOC_NUMBER) };

// out[rows, outputs] of a[rows, width] or its panel, b[outputs, width] and perhaps c[outputs].
void product(const Instruction& i, int64_t thread, int64_t threads) {
  const int64_t rows = i.sizes[0], outputs = i.sizes[1];
  const bool panel = i.sizes[3] != 0;
  const Product p = {
      reinterpret_cast<const float*>(i.a.at), i.a.strides[0],  i.b.strides[0], i.sizes[2],
      reinterpret_cast<const float*>(i.c.at), i.out.strides[0]};
  by_kind(int(i.b.kind), [&](auto weight) {
    by_kind(int(i.out.kind), [&](auto zero) {
      using W = decltype(weight);
      using O = decltype(zero);
      multiply(p, reinterpret_cast<const W*>(i.b.at), outputs, rows, panel,
               reinterpret_cast<O*>(i.out.at), thread, threads);
    });
  });
}

// a[rows, width] as a panel.
void panel(const Instruction& i, int64_t thread, int64_t threads) {
  by_kind(int(i.a.kind), [&](auto zero) {
    lay_out(reinterpret_cast<const decltype(zero)*>(i.a.at), i.a.strides[0], i.sizes[0], i.sizes[1],
            reinterpret_cast<float*>(i.out.at), i.out.strides[0], thread, threads);
  });
}

// Rows of a, `sizes[2]` bytes wide, at the places b[count].
void embed(const Instruction& i, int* failed) {
  const int64_t* places = reinterpret_cast<const int64_t*>(i.b.at);
  const int64_t entries = i.sizes[0], count = i.sizes[1], bytes = i.sizes[2];
  for (int64_t j = 0; j < count; ++j) {
    const int64_t place = places[j * i.b.strides[3]];
    if (place < 0 || place >= entries) {
      *failed = kBadIndex;
      return;
    }
    std::memcpy(i.out.at + j * bytes, i.a.at + place * bytes, size_t(bytes));
  }
}

void run(const Instruction& i, int64_t thread, int64_t threads, Plan& plan, int* failed) {
  const float number = float(i.number), factor = float(i.factor);
  auto each = [&](auto f) { unary(i, thread, threads, f); };
  auto single = [&](auto f) { scalar(i, thread, threads, f); };
  auto pairs = [&](auto f) { binary(i, thread, threads, f); };
  switch (i.operation) {
    case kCopy: return each([](Lanes x) { return x; });
    case kNegate: return each([](Lanes x) { return -x; });
    case kCosine: return single([](float x) { return std::cos(x); });
    case kSine: return single([](float x) { return std::sin(x); });
    case kInverseRoot: return single([](float x) { return 1.0f / std::sqrt(x); });
    case kLogistic: return each([](Lanes x) { return logistic(x); });
    case kSilu: return each([](Lanes x) { return x * logistic(x); });
    case kGelu:
      return single([](float x) { return 0.5f * x * (1.0f + std::erf(x * 0.70710678f)); });
    case kGeluTanh:  // 0.5 (1 + tanh y) is the logistic function of 2y
      return each([](Lanes x) { return x * logistic(1.59576912f * (x + 0.044715f * x * x * x)); });
    case kTanh: return single([](float x) { return std::tanh(x); });
    case kExp: return single([](float x) { return std::exp(x); });
    case kRelu: return each([](Lanes x) { return x < 0.0f ? Lanes{} : x; });
    case kSquare: return each([](Lanes x) { return x * x; });
    case kPower: return single([=](float x) { return std::pow(x, number); });
    case kAdd: return pairs([=](Lanes x, Lanes y) { return x + factor * y; });
    case kSubtract: return pairs([=](Lanes x, Lanes y) { return x - factor * y; });
    case kMultiply: return pairs([](Lanes x, Lanes y) { return x * y; });
    case kDivide: return pairs([](Lanes x, Lanes y) { return x / y; });
    case kSum: return sum_rows(i, thread, threads);
    case kCount:
      for (int64_t j = 0; thread == 0 && j < i.sizes[3]; ++j)
        reinterpret_cast<int64_t*>(i.out.at)[j] =
            reinterpret_cast<const int64_t*>(i.a.at)[j] + int64_t(i.number);
      return;
    case kEmbed:
      if (thread == 0) embed(i, failed);
      return;
    case kProduct: return product(i, thread, threads);
    case kPanel: return panel(i, thread, threads);
    case kAttend: return attend(*reinterpret_cast<const Attend*>(i.a.at), plan, failed);
    case kAttendCoded: return attend(*reinterpret_cast<const AttendCoded*>(i.a.at), plan, failed);
  }
}

}  // namespace

#define REASONALLOC_NAME(name) #name " "
extern "C" const char* reasonalloc_operations() { return REASONALLOC_OPERATIONS(REASONALLOC_NAME); }

// Returns a `Failure`; what was done stays done.
extern "C" int reasonalloc_run(const Instruction* instructions, int64_t count, int threads) {
  static thread_local Plan memory;  // stays for the next call of this thread
  Plan& plan = memory;
  int failed = kDone;
#pragma omp parallel num_threads(threads)
  {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    for (int64_t n = 0; n < count; ++n) {
      if (instructions[n].barrier) {
#pragma omp barrier
      }
      run(instructions[n], thread, team, plan, &failed);
    }
  }
  return failed;
}
