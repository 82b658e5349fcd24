// From offsets and logits to corner indices and corner weights, and the vector types all kernels share.
#pragma once
#include <math.h>
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
#if defined(__clang__)
#define INDEPENDENT _Pragma("clang loop vectorize(enable)")
#else
#define INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace MSDA_NS {

constexpr int LANES = MSDA_LANES;
constexpr int MAX_SAMPLES = MSDA_MAX_SAMPLES;

typedef float floats __attribute__((vector_size(MSDA_LANES * 4), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(MSDA_LANES * 2), aligned(2), may_alias));
typedef uint32_t words __attribute__((vector_size(MSDA_LANES * 4), aligned(4), may_alias));
typedef uint16_t bfloat16;

INLINE floats load(const float* p) { return *(const floats*)p; }
INLINE floats load(const bfloat16* p) {
  words u = __builtin_convertvector(*(const halves*)p, words) << 16;
  floats f;
  memcpy(&f, &u, sizeof f);
  return f;
}
INLINE float load_one(const float* p) { return *p; }
INLINE float load_one(const bfloat16* p) {
  uint32_t u = (uint32_t)*p << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
INLINE void store_one(float* p, float f) { *p = f; }
INLINE void store_one(bfloat16* p, float f) {  // round to nearest even; NaN stays NaN
  uint32_t u;
  memcpy(&u, &f, 4);
  *p = f != f ? (bfloat16)0x7fc0 : (bfloat16)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
template <typename T>
INLINE void store_row(T* __restrict to, const float* __restrict from, int64_t n) {
  INDEPENDENT
  for (int64_t i = 0; i < n; i++) store_one(to + i, from[i]);
}

// `n` numbers as floats: where they lie, or widened into `buffer`.
INLINE const float* widened(const void* base, int bf16, int64_t offset, int n, float* __restrict buffer) {
  if (!bf16) return (const float*)base + offset;
  const bfloat16* p = (const bfloat16*)base + offset;
  INDEPENDENT
  for (int i = 0; i < n; i++) buffer[i] = load_one(p + i);
  return buffer;
}

// One row of the tables below for each (level, point).
struct Geometry {
  int levels, points, samples;
  float width[MAX_SAMPLES], height[MAX_SAMPLES];
  int32_t columns[MAX_SAMPLES], rows[MAX_SAMPLES], start[MAX_SAMPLES];
  float half_pixel[MAX_SAMPLES], one[MAX_SAMPLES];
};

static inline void describe(Geometry& g, const msda_call* c) {
  g.levels = c->L; g.points = c->P; g.samples = c->L * c->P;
  int64_t start = 0;
  for (int l = 0, i = 0; l < c->L; l++) {
    const int64_t h = c->shapes[2 * l], w = c->shapes[2 * l + 1];
    for (int p = 0; p < c->P; p++, i++) {
      g.width[i] = (float)w; g.height[i] = (float)h;
      g.columns[i] = (int32_t)w; g.rows[i] = (int32_t)h; g.start[i] = (int32_t)start;
      g.half_pixel[i] = -0.5f; g.one[i] = 1.f;
    }
    start += h * w;
  }
}

// Where offsets count from and what one of them is worth, in pixels: x = x0 + offset * dx.
struct Frame { const float *x0, *y0, *dx, *dy; };

// Frames of queries that share a block: 2 or 4 rows of `samples` floats each.
constexpr int FRAME_FLOATS = 16384;
INLINE int frame_rows(int reference_size) { return reference_size == 4 ? 4 : 2; }

INLINE Frame frame_of(const Geometry& g, const float* reference, int size, float* __restrict room) {
  if (!size) return {g.half_pixel, g.half_pixel, g.width, g.height};
  float *x0 = room, *y0 = room + g.samples, *dx = room + 2 * g.samples, *dy = room + 3 * g.samples;
  for (int l = 0, i = 0; l < g.levels; l++) {
    const float *r = reference + l * size, w = g.width[i], h = g.height[i];
    const float x = r[0] * w - 0.5f, y = r[1] * h - 0.5f;
    for (int p = 0; p < g.points; p++) { x0[i + p] = x; y0[i + p] = y; }
    if (size == 4) {
      const float u = r[2] * w * 0.5f / g.points, v = r[3] * h * 0.5f / g.points;
      for (int p = 0; p < g.points; p++) { dx[i + p] = u; dy[i + p] = v; }
    }
    i += g.points;
  }
  return size == 4 ? Frame{x0, y0, dx, dy} : Frame{x0, y0, g.one, g.one};
}

// exp for x <= 0, about 2 ulp (Cephes' polynomial); NaN stays NaN.
INLINE float exp_negative(float x) {
  x = x < -87.f ? -87.f : x;
  const float n = floorf(x * 1.44269504088896341f + 0.5f);
  float r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f; p = p * r + 8.3334519073e-3f; p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f; p = p * r + 5.0000001201e-1f; p = p * r * r + r + 1.0f;
  const uint32_t e = (uint32_t)((int32_t)(n == n ? n : 0.f) + 127) << 23;
  float scale;
  memcpy(&scale, &e, 4);
  return p * scale;
}

// exp(logits - max) into `weights`; returns 1 / their sum, by which the caller scales what it has summed.
template <int SAMPLES>
INLINE float softmax(const float* __restrict logits, float* __restrict weights, int samples) {
  const int n = SAMPLES ? SAMPLES : samples;
  float top = logits[0], sum = 0.f;
  for (int i = 1; i < n; i++) top = logits[i] > top ? logits[i] : top;
  for (int i = 0; i < n; i++) weights[i] = exp_negative(logits[i] - top);
  for (int i = 0; i < n; i++) sum += weights[i];
  return 1.f / sum;
}

// The four pixels around each sample and their bilinear weights times its attention weight. Indices are always in
// range: a pixel outside the map, or a location that is not finite, has weight zero instead of a branch.
struct Corners {
  alignas(64) int32_t index[4][MAX_SAMPLES];
  alignas(64) float weight[4][MAX_SAMPLES];
};

template <int SAMPLES>
INLINE void find_corners(const Geometry& g, const Frame& f, const float* __restrict offsets,
                         const float* __restrict weights, Corners& c) {
  const int n = SAMPLES ? SAMPLES : g.samples;
  const float *__restrict fx = f.x0, *__restrict fy = f.y0, *__restrict dx = f.dx, *__restrict dy = f.dy;
  INDEPENDENT
  for (int i = 0; i < n; i++) {
    float x = fx[i] + offsets[2 * i] * dx[i], y = fy[i] + offsets[2 * i + 1] * dy[i];
    const int in = (x > -1.f) & (y > -1.f) & (x < g.width[i]) & (y < g.height[i]);
    x = in ? x : 0.f; y = in ? y : 0.f;
    const float a = in ? weights[i] : 0.f;
    const float left = floorf(x), top = floorf(y);
    int x0 = (int)left, y0 = (int)top, x1 = x0 + 1, y1 = y0 + 1;
    float wx1 = x - left, wy1 = y - top;
    float wx0 = x0 >= 0 ? 1.f - wx1 : 0.f, wy0 = y0 >= 0 ? 1.f - wy1 : 0.f;
    wx1 = x1 < g.columns[i] ? wx1 : 0.f; wy1 = y1 < g.rows[i] ? wy1 : 0.f;
    x0 = x0 < 0 ? 0 : x0; y0 = y0 < 0 ? 0 : y0;
    x1 = x1 < g.columns[i] ? x1 : g.columns[i] - 1; y1 = y1 < g.rows[i] ? y1 : g.rows[i] - 1;
    const int r0 = g.start[i] + y0 * g.columns[i], r1 = g.start[i] + y1 * g.columns[i];
    wy0 *= a; wy1 *= a;
    c.index[0][i] = r0 + x0; c.index[1][i] = r0 + x1; c.index[2][i] = r1 + x0; c.index[3][i] = r1 + x1;
    c.weight[0][i] = wy0 * wx0; c.weight[1][i] = wy0 * wx1; c.weight[2][i] = wy1 * wx0; c.weight[3][i] = wy1 * wx1;
  }
}

}  // namespace MSDA_NS
