// Moving the rows that stay to their new places, on a CPU; see rows.py for the interface.

#include "lanes.h"

// Of every run the kept rows, in their order, go to [offset, offset + number) of the sequence's
// storage. They may come from that same storage: a sequence is copied aside first, which fits a
// core's cache for usual budgets. Returns 0, or 1 if a sequence was left as it was: a run
// would have ended behind its storage, or a row would have come from outside of it.
extern "C" int reasonalloc_move_rows(char* own, const char* from, const int64_t* index,
                                     const bool* keep, const int64_t* offsets, int64_t batch,
                                     int64_t kv_heads, int64_t n, int64_t slots, int64_t stored,
                                     int64_t row, int threads) {
  int refused = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) reduction(| : refused)
  for (int64_t b = 0; b < batch; ++b) {
    static thread_local std::vector<char> aside;
    static thread_local std::vector<int64_t> kept;
    kept.assign(size_t(kv_heads), 0);
    int64_t total = 0;
    bool fits = true;
    for (int64_t h = 0; h < kv_heads; ++h) {
      const int64_t run = b * kv_heads + h;
      for (int64_t i = run * n; i < (run + 1) * n; ++i) {
        kept[h] += keep[i];
        fits = fits && (!keep[i] || (index[i] >= 0 && index[i] < stored));
      }
      total += kept[h];
      fits = fits && offsets[run] >= 0 && offsets[run] + kept[h] <= slots;
    }
    if (!fits) {
      refused = 1;
      continue;
    }
    aside.resize(size_t(total * row));
    char* end = aside.data();
    for (int64_t i = b * kv_heads * n; i < (b + 1) * kv_heads * n; ++i)
      if (keep[i]) {
        std::memcpy(end, from + (b * stored + index[i]) * row, size_t(row));
        end += row;
      }
    const char* next = aside.data();
    for (int64_t h = 0; h < kv_heads; ++h) {
      const int64_t bytes = kept[h] * row;
      if (bytes > 0)
        std::memcpy(own + (b * slots + offsets[b * kv_heads + h]) * row, next, size_t(bytes));
      next += bytes;
    }
  }
  return refused;
}
