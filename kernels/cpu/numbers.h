// Numbers as they are stored, and vectors of them as they are multiplied: in float32, whatever they are stored as.
//
// GNU vector extensions, so that GCC and Clang make of them what the processor has; intrinsics only where a processor
// has an instruction that the extensions cannot name. Rounding is to nearest, ties to even.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <omp.h>

#ifdef __AVX__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Shorts __attribute__((vector_size(2 * LANES)));

template <class To> inline To read(const void *from) {
  To to;
  memcpy(&to, from, sizeof to);
  return to;
}

inline float total(Floats v) {
  float parts[LANES];
  memcpy(parts, &v, sizeof parts);
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++)
      parts[i] += parts[i + half];
  return parts[0];
}

#ifdef __AVX__
// The totals of four vectors: a few instructions for each, where one alone takes a chain of them.
inline __m128 totals(Floats a, Floats b, Floats c, Floats d) {
  auto half = [](Floats v) {
#ifdef __AVX512F__
    return _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm256_castpd_ps(_mm512_extractf64x4_pd((__m512d)v, 1)));
#else
    return (__m256)v;
#endif
  };
  __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(half(a), half(b)), _mm256_hadd_ps(half(c), half(d)));
  return _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
}
#endif

struct Float32 {
  typedef float Stored;
  typedef Floats Vector;
  static constexpr int WIDTH = LANES;
  static Vector load(const Stored *from) { return read<Floats>(from); }
  static void add_product(Floats &sum, Vector a, Vector b) { sum += a * b; }
  static float widen(Stored v) { return v; }
  static Stored round(float v) { return v; }
  static void round_four(const float *from, Stored *to) { memcpy(to, from, 4 * sizeof *to); }
};

struct Bfloat16 {
  typedef uint16_t Stored;
#ifdef __AVX512BF16__ // sums of two products at a time, exact before they are added
  typedef __m512bh Vector;
  static constexpr int WIDTH = 32;
  static Vector load(const Stored *from) { return (__m512bh)_mm512_loadu_si512(from); }
  static void add_product(Floats &sum, Vector a, Vector b) { sum = (Floats)_mm512_dpbf16_ps((__m512)sum, a, b); }
#else
  typedef Floats Vector;
  static constexpr int WIDTH = LANES;
  static Vector load(const Stored *from) {
    Words words = __builtin_convertvector(read<Shorts>(from), Words) << 16;
    return read<Floats>(&words);
  }
  static void add_product(Floats &sum, Vector a, Vector b) { sum += a * b; }
#endif
  static float widen(Stored v) {
    uint32_t word = uint32_t(v) << 16;
    return read<float>(&word);
  }
  static Stored round(float v) {
    uint32_t word = read<uint32_t>(&v);
    bool nan = (word & 0x7fffffff) > 0x7f800000; // by its bits: the compiler may be told that there are none
    return nan ? 0x7fc0 : (word + 0x7fff + (word >> 16 & 1)) >> 16;
  }
  static void round_four(const float *from, Stored *to) {
    typedef uint32_t Four __attribute__((vector_size(16)));
    typedef uint16_t FourShorts __attribute__((vector_size(8)));
    Four words = read<Four>(from), nan = (Four)((words & 0x7fffffff) > 0x7f800000);
    Four rounded = (words + 0x7fff + (words >> 16 & 1)) >> 16;
    FourShorts shorts = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), FourShorts);
    memcpy(to, &shorts, sizeof shorts);
  }
};

#if defined(__AVX512F__) || defined(__F16C__)
#define HAS_FLOAT16
struct Float16 {
  typedef uint16_t Stored;
  typedef Floats Vector;
  static constexpr int WIDTH = LANES;
  static Vector load(const Stored *from) {
#ifdef __AVX512F__
    return (Floats)_mm512_cvtph_ps(read<__m256i>(from));
#else
    return (Floats)_mm256_cvtph_ps(read<__m128i>(from));
#endif
  }
  static void add_product(Floats &sum, Vector a, Vector b) { sum += a * b; }
  static float widen(Stored v) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(v))); }
  static Stored round(float v) {
    return _mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(v), _MM_FROUND_TO_NEAREST_INT));
  }
  static void round_four(const float *from, Stored *to) {
    _mm_storel_epi64((__m128i *)to, _mm_cvtps_ph(_mm_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT));
  }
};
#endif
