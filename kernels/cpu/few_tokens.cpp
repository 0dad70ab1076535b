// A factored layer on few tokens: both products, order and bias in one call.
//
//   y_p = x pivot_rows^T (rounded);  y_np = y_p coefficients^T;  y[order] = [y_p, y_np] + bias
//
// m = out_features, n = in_features, r = rank, N = number of tokens. With few tokens a layer is one read of its weights,
// and that is what the loops are made for: every thread reads rows side by side, ROWS at a time, multiplies them with all
// tokens while they are in its registers, and writes where they belong. Threads meet once, between the products.
//
// 2048 x 2048, r = 1024, weights from memory, two threads, ms a layer, N = 1 / 4 / 16 / 32 / 64; in brackets a dense layer
// of oneDNN / two of its products and a gather:
//
//   EPYC with AVX-512 BF16, without AMX and AVX-512 FP16
//     bfloat16  0.24 (0.44 / 0.37)   0.26 (0.44 / 0.39)   0.48 (0.65 / 0.57)   0.79 (0.94 / 0.84)   1.36 (1.52 / 1.36)
//     float32   0.41 (0.88 / 0.69)   0.45 (1.64 / 1.20)   0.96 (1.99 / 1.50)   1.66 (2.72 / 2.16)   2.99 (3.81 / 3.11)
//     float16   0.34 (0.29 / 0.24)   0.33 (0.97 / 0.72)   0.77 (3.09 / 2.48)   1.32 (5.95 / 4.76)   2.69 (11.8 / 9.42)
//     float16, N = 512: 18.2 (99 / -, and 18.4 by two products in float32)
//   Xeon with AMX, AVX-512 BF16 and FP16, before totals were taken four at a time (which saved a fifth of N = 16)
//     bfloat16  0.47 (0.79 / 0.85)   0.65 (0.67 / 0.67)   1.48 (0.70 / 0.85)
//     float32   0.72 (0.83 / 0.68)   0.80 (1.52 / 1.16)   1.39 (1.85 / 1.52)
//     float16   0.43 (0.88 / 0.71)   0.76 (1.24 / 1.21)   1.95 (1.92 / 1.88)
//
// No difference: tokens packed chunk by chunk; tiles of six tokens; to fetch farther ahead, or not at all. One row at a time
// for one token: 0.18 instead of 0.25 in 16 bit, but slower at 4096 x 4096 and in float32.
#include "numbers.h"

#ifdef __clang__
#pragma clang fp contract(fast)
#else
#pragma GCC optimize("fp-contract=fast")
#endif

// Tiles of sums that fit the registers: 32 of 512 bits, or 16 of 256.
#ifdef __AVX512F__
constexpr int ROWS = 4, TOKENS = 4;
#else
constexpr int ROWS = 4, TOKENS = 2;
#endif
constexpr long AHEAD = 512;              // bytes to fetch ahead of a row's next read
constexpr long THREAD_BYTES = 64 * 1024; // of weights: with less to read, another thread costs more than it saves

// sums[b][a] = sum over n of w[a] x[b], for R rows and B tokens. FETCH: the rows are read for the first time.
template <class K, int R, int B, bool FETCH>
void tile(const typename K::Stored *w, const typename K::Stored *x, long n, float sums[TOKENS][ROWS]) {
  Floats wide[R][B] = {};
  long i = 0;
  for (; i + K::WIDTH <= n; i += K::WIDTH) {
    typename K::Vector rows[R];
    for (int a = 0; a < R; a++) {
      rows[a] = K::load(w + a * n + i);
      if (FETCH)
        __builtin_prefetch((const char *)(w + a * n + i) + AHEAD);
    }
    for (int b = 0; b < B; b++) {
      typename K::Vector token = K::load(x + b * n + i);
      for (int a = 0; a < R; a++)
        K::add_product(wide[a][b], rows[a], token);
    }
  }
  for (int b = 0; b < B; b++) {
#ifdef __AVX__
    if (R == 4)
      _mm_storeu_ps(sums[b], totals(wide[0][b], wide[1 % R][b], wide[2 % R][b], wide[3 % R][b]));
    else
#endif
      for (int a = 0; a < R; a++)
        sums[b][a] = total(wide[a][b]);
    for (int a = 0; a < R; a++)
      for (long j = i; j < n; j++)
        sums[b][a] += K::widen(w[a * n + j]) * K::widen(x[b * n + j]);
  }
}

template <class K, int R, bool FETCH>
void any_tile(long tokens, const typename K::Stored *w, const typename K::Stored *x, long n,
              float sums[TOKENS][ROWS]) {
  switch (tokens) {
  case 1:
    return tile<K, R, 1, FETCH>(w, x, n, sums);
  case 2:
    return tile<K, R, 2, FETCH>(w, x, n, sums);
#ifdef __AVX512F__
  case 3:
    return tile<K, R, 3, FETCH>(w, x, n, sums);
  default:
    return tile<K, R, 4, FETCH>(w, x, n, sums);
#endif
  }
}

// put(row, token, sum) for this thread's share of the m rows of w.
template <class K, class Put>
void product(const typename K::Stored *w, const typename K::Stored *x, long N, long m, long n, Put put) {
  long threads = omp_get_num_threads(), tiles = (m + ROWS - 1) / ROWS;
  long share = (tiles + threads - 1) / threads * ROWS, begin = share * omp_get_thread_num();
  long end = std::min(m, begin + share), step;
  float sums[TOKENS][ROWS];
  for (long row = begin; row < end; row += step) {
    step = end - row < ROWS ? 1 : ROWS;
    for (long t = 0; t < N; t += TOKENS) {
      long tokens = std::min<long>(TOKENS, N - t);
      auto compute = step == 1 ? any_tile<K, 1, false> : t ? any_tile<K, ROWS, false> : any_tile<K, ROWS, true>;
      compute(tokens, w + row * n, x + t * n, n, sums);
      for (int b = 0; b < tokens; b++)
        for (int a = 0; a < step; a++)
          put(row + a, t + b, sums[b][a]);
    }
  }
}

template <class K>
int few_tokens(const void *x_, const void *pivot_rows_, const void *coefficients_, const int32_t *order,
               const void *bias_, void *y_, long N, long m, long n, long r, long threads) {
  typedef typename K::Stored T;
  const T *x = (const T *)x_, *bias = (const T *)bias_;
  T *y = (T *)y_;
  for (long i = 0; i < m; i++)
    if (order[i] < 0 || order[i] >= m)
      return 1; // nothing may be written there
  auto write = [=](long place, long t, float v) {
    long j = order[place];
    y[t * m + j] = K::round(bias ? v + K::widen(bias[j]) : v);
  };
  std::unique_ptr<T[]> y_p(new T[N * r]);
  long useful = (r * (m + n - r)) * long(sizeof(T)) / THREAD_BYTES;
#pragma omp parallel num_threads(int(std::max(1L, std::min(threads, useful))))
  {
    product<K>((const T *)pivot_rows_, x, N, r, n, [&](long i, long t, float sum) {
      T rounded = y_p[t * r + i] = K::round(sum);
      write(i, t, K::widen(rounded));
    });
#pragma omp barrier
    product<K>((const T *)coefficients_, y_p.get(), N, m - r, r,
               [&](long i, long t, float sum) { write(r + i, t, K::widen(K::round(sum))); });
  }
  return 0;
}

#ifndef HAS_FLOAT16
struct Float16 : Float32 {}; // never asked for
#endif

// KIND is one of the three. One at a time, as compiling takes a second and a half for each.
extern "C" int factored_layer(const void *x, const void *pivot_rows, const void *coefficients, const int32_t *order,
                              const void *bias, void *y, long N, long m, long n, long r, long threads) {
  return few_tokens<KIND>(x, pivot_rows, coefficients, order, bias, y, N, m, n, r, threads);
}
