// Gradients of the weighted sums. Each (head, level range) writes its own part of every result: no atomics, and one
// order in every run. Values and their gradients are fp32; only the output's gradient may be bf16.
#pragma once
#include "layout.h"

namespace MSDA_NS {

typedef float Dots[MAX_SAMPLES][4];  // output gradient · value per pixel of each sample

// For D channels, add weight × output gradient to the gradient rows, output gradient · value to the dot products.
template <int D, bool BORDERED>
INLINE void scatter_rows(const Geometry& g, const float* value, float* grad, int64_t row,
                         const float* __restrict grad_output, const Taps& t, int first, int last, bool add, Dots& dots) {
  constexpr int N = D / LANES;
  floats G[N];
  for (int k = 0; k < N; k++) G[k] = load(grad_output + k * LANES);
  for (int i = first; i < last; i++) {
    int64_t at[4];
    if (BORDERED) {
      at[0] = t.row[0][i]; at[1] = at[0] + row;
      at[2] = at[0] + g.pitch[i] * row; at[3] = at[2] + row;
    } else {
      for (int j = 0; j < 4; j++) at[j] = t.row[j][i] * row;
    }
    floats dot[4];
    for (int j = 0; j < 4; j++) {
      const float w = t.weight[j][i];
      dot[j] = G[0] * load(value + at[j]);
      for (int k = 1; k < N; k++) dot[j] += G[k] * load(value + at[j] + k * LANES);
      for (int k = 0; k < N; k++) {
        float* to = grad + at[j] + k * LANES;
        store(to, load(to) + w * G[k]);
      }
    }
    float sums[4];
    sums_of_four(dot[0], dot[1], dot[2], dot[3], sums);
    for (int j = 0; j < 4; j++) dots[i][j] = add ? dots[i][j] + sums[j] : sums[j];
  }
}

template <bool BORDERED>
INLINE void scatter(const Geometry& g, const float* value, float* grad, int64_t row, const float* G, const Taps& t,
                    int first, int last, Dots& dots, int D) {
  if (D == 32)
    return scatter_rows<32, BORDERED>(g, value, grad, BORDERED ? 64 : row, G, t, first, last, false, dots);
  int d = 0;
  for (; d + 32 <= D; d += 32)
    scatter_rows<32, BORDERED>(g, value + d, grad + d, row, G + d, t, first, last, d > 0, dots);
  for (; d + 16 <= D; d += 16)
    scatter_rows<16, BORDERED>(g, value + d, grad + d, row, G + d, t, first, last, d > 0, dots);
  for (; d < D; d += LANES)
    scatter_rows<LANES, BORDERED>(g, value + d, grad + d, row, G + d, t, first, last, d > 0, dots);
}

// From dot products to the gradients of the attention weight and, in pixels, of x and y.
template <bool BORDERED>
INLINE void sample_gradients(const Geometry& g, const Taps& t, const float* __restrict weights, const Dots& dots,
                             float* __restrict by_weight, float* __restrict by_x, float* __restrict by_y) {
  for (int i = 0; i < g.vectors; i += LANES) {
    const float* d = dots[i];
    const floats a = load(d), b = load(d + LANES), c = load(d + 2 * LANES), e = load(d + 3 * LANES);
    const floats ab = firsts(a, b), ce = firsts(c, e), AB = seconds(a, b), CE = seconds(c, e);
    floats d0 = firsts(ab, ce), d2 = seconds(ab, ce), d1 = firsts(AB, CE), d3 = seconds(AB, CE);
    const floats zero = floats{};
    if (!BORDERED) {
      d0 = load(t.valid[0] + i) ? d0 : zero; d1 = load(t.valid[1] + i) ? d1 : zero;
      d2 = load(t.valid[2] + i) ? d2 : zero; d3 = load(t.valid[3] + i) ? d3 : zero;
    }
    const floats x = load(t.x + i), y = load(t.y + i), weight = load(weights + i);
    const floats top = d1 - d0, bottom = d3 - d2, upper = d0 + x * top, lower = d2 + x * bottom;
    const ints inside = load(t.inside + i);
    const floats down = lower - upper, along = top + y * (bottom - top);
    store(by_weight + i, inside ? upper + y * down : zero);
    store(by_x + i, inside ? weight * along : zero);
    store(by_y + i, inside ? weight * down : zero);
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

// d/d logit = a (d/d a - Σ a d/d a); for given weights, d/d a itself.
INLINE void finish_logits(const msda_call* c, const Geometry& g, const float* __restrict weights,
                          const float* __restrict by_weight, int64_t query) {
  alignas(64) float out[MAX_SAMPLES];
  if (c->reference_size) {
    floats total = floats{};
    for (int i = 0; i < g.vectors; i += LANES) total += load(weights + i) * load(by_weight + i);
    const float mean = sum(total);
    for (int i = 0; i < g.vectors; i += LANES) store(out + i, load(weights + i) * (load(by_weight + i) - mean));
    by_weight = out;
  }
  narrow(c->grad_logits, c->logits_bf16, query * g.samples, by_weight, g.samples);
}

INLINE const float* attention_weights(const msda_call* c, const Geometry& g, int64_t query, float* __restrict room,
                                      float* __restrict buffer) {
  float scale;
  const float* weights = raw_weights(c, g, query, room, buffer, &scale);
  if (c->reference_size)
    for (int i = 0; i < g.vectors; i += LANES) store(room + i, load(room + i) * scale);
  return weights;
}

// All queries of image `b` on head `m`, samples [first, last). `value` and `grad` are that head's.
template <bool BORDERED, typename T>
static void backward_head(const msda_call* c, const Geometry& g, const float* value, float* grad, int64_t row,
                          int64_t b, int m, int first, int last) {
  const int n = g.samples, size = c->reference_size, D = whole_vectors(c->D);
  const bool whole = !c->weight_scratch;
  alignas(64) float offset_room[2 * MAX_SAMPLES], logit_room[MAX_SAMPLES], weight_room[MAX_SAMPLES];
  alignas(64) float by_weight[MAX_SAMPLES], by_x[MAX_SAMPLES], by_y[MAX_SAMPLES], by_offset[2 * MAX_SAMPLES];
  alignas(64) float frame_room[4 * MAX_SAMPLES], grad_room[MAX_CHANNELS];
  alignas(64) Dots dots;
  memset(dots, 0, sizeof dots);
  Taps t;
  for (int64_t i = 0; i < c->Q; i++) {
    const int64_t q = b * c->Q + i, query = q * c->M + m;
    const float* offsets = padded(c->offsets, c->offsets_bf16, query * n * 2, 2 * n, 2 * g.vectors, 0.f, offset_room);
    const float* weights = attention_weights(c, g, query, weight_room, logit_room);
    const float* G = padded(c->grad_output, sizeof(T) == 2, query * c->D, c->D, D, 0.f, grad_room);
    const Frame f = frame_of(g, c->reference + q * g.levels * size, size, frame_room);
    find_taps<BORDERED, true>(g, f, offsets, weights, (int)row, t);
    if (!BORDERED) {
      prefetch_rows(value, row, t, first, last, D * 4);
      prefetch_rows(grad, row, t, first, last, D * 4);
    }
    scatter<BORDERED>(g, value, grad, row, G, t, first, last, dots, D);
    sample_gradients<BORDERED>(g, t, weights, dots, by_weight, by_x, by_y);
    for (int k = 0; k < g.vectors; k += LANES)
      interleave(by_offset + 2 * k, load(by_x + k) * load(f.dx + k), load(by_y + k) * load(f.dy + k));
    narrow(c->grad_offsets, c->offsets_bf16, (query * n + first) * 2, by_offset + 2 * first, 2 * (last - first));
    if (c->grad_reference)
      reference_gradient(c, g, offsets, by_x, by_y, first, last,
                         c->grad_reference + ((b * c->M + m) * c->Q + i) * g.levels * size);
    if (whole) finish_logits(c, g, weights, by_weight, query);
    else memcpy(c->weight_scratch + (i * c->M + m) * n + first, by_weight + first, sizeof(float) * (last - first));
  }
}

// The logits' gradients of queries [begin, end) of image `b`, after all their levels are done.
static void finish_queries(const msda_call* c, const Geometry& g, int64_t b, int64_t begin, int64_t end) {
  alignas(64) float room[MAX_SAMPLES], buffer[MAX_SAMPLES], by_weight[MAX_SAMPLES];
  for (int64_t k = begin * c->M; k < end * c->M; k++) {
    const int64_t query = b * c->Q * c->M + k;
    const float* weights = attention_weights(c, g, query, room, buffer);
    memset(by_weight, 0, sizeof by_weight);
    memcpy(by_weight, c->weight_scratch + k * g.samples, sizeof(float) * g.samples);
    finish_logits(c, g, weights, by_weight, query);
  }
}

template <typename T>
static void backward(const msda_call* c) {
  Geometry g;
  describe(g, c);
  const int64_t S = c->S, Q = c->Q, image = S * c->M * c->D, lines = map_rows(c), pieces = (S + 511) / 512;
  const int parts = c->weight_scratch ? c->L : 1, step = g.samples / parts, D = whole_vectors(c->D), row = 2 * D;
  for (int64_t b = 0; b < c->B; b++) {
    const T* value = (const T*)c->value + b * image;
    T* result = (T*)c->grad_value + b * image;
    if (c->scratch) {
      parallel_for(c->threads, lines, [&](int64_t k) { pack(c, value, c->scratch, g.bordered, row, k); });
    } else {
      parallel_for(c->threads, pieces, [&](int64_t k) {
        memset(result + k * 512 * c->M * D, 0, sizeof(T) * (k * 512 + 512 < S ? 512 : S - k * 512) * c->M * D);
      });
    }
    parallel_for(c->threads, c->M * parts, [&](int64_t k) {
      const int m = (int)(k % c->M), first = (int)(k / c->M) * step;
      if (c->scratch) {
        float* mine = c->scratch + m * g.bordered * row;
        backward_head<true, T>(c, g, mine, mine + D, row, b, m, first, first + step);
      } else {  // fp32 only; msda_backward checks it
        backward_head<false, T>(c, g, (const float*)value + m * D, (float*)result + m * D, c->M * D, b, m, first,
                                first + step);
      }
    });
    if (c->weight_scratch)
      parallel_for(c->threads, (Q + 511) / 512, [&](int64_t k) {
        finish_queries(c, g, b, k * 512, k * 512 + 512 < Q ? k * 512 + 512 : Q);
      });
    if (c->scratch)
      parallel_for(c->threads, lines, [&](int64_t k) { unpack(c, c->scratch, result, g.bordered, row, D, k); });
  }
}

}  // namespace MSDA_NS
