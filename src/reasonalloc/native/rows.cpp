// Moving the rows that stay to their new places, on a CPU; see rows.py for the interface.

// Of every run the kept rows, in their order, go to [offset, offset + number) of the sequence's
// storage. They may come from that same storage: a sequence is copied aside first, which fits a
// core's cache for usual budgets.
extern "C" void reasonalloc_move_rows(char* own, const char* from, const int64_t* index,
                                      const bool* keep, const int64_t* offsets, int64_t batch,
                                      int64_t kv_heads, int64_t n, int64_t slots, int64_t stored,
                                      int64_t row, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t b = 0; b < batch; ++b) {
    static thread_local std::vector<char> aside;
    aside.resize(size_t(slots * row));
    char* end = aside.data();
    for (int64_t i = b * kv_heads * n; i < (b + 1) * kv_heads * n; ++i)
      if (keep[i]) {
        std::memcpy(end, from + (b * stored + index[i]) * row, size_t(row));
        end += row;
      }
    const char* next = aside.data();
    for (int64_t run = b * kv_heads; run < (b + 1) * kv_heads; ++run) {
      int64_t kept = 0;
      for (int64_t i = run * n; i < (run + 1) * n; ++i) kept += keep[i];
      std::memcpy(own + (b * slots + offsets[run]) * row, next, size_t(kept * row));
      next += kept * row;
    }
  }
}
