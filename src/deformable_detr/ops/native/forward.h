// Weighted sums of sampled values.
#pragma once
#include "layout.h"

namespace MSDA_NS {

// `D` channels of the rows that `c` names, summed by its weights, times `scale`.
template <int D, typename T>
INLINE void sum_rows(const T* __restrict value, int64_t row, const Corners& c, int samples, float scale,
                     T* __restrict out) {
  constexpr int N = D / LANES;
  floats even[N], odd[N];
  for (int k = 0; k < N; k++) even[k] = odd[k] = floats{};
  for (int i = 0; i < samples; i++) {
    const T *p0 = value + c.index[0][i] * row, *p1 = value + c.index[1][i] * row;
    const T *p2 = value + c.index[2][i] * row, *p3 = value + c.index[3][i] * row;
    const float w0 = c.weight[0][i], w1 = c.weight[1][i], w2 = c.weight[2][i], w3 = c.weight[3][i];
    for (int k = 0; k < N; k++) {
      even[k] += w0 * load(p0 + k * LANES); odd[k] += w1 * load(p1 + k * LANES);
      even[k] += w2 * load(p2 + k * LANES); odd[k] += w3 * load(p3 + k * LANES);
    }
  }
  alignas(64) float sum[D];
  for (int k = 0; k < N; k++) *(floats*)(sum + k * LANES) = (even[k] + odd[k]) * scale;
  store_row(out, sum, D);
}

template <typename T>
static void sum_tail(const T* value, int64_t row, const Corners& c, int samples, float scale, T* out, int D) {
  float sum[LANES] = {};
  for (int i = 0; i < samples; i++)
    for (int k = 0; k < 4; k++)
      for (int d = 0; d < D; d++) sum[d] += c.weight[k][i] * load_one(value + c.index[k][i] * row + d);
  for (int d = 0; d < D; d++) store_one(out + d, sum[d] * scale);
}

template <typename T>
INLINE void sum_any(const T* value, int64_t row, const Corners& c, int samples, float scale, T* out, int D) {
  if (D == 32) return sum_rows<32>(value, row, c, samples, scale, out);
  int d = 0;
  for (; d + 64 <= D; d += 64) sum_rows<64>(value + d, row, c, samples, scale, out + d);
  for (; d + 16 <= D; d += 16) sum_rows<16>(value + d, row, c, samples, scale, out + d);
  for (; d + LANES <= D; d += LANES) sum_rows<LANES>(value + d, row, c, samples, scale, out + d);
  if (d < D) sum_tail(value + d, row, c, samples, scale, out + d, D - d);
}

template <int SAMPLES, typename T>
INLINE void attend(const msda_call* c, const Geometry& g, const Frame& f, const T* value, int64_t row, int64_t query,
                   T* out) {
  const int n = g.samples;
  alignas(64) float offset_room[2 * MAX_SAMPLES], logit_room[MAX_SAMPLES], weight_room[MAX_SAMPLES];
  Corners corners;
  const float* offsets = widened(c->offsets, c->offsets_bf16, query * n * 2, 2 * n, offset_room);
  const float* weights = widened(c->logits, c->logits_bf16, query * n, n, logit_room);
  float scale = 1.f;
  if (c->reference_size) {
    scale = softmax<SAMPLES>(weights, weight_room, n);
    weights = weight_room;
  }
  find_corners<SAMPLES>(g, f, offsets, weights, corners);
  sum_any(value, row, corners, SAMPLES ? SAMPLES : n, scale, out, c->D);
}

// Queries order[begin..end) of image `b`, head after head. `value` is the image's: head m at + m * head, token s
// at + s * row.
template <typename T>
static void forward_block(const msda_call* c, const Geometry& g, const int32_t* order, const T* value, int64_t row,
                          int64_t head, int64_t b, int64_t begin, int64_t end) {
  alignas(64) float room[FRAME_FLOATS];
  const int size = c->reference_size, rows = frame_rows(size) * g.samples;
  Frame frames[128];
  for (int64_t i = begin; i < end; i++) {
    const int64_t q = b * c->Q + (order ? order[i] : i);
    frames[i - begin] = frame_of(g, c->reference + q * g.levels * size, size, room + (i - begin) * rows);
  }
  for (int m = 0; m < c->M; m++)
    for (int64_t i = begin; i < end; i++) {
      const int64_t q = (b * c->Q + (order ? order[i] : i)) * c->M + m;
      T* out = (T*)c->output + q * c->D;
      if (g.samples == 16) attend<16>(c, g, frames[i - begin], value + m * head, row, q, out);
      else attend<0>(c, g, frames[i - begin], value + m * head, row, q, out);
    }
}

template <typename T>
static void forward(const msda_call* c) {
  Geometry g;
  describe(g, c);
  const int64_t S = c->S, Q = c->Q, image = S * c->M * c->D;
  T* packed = (T*)c->value_scratch;
  int32_t* order = packed ? tile_order(c) : 0;
  int64_t block = FRAME_FLOATS / (frame_rows(c->reference_size) * g.samples);
  if (block > (packed ? 128 : 16)) block = packed ? 128 : 16;
  const int64_t blocks = (Q + block - 1) / block, pieces = (S + 511) / 512;
#pragma omp parallel num_threads(c->threads) if (c->threads > 1)
  {
    if (packed) {
      for (int64_t b = 0; b < c->B; b++) {
        const T* value = (const T*)c->value + b * image;
#pragma omp for schedule(dynamic, 1)
        for (int64_t k = 0; k < pieces; k++)
          pack(value, packed, S, c->M, c->D, k * 512, (k + 1) * 512 < S ? (k + 1) * 512 : S);
#pragma omp for schedule(dynamic, 1)
        for (int64_t k = 0; k < blocks; k++)
          forward_block(c, g, order, packed, c->D, S * c->D, b, k * block,
                        (k + 1) * block < Q ? (k + 1) * block : Q);
      }
    } else {
#pragma omp for schedule(dynamic, 1)
      for (int64_t k = 0; k < c->B * blocks; k++) {
        const int64_t b = k / blocks, begin = k % blocks * block;
        forward_block(c, g, (const int32_t*)0, (const T*)c->value + b * image, (int64_t)c->M * c->D, c->D, b, begin,
                      begin + block < Q ? begin + block : Q);
      }
    }
  }
  free(order);
}

}  // namespace MSDA_NS
