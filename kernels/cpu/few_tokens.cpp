// A factored layer on few tokens: both products, order and bias in one call.
//
//   y_p = x pivot_rows^T (rounded);  y_np = y_p coefficients^T;  y[order] = [y_p, y_np] + bias
//
// m = out_features, n = in_features, r = rank, N = number of tokens. With few tokens a layer is one read of its weights,
// and that is what the loops are made for: every thread reads rows side by side, ROWS at a time, multiplies them with all
// tokens, TOKENS at a time, and meanwhile fetches the next rows, so that memory is never idle. Threads meet once, between
// the products.
//
// 2048 x 2048, r = 1024, weights from memory, two threads, ms a layer, N = 1 / 4 / 16 / 32 / 64; in brackets a dense layer
// of oneDNN / two of its products, without the gather they need; in square brackets the same of packed weights:
//
//   EPYC with AVX-512 BF16, without AMX and AVX-512 FP16
//     bfloat16  0.22 (0.47 / 0.39) [0.45 / 0.34]   0.22 (0.50 / 0.43) [0.38 / 0.30]   0.37 (0.69 / 0.61) [0.44 / 0.36]
//               0.54 (0.94 / 0.76) [0.76 / 0.60]   1.16 (1.59 / 1.24) [1.50 / 1.08]
//     float32   0.44 (1.29 / 0.92) [0.80 / 0.63]   0.39 (1.83 / 1.27) [0.67 / 0.49]   0.86 (2.20 / 1.58) [0.91 / 0.69]
//               1.50 (3.31 / 2.39) [1.45 / 1.10]   2.83 (4.16 / 3.08) [2.82 / 2.07]
//     float16   0.19 (0.27 / 0.20)   0.21 (1.01 / 0.70)   0.62 (3.10 / 2.44)   1.16 (6.03 / 4.68)
//     packed, as compiled by Inductor, which has MKL pack float32: N = 96, of dense, bfloat16 0.85 (by two products 0.80),
//     float32 0.73 (0.79); 4096 x 4096, bfloat16, N = 8 / 16 / 32, ms: 1.14 (1.18), 1.56 (1.56), 2.53 (2.28)
//     of layers that caches hold, in float32, N = 16 / 32 / 64, us: 256 x 256 57 / 104 / 157 (two products 59 / 68 / 107),
//     1024 x 1024 292 / 499 / 786 (451 / 558 / 794)
//     float16, N = 512: 18.2 (99 / -, and 18.4 by two products in float32), before the next rows were fetched
//   Xeon with AMX, AVX-512 BF16 and FP16, N = 1 / 4 / 16, before the next rows were fetched (which saved a quarter on the
//   EPYC) and totals taken four at a time (a fifth of N = 16)
//     bfloat16  0.47 (0.79 / 0.85)   0.65 (0.67 / 0.67)   1.48 (0.70 / 0.85)
//     float32   0.72 (0.83 / 0.68)   0.80 (1.52 / 1.16)   1.39 (1.85 / 1.52)
//     float16   0.43 (0.88 / 0.71)   0.76 (1.24 / 1.21)   1.95 (1.92 / 1.88)
//
// No difference: rows in chunks that leave room for the tokens in the nearest cache; tokens packed, or kept off each
// other's sets; tiles of six tokens, or of eight rows and three; all sixteen totals at once. Numbers put in their
// places tile by tile instead of share by share: a tenth slower.
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
constexpr long THREAD_BYTES = 64 * 1024; // of weights: with less to read, another thread costs more than it saves

// sums[b][a] = sum over n of w[a] x[b], for R rows and B tokens, while FETCH times n numbers at ``ahead`` are fetched.
template <class K, int R, int B, int FETCH>
void tile(const typename K::Stored *w, const typename K::Stored *x, long n, const typename K::Stored *ahead,
          float sums[TOKENS][ROWS]) {
  Floats wide[R][B] = {};
  long i = 0;
  for (; i + K::WIDTH <= n; i += K::WIDTH) {
    typename K::Vector rows[R];
    for (int a = 0; a < R; a++)
      rows[a] = K::load(w + a * n + i);
    for (int a = 0; a < FETCH; a++)
      __builtin_prefetch(ahead + FETCH * i + a * K::WIDTH, 0, 2); // not the nearest cache: that is full of tokens
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

template <class K, int R, int FETCH>
void any_tile(long tokens, const typename K::Stored *w, const typename K::Stored *x, long n,
              const typename K::Stored *ahead, float sums[TOKENS][ROWS]) {
  switch (tokens) {
  case 1:
    return tile<K, R, 1, FETCH>(w, x, n, ahead, sums);
  case 2:
    return tile<K, R, 2, FETCH>(w, x, n, ahead, sums);
#ifdef __AVX512F__
  case 3:
    return tile<K, R, 3, FETCH>(w, x, n, ahead, sums);
  default:
    return tile<K, R, 4, FETCH>(w, x, n, ahead, sums);
#endif
  }
}

struct Share { // of m rows, for this thread
  long begin, end;
  explicit Share(long m) {
    long threads = omp_get_num_threads(), tiles = (m + ROWS - 1) / ROWS;
    long rows = (tiles + threads - 1) / threads * ROWS;
    begin = std::min(m, rows * omp_get_thread_num()), end = std::min(m, begin + rows);
  }
};

// y[t][row] = w[row] x[t] for a share of the m rows.
template <class K>
void product(const typename K::Stored *w, const typename K::Stored *x, long N, long m, long n, Share share,
             typename K::Stored *y) {
  long passes = (N + TOKENS - 1) / TOKENS, row = share.begin;
  auto compute = passes == 1 ? any_tile<K, ROWS, 4> : passes < 4 ? any_tile<K, ROWS, 2> : any_tile<K, ROWS, 1>;
  float sums[TOKENS][ROWS];
  for (; row + ROWS <= share.end; row += ROWS) {
    const typename K::Stored *next = w + (row + ROWS) * n;
    for (long pass = 0, t = 0; pass < passes; pass++, t += TOKENS) {
      long tokens = std::min<long>(TOKENS, N - t);
      compute(tokens, w + row * n, x + t * n, n, next + ROWS * n * pass / passes, sums);
      for (long b = 0; b < tokens; b++)
        K::round_four(sums[b], y + (t + b) * m + row);
    }
  }
  for (; row < share.end; row++)
    for (long t = 0; t < N; t += TOKENS) {
      long tokens = std::min<long>(TOKENS, N - t);
      any_tile<K, 1, 0>(tokens, w + row * n, x + t * n, n, nullptr, sums);
      for (long b = 0; b < tokens; b++)
        y[(t + b) * m + row] = K::round(sums[b][0]);
    }
}

template <class K>
int few_tokens(const void *x_, const void *pivot_rows_, const void *coefficients_, const int32_t *order,
               const void *bias_, void *y_, long N, long m, long n, long r, long threads) {
  typedef typename K::Stored T;
  const T *x = (const T *)x_, *pivot_rows = (const T *)pivot_rows_, *coefficients = (const T *)coefficients_;
  const T *bias = (const T *)bias_;
  T *y = (T *)y_;
  for (long i = 0; i < m; i++)
    if (order[i] < 0 || order[i] >= m)
      return 1; // nothing may be written there
  // A share of a part goes where it belongs when it is whole. In tiles, N of them would fall on the same few sets of the
  // cache, as rows of y are often a power of two apart.
  auto put = [=](const T *part, long width, Share share, const int32_t *order) {
    for (long t = 0; t < N; t++)
      for (long i = share.begin; i < share.end; i++) {
        T v = part[t * width + i];
        long j = order[i];
        y[t * m + j] = bias ? K::round(K::widen(v) + K::widen(bias[j])) : v;
      }
  };
  std::unique_ptr<T[]> y_p(new T[N * r]), y_np(new T[N * (m - r)]);
  long useful = (r * (m + n - r)) * long(sizeof(T)) / THREAD_BYTES;
#pragma omp parallel num_threads(int(std::max(1L, std::min(threads, useful))))
  {
    Share pivots(r), others(m - r);
    product<K>(pivot_rows, x, N, r, n, pivots, y_p.get());
    put(y_p.get(), r, pivots, order);
#pragma omp barrier
    product<K>(coefficients, y_p.get(), N, m - r, r, others, y_np.get());
    put(y_np.get(), m - r, others, order + r);
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
