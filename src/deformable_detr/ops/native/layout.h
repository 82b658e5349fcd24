// The order in which queries are visited, and values laid out head by head.
#pragma once
#include <stdlib.h>
#include "samples.h"

namespace MSDA_NS {

#ifndef MSDA_TILE_ROWS
#define MSDA_TILE_ROWS 8
#endif
#ifndef MSDA_TILE_COLUMNS
#define MSDA_TILE_COLUMNS 16
#endif

// The encoder's queries are the maps' own pixels: visited tile by tile, neighbours read the same values while these
// are still in the nearest cache. Null where queries are no grid (or there is no memory for the list): visit in order.
static inline int32_t* tile_order(const msda_call* c) {
  if (c->Q != c->S || c->Q < 1024) return 0;
  int32_t* order = (int32_t*)malloc(sizeof(int32_t) * (size_t)c->Q);
  if (!order) return 0;
  int64_t n = 0, start = 0;
  for (int l = 0; l < c->L; l++) {
    const int64_t h = c->shapes[2 * l], w = c->shapes[2 * l + 1];
    for (int64_t r = 0; r < h; r += MSDA_TILE_ROWS)
      for (int64_t s = 0; s < w; s += MSDA_TILE_COLUMNS)
        for (int64_t y = r; y < r + MSDA_TILE_ROWS && y < h; y++)
          for (int64_t x = s; x < s + MSDA_TILE_COLUMNS && x < w; x++) order[n++] = (int32_t)(start + y * w + x);
    start += h * w;
  }
  return order;
}

// Tokens [begin, end) of one image from (S, M, D) to (M, S, D).
template <typename T>
static void pack(const T* from, T* to, int64_t S, int M, int D, int64_t begin, int64_t end) {
  for (int64_t a = begin; a < end; a += 64) {
    const int64_t e = a + 64 < end ? a + 64 : end;
    for (int m = 0; m < M; m++)
      for (int64_t s = a; s < e; s++) memcpy(to + (m * S + s) * D, from + (s * M + m) * D, (size_t)D * sizeof(T));
  }
}

// The way back for gradients, which may round to bf16.
template <typename T>
static void unpack(const float* from, T* to, int64_t S, int M, int D, int64_t begin, int64_t end) {
  for (int64_t a = begin; a < end; a += 64) {
    const int64_t e = a + 64 < end ? a + 64 : end;
    for (int m = 0; m < M; m++)
      for (int64_t s = a; s < e; s++) store_row(to + (s * M + m) * D, from + (m * S + s) * D, D);
  }
}

}  // namespace MSDA_NS
