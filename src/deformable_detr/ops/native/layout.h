// The bordered layout of values: one image, head by head, each level's map with zeros around it. The four pixels of a
// sample then follow from one index without tests, a head's map fits the caches, and huge pages spare the page table.
// A pixel takes `row` floats: the values, padded to whole vectors, and for the backward pass as many gradient sums.
#pragma once
#include "samples.h"
#include "threads.h"

namespace MSDA_NS {

INLINE int64_t map_rows(const msda_call* c) {  // rows of all levels, with borders
  int64_t n = 0;
  for (int l = 0; l < c->L; l++) n += c->shapes[2 * l] + BORDER;
  return n;
}

// The k-th of `map_rows`: width, row in its map (-1: border) and first token in either layout.
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

// Copy one row of a map, all heads, from (S, M, D) to the bordered layout; zero what is not a value.
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

// Copy the gradient sums, `skip` floats into each pixel, back to (S, M, D).
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
