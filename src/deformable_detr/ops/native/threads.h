// Loops on the threads of the OpenMP runtime that torch has loaded. The library links to no runtime: a second one would
// bring a second pool of threads.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
// Call body(context, k) once for each k in 0..n-1, on up to `threads` threads, and wait for all of them.
void msda_parallel_for(int threads, int64_t n, void (*body)(const void*, int64_t), const void* context);
#ifdef __cplusplus
}

template <typename Body>
static inline void parallel_for(int threads, int64_t n, const Body& body) {
  msda_parallel_for(threads, n, [](const void* context, int64_t k) { (*(const Body*)context)(k); }, &body);
}
#endif
