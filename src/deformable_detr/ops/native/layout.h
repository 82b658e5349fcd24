// The bordered layout of values: one image, head by head, each level's map with zeros around it. A sample's four pixels then follow from one
// index without any test, a head's map fits the caches, and huge pages spare the page table. `row` floats a pixel: the
// values (padded to whole vectors), and for gradients beside them the sums that grow there. (Visiting the encoder's
// queries in tiles instead of rows was tried: no gain.)
#pragma once
#include "samples.h"

namespace MSDA_NS {

INLINE int64_t map_rows(const msda_call* c) {  // rows of all levels, with borders
  int64_t n = 0;
  for (int l = 0; l < c->L; l++) n += c->shapes[2 * l] + BORDER;
  return n;
}

// Which level, row of its map (-1: border) and first tokens the k-th of `map_rows` is.
struct MapRow { int64_t width, y, plain, bordered; };
INLINE MapRow map_row(const msda_call* c, int64_t k) {
  int64_t plain = 0, bordered = 0;
  for (int l = 0;; l++) {
    const int64_t h = c->shapes[2 * l], w = c->shapes[2 * l + 1];
    if (k < h + BORDER) return {w, k >= 1 && k <= h ? k - 1 : -1, plain + (k - 1) * w, bordered + k * (w + BORDER)};
    k -= h + BORDER;
    plain += h * w;
    bordered += (h + BORDER) * (w + BORDER);
  }
}

// One row of a map, all heads, from (S, M, D); `row` floats a pixel, all beyond the D values zero.
template <typename T>
static void pack(const msda_call* c, const T* from, float* to, int64_t bordered, int row, int64_t k) {
  const MapRow r = map_row(c, k);
  const int M = c->M, D = c->D;
  for (int m = 0; m < M; m++) {
    float* line = to + (m * bordered + r.bordered) * row;
    if (r.y < 0) {
      memset(line, 0, sizeof(float) * (r.width + BORDER) * row);
      continue;
    }
    memset(line, 0, sizeof(float) * row);
    memset(line + (r.width + 1) * row, 0, sizeof(float) * 2 * row);
  }
  if (r.y < 0) return;
  for (int64_t a = 0; a < r.width; a += 32)
    for (int m = 0; m < M; m++)
      for (int64_t x = a; x < r.width && x < a + 32; x++) {
        float* pixel = to + (m * bordered + r.bordered + 1 + x) * row;
        widen(pixel, from + ((r.plain + x) * M + m) * D, D);
        for (int d = D; d < row; d++) pixel[d] = 0.f;
      }
}

// The way back for the sums, which lie `skip` floats into each pixel.
template <typename T>
static void unpack(const msda_call* c, const float* from, T* to, int64_t bordered, int row, int skip, int64_t k) {
  const MapRow r = map_row(c, k);
  if (r.y < 0) return;
  for (int64_t a = 0; a < r.width; a += 32)
    for (int m = 0; m < c->M; m++)
      for (int64_t x = a; x < r.width && x < a + 32; x++)
        narrow(to + ((r.plain + x) * c->M + m) * c->D, from + (m * bordered + r.bordered + 1 + x) * row + skip, c->D);
}

}  // namespace MSDA_NS
