// From offsets and logits to rows of values and their weights.
//
// Positions are in pixels of a map with a border of one pixel: pixel 0 of the map is at 1, so that truncating a clamped
// position is its floor. Tables are padded to whole vectors.
#pragma once
#include "vectors.h"

namespace MSDA_NS {

constexpr int BORDER = 3;  // columns (and rows) of zeros in the bordered layout: one before the map, two after

// One entry per (level, point).
struct Geometry {
  int levels, points, samples, vectors;        // vectors: `samples` in whole vectors
  int64_t bordered;                            // tokens of all levels with their borders
  alignas(64) float width[MAX_SAMPLES], height[MAX_SAMPLES];
  alignas(64) int32_t columns[MAX_SAMPLES], start[MAX_SAMPLES];      // plain layout (S, M, D)
  alignas(64) int32_t pitch[MAX_SAMPLES], bordered_start[MAX_SAMPLES];  // bordered layout
  alignas(64) float zero[MAX_SAMPLES], one[MAX_SAMPLES];
};

static inline void describe(Geometry& g, const msda_call* c) {
  memset(&g, 0, sizeof g);
  g.levels = c->L; g.points = c->P; g.samples = c->L * c->P; g.vectors = whole_vectors(g.samples);
  int64_t start = 0, bordered = 0;
  for (int l = 0, i = 0; l < c->L; l++) {
    const int64_t h = c->shapes[2 * l], w = c->shapes[2 * l + 1];
    for (int p = 0; p < c->P; p++, i++) {
      g.width[i] = (float)w; g.height[i] = (float)h; g.columns[i] = (int32_t)w; g.start[i] = (int32_t)start;
      g.pitch[i] = (int32_t)(w + BORDER); g.bordered_start[i] = (int32_t)bordered;
      g.one[i] = 1.f;
    }
    start += h * w;
    bordered += (h + BORDER) * (w + BORDER);
  }
  g.bordered = bordered;
}

// Origin of the offsets in 0..1 of the map, and their unit in pixels: x = x0 · width + offset · dx.
struct Frame { const float *x0, *y0, *dx, *dy; };

constexpr int FRAME_FLOATS = 16384;  // for the frames of a block of queries
INLINE int frame_rows(int reference_size) { return reference_size == 4 ? 4 : 2; }

INLINE Frame frame_of(const Geometry& g, const float* reference, int size, float* __restrict room) {
  if (!size) return {g.zero, g.zero, g.width, g.height};
  const int n = g.vectors;
  float *x0 = room, *y0 = room + n, *dx = room + 2 * n, *dy = room + 3 * n;
  for (int l = 0, i = 0; l < g.levels; l++, i += g.points) {
    const float *r = reference + l * size, w = g.width[i], h = g.height[i];
    for (int p = 0; p < g.points; p++) { x0[i + p] = r[0]; y0[i + p] = r[1]; }
    if (size == 4) {
      const float u = r[2] * w * 0.5f / g.points, v = r[3] * h * 0.5f / g.points;
      for (int p = 0; p < g.points; p++) { dx[i + p] = u; dy[i + p] = v; }
    }
  }
  for (int i = g.samples; i < n; i++) {
    x0[i] = y0[i] = 0.f;
    if (size == 4) dx[i] = dy[i] = 0.f;
  }
  return size == 4 ? Frame{x0, y0, dx, dy} : Frame{x0, y0, g.one, g.one};
}

// Write exp(logits - max) to `weights` and return 1 / their sum, by which the caller scales its result.
INLINE float softmax(const float* __restrict logits, float* __restrict weights, int vectors) {
  floats top = load(logits), total = floats{};
  for (int i = LANES; i < vectors; i += LANES) top = larger(load(logits + i), top);
  const float max = largest(top);
  for (int i = 0; i < vectors; i += LANES) {
    const floats e = exp_negative(load(logits + i) - max);
    store(weights + i, e);
    total += e;
  }
  return 1.f / sum(total);
}

// The rows that a query reads for one head, and their weights: bilinear × attention.
struct Taps {
  alignas(64) int32_t row[4][MAX_SAMPLES];    // bordered layout: only [0], the upper left pixel
  alignas(64) float weight[4][MAX_SAMPLES];
  // For gradients: position inside the pixel, and all ones where the location is near the map.
  alignas(64) float x[MAX_SAMPLES], y[MAX_SAMPLES];
  alignas(64) int32_t inside[MAX_SAMPLES];
  alignas(64) int32_t valid[4][MAX_SAMPLES];  // plain layout: whether the pixel is inside the map
};

// BORDERED: pixels outside the map are zeros in memory; else they are a valid index with weight zero. Far and NaN
// positions are clamped to the border, so no index is ever out of range.
template <bool BORDERED, bool GRADIENT>
INLINE void find_taps(const Geometry& g, const Frame& f, const float* __restrict offsets,
                      const float* __restrict weights, int scale, Taps& t) {
  for (int i = 0; i < g.vectors; i += LANES) {
    const floats even = load(offsets + 2 * i), odd = load(offsets + 2 * i + LANES);
    // Two fused steps, so that a position far from the origin is rounded once.
    const floats fx = load(f.x0 + i) * load(g.width + i) + (firsts(even, odd) * load(f.dx + i) + 0.5f);
    const floats fy = load(f.y0 + i) * load(g.height + i) + (seconds(even, odd) * load(f.dy + i) + 0.5f);
    const floats right = load(g.width + i) + 1.f, bottom = load(g.height + i) + 1.f, zero = floats{};
    const floats cx = smaller(larger(fx, zero), right), cy = smaller(larger(fy, zero), bottom);
    const ints x = __builtin_convertvector(cx, ints), y = __builtin_convertvector(cy, ints);
    const floats px = cx - __builtin_convertvector(x, floats), py = cy - __builtin_convertvector(y, floats);
    const floats lower = load(weights + i) * py, upper = load(weights + i) - lower;
    floats w1 = upper * px, w3 = lower * px, w0 = upper - w1, w2 = lower - w3;
    if (BORDERED) {
      store(t.row[0] + i, (load(g.bordered_start + i) + y * load(g.pitch + i) + x) * scale);
    } else {
      const ints columns = load(g.columns + i), last_x = columns - 1;
      const ints last_y = __builtin_convertvector(load(g.height + i), ints) - 1;
      const ints none = ints{};
      const ints left_in = (x > none) & (x <= columns), right_in = x <= last_x;
      const ints top_in = (y > none) & (y - 1 <= last_y), bottom_in = y <= last_y;
      const ints x0 = x - 1, y0 = y - 1;
      const ints xa = x0 < none ? none : (x0 > last_x ? last_x : x0), xb = x > last_x ? last_x : x;
      const ints ya = y0 < none ? none : (y0 > last_y ? last_y : y0), yb = y > last_y ? last_y : y;
      const ints a = load(g.start + i) + ya * columns, b = load(g.start + i) + yb * columns;
      store(t.row[0] + i, a + xa); store(t.row[1] + i, a + xb);
      store(t.row[2] + i, b + xa); store(t.row[3] + i, b + xb);
      const ints v0 = top_in & left_in, v1 = top_in & right_in, v2 = bottom_in & left_in, v3 = bottom_in & right_in;
      w0 = v0 ? w0 : zero; w1 = v1 ? w1 : zero; w2 = v2 ? w2 : zero; w3 = v3 ? w3 : zero;
      if (GRADIENT) {
        store(t.valid[0] + i, v0); store(t.valid[1] + i, v1); store(t.valid[2] + i, v2); store(t.valid[3] + i, v3);
      }
    }
    store(t.weight[0] + i, w0); store(t.weight[1] + i, w1); store(t.weight[2] + i, w2); store(t.weight[3] + i, w3);
    if (GRADIENT) {
      store(t.x + i, px); store(t.y + i, py);
      store(t.inside + i, (fx > zero) & (fx < right) & (fy > zero) & (fy < bottom));
    }
  }
}

// The given attention weights, or the softmax of the logits in `room`, still to be multiplied by `scale`.
INLINE const float* raw_weights(const msda_call* c, const Geometry& g, int64_t query, float* __restrict room,
                                float* __restrict buffer, float* scale) {
  const float fill = c->reference_size ? -__builtin_inff() : 0.f;
  const float* logits = padded(c->logits, c->logits_bf16, query * g.samples, g.samples, g.vectors, fill, buffer);
  *scale = 1.f;
  if (!c->reference_size) return logits;
  *scale = softmax(logits, room, g.vectors);
  return room;
}

// Prefetch `bytes` of each row of the plain layout for samples [first, last).
template <typename T>
INLINE void prefetch_rows(const T* value, int64_t row, const Taps& t, int first, int last, int64_t bytes) {
  for (int i = first; i < last; i++)
    for (int k = 0; k < 4; k++) {
      const char* p = (const char*)(value + t.row[k][i] * row);
      for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(p + line, 0, 1);
    }
}

}  // namespace MSDA_NS
