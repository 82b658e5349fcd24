// Weighted sums of sampled values.
#pragma once
#include "layout.h"

namespace MSDA_NS {

// Queries whose taps are computed before their sums. 2 suffice for bordered values, which are read in order; plain ones
// are often not cached, and 8 with prefetched rows halved the time.
constexpr int AHEAD_BORDERED = 2, AHEAD_PLAIN = 8;

// Sum D channels of one query and head. `value` is the head's, with `row` numbers per token in the plain layout.
template <int D, bool BORDERED, typename T>
INLINE void sum_rows(const Geometry& g, const T* __restrict value, int64_t row, const Taps& t, int samples, float scale,
                     float* __restrict out) {
  constexpr int N = D / LANES, CHAINS = N >= 8 ? 1 : N >= 4 ? 2 : 4;  // independent sums to hide latency
  floats s[CHAINS][N];
  for (int j = 0; j < CHAINS; j++)
    for (int k = 0; k < N; k++) s[j][k] = floats{};
  for (int i = 0; i < samples; i++) {
    const T *p0, *p1, *p2, *p3;
    if (BORDERED) {
      p0 = value + t.row[0][i]; p1 = p0 + row;
      p2 = p0 + g.pitch[i] * row; p3 = p2 + row;
    } else {
      p0 = value + t.row[0][i] * row; p1 = value + t.row[1][i] * row;
      p2 = value + t.row[2][i] * row; p3 = value + t.row[3][i] * row;
    }
    const float w0 = t.weight[0][i], w1 = t.weight[1][i], w2 = t.weight[2][i], w3 = t.weight[3][i];
    for (int k = 0; k < N; k++) {
      s[0][k] += w0 * load(p0 + k * LANES);
      s[1 % CHAINS][k] += w1 * load(p1 + k * LANES);
      s[2 % CHAINS][k] += w2 * load(p2 + k * LANES);
      s[3 % CHAINS][k] += w3 * load(p3 + k * LANES);
    }
  }
  for (int k = 0; k < N; k++) {
    floats total = s[0][k];
    for (int j = 1; j < CHAINS; j++) total += s[j][k];
    store(out + k * LANES, total * scale);
  }
}

template <bool BORDERED, typename T, typename O>
INLINE void sum_channels(const msda_call* c, const Geometry& g, const T* value, int64_t row, const Taps& t, float scale,
                         O* to) {
  alignas(64) float out[MAX_CHANNELS];
  const int D = whole_vectors(c->D), n = g.samples;
  if (D == 32) {
    sum_rows<32, BORDERED>(g, value, BORDERED ? 32 : row, t, n, scale, out);
    if (c->D == 32) return narrow(to, out, 32);
  } else {
    int d = 0;
    for (; d + 32 <= D; d += 32) sum_rows<32, BORDERED>(g, value + d, row, t, n, scale, out + d);
    for (; d + 16 <= D; d += 16) sum_rows<16, BORDERED>(g, value + d, row, t, n, scale, out + d);
    for (; d < D; d += LANES) sum_rows<LANES, BORDERED>(g, value + d, row, t, n, scale, out + d);
  }
  narrow(to, out, c->D);
}

// Queries [begin, end) of image `b`, head by head, `head` numbers apart. Taps of AHEAD queries precede their sums, so
// that many reads are in flight.
template <bool BORDERED, typename T, typename O>
static void forward_block(const msda_call* c, const Geometry& g, const T* value, int64_t row, int64_t head,
                          int64_t b, int64_t begin, int64_t end) {
  alignas(64) float room[FRAME_FLOATS];
  const int n = g.samples, size = c->reference_size, step = frame_rows(size) * g.vectors;
  Frame frames[128];
  int64_t queries[128];
  for (int64_t i = begin; i < end; i++) {
    const int64_t q = b * c->Q + i;
    queries[i - begin] = q * c->M;
    frames[i - begin] = frame_of(g, c->reference + q * g.levels * size, size, room + (i - begin) * step);
  }
  alignas(64) float offset_room[2 * MAX_SAMPLES], logit_room[MAX_SAMPLES], weight_room[MAX_SAMPLES];
  constexpr int AHEAD = BORDERED ? AHEAD_BORDERED : AHEAD_PLAIN;
  Taps taps[AHEAD];
  float scales[AHEAD];
  const int count = (int)(end - begin);
  for (int m = 0; m < c->M; m++)
    for (int i = 0; i < count; i += AHEAD) {
      const int group = count - i < AHEAD ? count - i : AHEAD;
      for (int j = 0; j < group; j++) {
        const int64_t q = queries[i + j] + m;
        const float* offsets = padded(c->offsets, c->offsets_bf16, q * n * 2, 2 * n, 2 * g.vectors, 0.f, offset_room);
        const float* weights = raw_weights(c, g, q, weight_room, logit_room, &scales[j]);
        find_taps<BORDERED, false>(g, frames[i + j], offsets, weights, (int)row, taps[j]);
        if (!BORDERED) prefetch_rows(value + m * head, row, taps[j], 0, n, c->D * (int64_t)sizeof(T));
      }
      for (int j = 0; j < group; j++)
        sum_channels<BORDERED>(c, g, value + m * head, row, taps[j], scales[j],
                               (O*)c->output + (queries[i + j] + m) * c->D);
    }
}

template <typename T>
static void forward(const msda_call* c) {
  Geometry g;
  describe(g, c);
  const int64_t Q = c->Q, image = c->S * c->M * c->D, lines = map_rows(c);
  const int row = whole_vectors(c->D);
  const int64_t limit = c->scratch ? 128 : 16, room = FRAME_FLOATS / (frame_rows(c->reference_size) * g.vectors);
  const int64_t block = limit < room ? limit : room, blocks = (Q + block - 1) / block;
  if (!c->scratch) {
    parallel_for(c->threads, c->B * blocks, [&](int64_t k) {
      const int64_t b = k / blocks, begin = k % blocks * block, end = begin + block < Q ? begin + block : Q;
      forward_block<false, T, T>(c, g, (const T*)c->value + b * image, (int64_t)c->M * c->D, c->D, b, begin, end);
    });
    return;
  }
  for (int64_t b = 0; b < c->B; b++) {
    parallel_for(c->threads, lines, [&](int64_t k) {
      pack(c, (const T*)c->value + b * image, c->scratch, g.bordered, row, k);
    });
    parallel_for(c->threads, blocks, [&](int64_t k) {
      forward_block<true, float, T>(c, g, c->scratch, row, g.bordered * row, b, k * block,
                                    (k + 1) * block < Q ? (k + 1) * block : Q);
    });
  }
}

}  // namespace MSDA_NS
