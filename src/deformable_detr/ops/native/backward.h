// Gradients of the weighted sums. One (head, level range) writes its own part of every result: no atomics, one order.
#pragma once
#include "layout.h"

namespace MSDA_NS {

// The four vectors' sums, side by side.
INLINE void sums_of_four(floats a, floats b, floats c, floats d, float* out) {
#if MSDA_LANES == 16
#define PAIR(a, b)                                                                                           \
  (__builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +                   \
   __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
  const floats s = PAIR(a, b), t = PAIR(c, d);
#undef PAIR
  floats u = __builtin_shufflevector(s, t, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
             __builtin_shufflevector(s, t, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  u += __builtin_shufflevector(u, u, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  u += __builtin_shufflevector(u, u, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  out[0] = u[0]; out[1] = u[4]; out[2] = u[8]; out[3] = u[12];
#elif MSDA_LANES == 8
#define PAIR(a, b)                                                 \
  (__builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11) +       \
   __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15))
  const floats s = PAIR(a, b), t = PAIR(c, d);
#undef PAIR
  floats u = __builtin_shufflevector(s, t, 0, 1, 4, 5, 8, 9, 12, 13) +
             __builtin_shufflevector(s, t, 2, 3, 6, 7, 10, 11, 14, 15);
  u += __builtin_shufflevector(u, u, 1, 0, 3, 2, 5, 4, 7, 6);
  out[0] = u[0]; out[1] = u[2]; out[2] = u[4]; out[3] = u[6];
#else
  const floats s = __builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7);
  const floats t = __builtin_shufflevector(c, d, 0, 1, 4, 5) + __builtin_shufflevector(c, d, 2, 3, 6, 7);
  *(floats*)out = __builtin_shufflevector(s, t, 0, 2, 4, 6) + __builtin_shufflevector(s, t, 1, 3, 5, 7);
#endif
}

struct Dots { alignas(64) float of[MAX_SAMPLES][4]; };  // output gradient · value at each corner

// `D` channels: gradient rows grow by weight × output gradient, dot products by output gradient · value.
template <int D, typename T>
INLINE void scatter_rows(const T* __restrict value, int64_t row, float* __restrict grad, int64_t grad_row,
                         const T* __restrict grad_output, const Corners& c, int first, int last, bool add, Dots& dots) {
  constexpr int N = D / LANES;
  floats G[N];
  for (int k = 0; k < N; k++) G[k] = load(grad_output + k * LANES);
  for (int i = first; i < last; i++) {
    floats dot[4];
    for (int corner = 0; corner < 4; corner++) {
      const int64_t index = c.index[corner][i];
      const T* v = value + index * row;
      float* to = grad + index * grad_row;
      const float w = c.weight[corner][i];
      dot[corner] = floats{};
      for (int k = 0; k < N; k++) {
        dot[corner] += G[k] * load(v + k * LANES);
        *(floats*)(to + k * LANES) = load(to + k * LANES) + w * G[k];
      }
    }
    alignas(16) float sums[4];
    sums_of_four(dot[0], dot[1], dot[2], dot[3], sums);
    for (int k = 0; k < 4; k++) dots.of[i][k] = add ? dots.of[i][k] + sums[k] : sums[k];
  }
}

template <typename T>
static void scatter_tail(const T* value, int64_t row, float* grad, int64_t grad_row, const T* grad_output,
                         const Corners& c, int first, int last, bool add, Dots& dots, int D) {
  for (int i = first; i < last; i++)
    for (int k = 0; k < 4; k++) {
      const int64_t index = c.index[k][i];
      float dot = add ? dots.of[i][k] : 0.f;
      for (int d = 0; d < D; d++) {
        const float G = load_one(grad_output + d);
        dot += G * load_one(value + index * row + d);
        grad[index * grad_row + d] += c.weight[k][i] * G;
      }
      dots.of[i][k] = dot;
    }
}

template <typename T>
INLINE void scatter_any(const T* value, int64_t row, float* grad, int64_t grad_row, const T* G, const Corners& c,
                        int first, int last, Dots& dots, int D) {
  if (D == 32) return scatter_rows<32>(value, row, grad, grad_row, G, c, first, last, false, dots);
  int d = 0;
  for (; d + 64 <= D; d += 64)
    scatter_rows<64>(value + d, row, grad + d, grad_row, G + d, c, first, last, d > 0, dots);
  for (; d + 16 <= D; d += 16)
    scatter_rows<16>(value + d, row, grad + d, grad_row, G + d, c, first, last, d > 0, dots);
  for (; d + LANES <= D; d += LANES)
    scatter_rows<LANES>(value + d, row, grad + d, grad_row, G + d, c, first, last, d > 0, dots);
  if (d < D) scatter_tail(value + d, row, grad + d, grad_row, G + d, c, first, last, d > 0, dots, D - d);
}

// From corner dot products to d/d attention weight, and d/d x, d/d y in pixels (both times the attention weight).
INLINE void sample_gradients(const Geometry& g, const Frame& f, const float* __restrict offsets,
                             const float* __restrict weights, const Dots& dots, int first, int last,
                             float* __restrict by_weight, float* __restrict by_x, float* __restrict by_y) {
  INDEPENDENT
  for (int i = first; i < last; i++) {
    float x = f.x0[i] + offsets[2 * i] * f.dx[i], y = f.y0[i] + offsets[2 * i + 1] * f.dy[i];
    const int in = (x > -1.f) & (y > -1.f) & (x < g.width[i]) & (y < g.height[i]);
    x = in ? x : 0.f; y = in ? y : 0.f;
    const float left = floorf(x), top = floorf(y), wx1 = x - left, wy1 = y - top, wx0 = 1.f - wx1, wy0 = 1.f - wy1;
    const int l = in & (left >= 0.f), r = in & (left + 1.f < g.width[i]);
    const int t = top >= 0.f, b = top + 1.f < g.height[i];
    const float d0 = l & t ? dots.of[i][0] : 0.f, d1 = r & t ? dots.of[i][1] : 0.f;
    const float d2 = l & b ? dots.of[i][2] : 0.f, d3 = r & b ? dots.of[i][3] : 0.f;
    by_weight[i] = wy0 * (wx0 * d0 + wx1 * d1) + wy1 * (wx0 * d2 + wx1 * d3);
    by_x[i] = weights[i] * (wy0 * (d1 - d0) + wy1 * (d3 - d2));
    by_y[i] = weights[i] * (wx0 * (d2 - d0) + wx1 * (d3 - d1));
  }
}

static void reference_gradient(const msda_call* c, const Geometry& g, const float* offsets, const float* by_x,
                               const float* by_y, int first, int last, float* out) {
  const int size = c->reference_size;
  for (int i = first; i < last; i += g.points) {
    float x = 0.f, y = 0.f, w = 0.f, h = 0.f;
    for (int p = i; p < i + g.points; p++) {
      x += by_x[p]; y += by_y[p];
      w += by_x[p] * offsets[2 * p]; h += by_y[p] * offsets[2 * p + 1];
    }
    float* to = out + i / g.points * size;
    to[0] = x * g.width[i]; to[1] = y * g.height[i];
    if (size == 4) {
      to[2] = w * g.width[i] * 0.5f / g.points; to[3] = h * g.height[i] * 0.5f / g.points;
    }
  }
}

INLINE void store_typed(void* base, int bf16, int64_t offset, const float* from, int n) {
  if (bf16) store_row((bfloat16*)base + offset, from, n);
  else store_row((float*)base + offset, from, n);
}

// d/d logit = a (d/d a - Σ a d/d a); without softmax the weights are the caller's.
template <int SAMPLES>
INLINE void finish_logits(const msda_call* c, const float* __restrict weights, const float* __restrict by_weight,
                          int64_t query, int samples) {
  const int n = SAMPLES ? SAMPLES : samples;
  alignas(64) float out[MAX_SAMPLES];
  float mean = 0.f;
  for (int i = 0; i < n; i++) mean += weights[i] * by_weight[i];
  for (int i = 0; i < n; i++) out[i] = weights[i] * (by_weight[i] - mean);
  store_typed(c->grad_logits, c->logits_bf16, query * n, c->reference_size ? out : by_weight, n);
}

template <int SAMPLES>
INLINE const float* attention_weights(const msda_call* c, int64_t query, int samples, float* __restrict room,
                                      float* __restrict buffer) {
  const int n = SAMPLES ? SAMPLES : samples;
  const float* logits = widened(c->logits, c->logits_bf16, query * n, n, buffer);
  if (!c->reference_size) return logits;
  const float scale = softmax<SAMPLES>(logits, room, n);
  for (int i = 0; i < n; i++) room[i] *= scale;
  return room;
}

// All queries of image `b` on head `m`, samples [first, last): `value` and `grad` are that head's.
template <int SAMPLES, typename T>
static void backward_head(const msda_call* c, const Geometry& g, const int32_t* order, const T* value, int64_t row,
                          float* grad, int64_t grad_row, int64_t b, int m, int first, int last) {
  const int n = SAMPLES ? SAMPLES : g.samples, size = c->reference_size;
  const bool whole = last - first == n;
  if (whole) { first = 0; last = n; }
  alignas(64) float offset_room[2 * MAX_SAMPLES], logit_room[MAX_SAMPLES], weight_room[MAX_SAMPLES];
  alignas(64) float by_weight[MAX_SAMPLES], by_x[MAX_SAMPLES], by_y[MAX_SAMPLES], by_offset[2 * MAX_SAMPLES];
  alignas(64) float frame_room[4 * MAX_SAMPLES];
  Corners corners;
  Dots dots;
  for (int64_t i = 0; i < c->Q; i++) {
    const int64_t position = order ? order[i] : i, q = b * c->Q + position, query = q * c->M + m;
    const float* offsets = widened(c->offsets, c->offsets_bf16, query * n * 2, 2 * n, offset_room);
    const float* weights = attention_weights<SAMPLES>(c, query, n, weight_room, logit_room);
    const Frame f = frame_of(g, c->reference + q * g.levels * size, size, frame_room);
    find_corners<SAMPLES>(g, f, offsets, weights, corners);
    scatter_any(value, row, grad, grad_row, (const T*)c->grad_output + query * c->D, corners, first, last, dots, c->D);
    sample_gradients(g, f, offsets, weights, dots, first, last, by_weight, by_x, by_y);
    INDEPENDENT
    for (int k = first; k < last; k++) { by_offset[2 * k] = by_x[k] * f.dx[k]; by_offset[2 * k + 1] = by_y[k] * f.dy[k]; }
    store_typed(c->grad_offsets, c->offsets_bf16, (query * n + first) * 2, by_offset + 2 * first, 2 * (last - first));
    if (c->grad_reference)
      reference_gradient(c, g, offsets, by_x, by_y, first, last,
                         c->grad_reference + ((b * c->M + m) * c->Q + position) * g.levels * size);
    if (whole) finish_logits<SAMPLES>(c, weights, by_weight, query, n);
    else memcpy(c->weight_scratch + (position * c->M + m) * n + first, by_weight + first, sizeof(float) * (last - first));
  }
}

// The logits' gradients of image `b`, queries [begin, end), once all levels' pieces are there.
static void finish_queries(const msda_call* c, int samples, int64_t b, int64_t begin, int64_t end) {
  alignas(64) float room[MAX_SAMPLES], buffer[MAX_SAMPLES];
  for (int64_t k = begin * c->M; k < end * c->M; k++) {
    const int64_t query = b * c->Q * c->M + k;
    finish_logits<0>(c, attention_weights<0>(c, query, samples, room, buffer), c->weight_scratch + k * samples, query,
                     samples);
  }
}

template <typename T>
static void backward(const msda_call* c) {
  Geometry g;
  describe(g, c);
  const int64_t S = c->S, Q = c->Q, D = c->D, image = S * c->M * D, pieces = (S + 511) / 512;
  const int parts = c->weight_scratch ? c->L : 1, step = g.samples / parts;
  T* packed = (T*)c->value_scratch;
  float* scratch = c->gradient_scratch;
  int32_t* order = packed ? tile_order(c) : 0;
#pragma omp parallel num_threads(c->threads) if (c->threads > 1)
  for (int64_t b = 0; b < c->B; b++) {
    const T* value = (const T*)c->value + b * image;
    T* result = (T*)c->grad_value + b * image;
    float* grad = scratch ? scratch : (float*)result;
#pragma omp for schedule(dynamic, 1)
    for (int64_t k = 0; k < pieces; k++) {
      const int64_t begin = k * 512, end = begin + 512 < S ? begin + 512 : S;
      if (packed) pack(value, packed, S, c->M, c->D, begin, end);
      if (!scratch) memset(grad + begin * c->M * D, 0, sizeof(float) * (end - begin) * c->M * D);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < c->M * parts; t++) {
      const int m = (int)(t % c->M), first = (int)(t / c->M) * step, last = first + step;
      float* mine = scratch ? grad + m * S * D : grad + m * D;
      if (scratch) {
        const int64_t begin = g.start[first], end = last < g.samples ? g.start[last] : S;
        memset(mine + begin * D, 0, sizeof(float) * (end - begin) * D);
      }
      const T* theirs = packed ? packed + m * S * D : value + m * D;
      const int64_t row = packed ? D : c->M * D, grad_row = scratch ? D : c->M * D;
      if (g.samples == 16) backward_head<16>(c, g, order, theirs, row, mine, grad_row, b, m, first, last);
      else backward_head<0>(c, g, order, theirs, row, mine, grad_row, b, m, first, last);
    }
    if (c->weight_scratch) {
#pragma omp for schedule(dynamic, 1)
      for (int64_t k = 0; k < Q; k += 512) finish_queries(c, g.samples, b, k, k + 512 < Q ? k + 512 : Q);
    }
    if (scratch) {
#pragma omp for schedule(dynamic, 1)
      for (int64_t k = 0; k < pieces; k++)
        unpack(scratch, result, S, c->M, c->D, k * 512, (k + 1) * 512 < S ? (k + 1) * 512 : S);
    }
  }
  free(order);
}

}  // namespace MSDA_NS
