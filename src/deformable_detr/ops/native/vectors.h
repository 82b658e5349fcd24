// Vectors of the instruction set's width, as GNU vector extensions (GCC and Clang, any processor).
#pragma once
#include <stdint.h>
#include <string.h>
#include "call.h"

#if defined(__AVX512F__)
#define MSDA_LANES 16
#elif defined(__AVX__)
#define MSDA_LANES 8
#else
#define MSDA_LANES 4
#endif
#define INLINE static inline __attribute__((always_inline))
#define SHUFFLE __builtin_shufflevector

namespace MSDA_NS {

constexpr int LANES = MSDA_LANES;
constexpr int MAX_SAMPLES = MSDA_MAX_SAMPLES;
constexpr int MAX_CHANNELS = MSDA_MAX_CHANNELS;
INLINE int whole_vectors(int n) { return (n + LANES - 1) / LANES * LANES; }

typedef float floats __attribute__((vector_size(MSDA_LANES * 4), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(MSDA_LANES * 4), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(MSDA_LANES * 4), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(MSDA_LANES * 2), aligned(2), may_alias));
typedef uint16_t bfloat16;

INLINE floats all(float f) { return floats{} + f; }
INLINE floats load(const float* p) { return *(const floats*)p; }
INLINE ints load(const int32_t* p) { return *(const ints*)p; }
INLINE floats load(const bfloat16* p) {
  const words u = __builtin_convertvector(*(const halves*)p, words) << 16;
  return (floats)u;
}
INLINE void store(float* p, floats f) { *(floats*)p = f; }
INLINE void store(int32_t* p, ints i) { *(ints*)p = i; }
INLINE void store(bfloat16* p, floats f) {  // round to nearest even; NaN stays NaN
  const words u = (words)f;
  const words rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const words nan = (words)(f != f);
  *(halves*)p = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), halves);
}
INLINE float load_one(const float* p) { return *p; }
INLINE float load_one(const bfloat16* p) {
  const uint32_t u = (uint32_t)*p << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
INLINE void store_one(float* p, float f) { *p = f; }
INLINE void store_one(bfloat16* p, float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  *p = f != f ? (bfloat16)0x7fc0 : (bfloat16)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// Convert n numbers to or from floats; neither array needs padding.
template <typename T>
INLINE void widen(float* __restrict to, const T* __restrict from, int64_t n) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(to + i, load(from + i));
  for (; i < n; i++) to[i] = load_one(from + i);
}
template <typename T>
INLINE void narrow(T* __restrict to, const float* __restrict from, int64_t n) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(to + i, load(from + i));
  for (; i < n; i++) store_one(to + i, from[i]);
}
INLINE void narrow(void* base, int bf16, int64_t at, const float* from, int n) {
  if (bf16) narrow((bfloat16*)base + at, from, n);
  else narrow((float*)base + at, from, n);
}

// `n` numbers, then `fill` up to `whole`: in place if nothing has to be added or converted, else copied to `room`.
INLINE const float* padded(const void* base, int bf16, int64_t at, int n, int whole, float fill,
                           float* __restrict room) {
  if (!bf16 && n == whole) return (const float*)base + at;
  if (bf16) widen(room, (const bfloat16*)base + at, n);
  else widen(room, (const float*)base + at, n);
  for (int i = n; i < whole; i++) room[i] = fill;
  return room;
}

#if MSDA_LANES == 16
#define TWO_OF(a, b, EVEN) SHUFFLE(a, b, EVEN, EVEN + 2, EVEN + 4, EVEN + 6, EVEN + 8, EVEN + 10, EVEN + 12, \
  EVEN + 14, EVEN + 16, EVEN + 18, EVEN + 20, EVEN + 22, EVEN + 24, EVEN + 26, EVEN + 28, EVEN + 30)
#define FIRST_TWO(a, b) SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define LAST_TWO(a, b) SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#elif MSDA_LANES == 8
#define TWO_OF(a, b, EVEN) SHUFFLE(a, b, EVEN, EVEN + 2, EVEN + 4, EVEN + 6, EVEN + 8, EVEN + 10, EVEN + 12, EVEN + 14)
#define FIRST_TWO(a, b) SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define LAST_TWO(a, b) SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#else
#define TWO_OF(a, b, EVEN) SHUFFLE(a, b, EVEN, EVEN + 2, EVEN + 4, EVEN + 6)
#define FIRST_TWO(a, b) SHUFFLE(a, b, 0, 4, 1, 5)
#define LAST_TWO(a, b) SHUFFLE(a, b, 2, 6, 3, 7)
#endif
INLINE floats firsts(floats a, floats b) { return TWO_OF(a, b, 0); }   // x of x0 y0 x1 y1 …
INLINE floats seconds(floats a, floats b) { return TWO_OF(a, b, 1); }
INLINE void interleave(float* to, floats x, floats y) {
  store(to, FIRST_TWO(x, y));
  store(to + LANES, LAST_TWO(x, y));
}

INLINE float sum(floats f) {
#if MSDA_LANES == 16
  f += SHUFFLE(f, f, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  f += SHUFFLE(f, f, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3);
#elif MSDA_LANES == 8
  f += SHUFFLE(f, f, 4, 5, 6, 7, 0, 1, 2, 3);
#endif
  return (f[0] + f[2]) + (f[1] + f[3]);
}
INLINE floats larger(floats a, floats b) { return a > b ? a : b; }   // b where a is NaN
INLINE floats smaller(floats a, floats b) { return a < b ? a : b; }
INLINE float largest(floats f) {
#if MSDA_LANES == 16
  f = larger(f, SHUFFLE(f, f, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  f = larger(f, SHUFFLE(f, f, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3));
#elif MSDA_LANES == 8
  f = larger(f, SHUFFLE(f, f, 4, 5, 6, 7, 0, 1, 2, 3));
#endif
  const float a = f[0] > f[1] ? f[0] : f[1], b = f[2] > f[3] ? f[2] : f[3];
  return a > b ? a : b;
}

// The sums of four vectors, side by side.
INLINE void sums_of_four(floats a, floats b, floats c, floats d, float* out) {
#if MSDA_LANES == 16
#define HALVES(a, b)                                                            \
  (SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +      \
   SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
  const floats s = HALVES(a, b), t = HALVES(c, d);
  floats u = SHUFFLE(s, t, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
             SHUFFLE(s, t, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  u += SHUFFLE(u, u, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  u += SHUFFLE(u, u, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  typedef float four __attribute__((vector_size(16), aligned(4), may_alias));
  *(four*)out = SHUFFLE(u, u, 0, 4, 8, 12);
#elif MSDA_LANES == 8
#define HALVES(a, b) (SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15))
  const floats s = HALVES(a, b), t = HALVES(c, d);
  floats u = SHUFFLE(s, t, 0, 1, 4, 5, 8, 9, 12, 13) + SHUFFLE(s, t, 2, 3, 6, 7, 10, 11, 14, 15);
  u += SHUFFLE(u, u, 1, 0, 3, 2, 5, 4, 7, 6);
  out[0] = u[0]; out[1] = u[2]; out[2] = u[4]; out[3] = u[6];
#else
  const floats s = SHUFFLE(a, b, 0, 1, 4, 5) + SHUFFLE(a, b, 2, 3, 6, 7);
  const floats t = SHUFFLE(c, d, 0, 1, 4, 5) + SHUFFLE(c, d, 2, 3, 6, 7);
  store(out, SHUFFLE(s, t, 0, 2, 4, 6) + SHUFFLE(s, t, 1, 3, 5, 7));
#endif
}

// exp for x <= 0, about 2 ulp (Cephes' polynomial); NaN stays NaN.
INLINE floats exp_negative(floats x) {
  x = x < -87.f ? all(-87.f) : x;
  const floats t = 0.5f - x * 1.44269504088896341f;        // positive: truncation rounds
  const ints n = __builtin_convertvector(t == t ? t : all(0.f), ints);
  const floats f = __builtin_convertvector(n, floats);
  floats r = x + f * 0.693359375f;
  r = r + f * -2.12194440e-4f;
  floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f; p = p * r + 4.1665795894e-2f; p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f; p = p * r * r + r + 1.0f;
  return p * (floats)((127 - n) << 23);
}

}  // namespace MSDA_NS
