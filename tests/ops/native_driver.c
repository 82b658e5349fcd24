// Calls the CPU library without Python, where a cross-compiled one runs in an emulator. See test_platforms.py.
//     driver LIBRARY CALL RESULT [OPENMP]
// CALL holds 12 integers of 64 bits (see main), then the tensors; RESULT gets the outputs. Prints how many threads of
// the runtime OPENMP took part.
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "call.h"

#ifdef _WIN32
#include <windows.h>
static void* open_library(const char* path) { return LoadLibraryA(path); }
static void* find(void* library, const char* name) { return (void*)GetProcAddress((HMODULE)library, name); }
#define FORK "_vcomp_fork"
#else
#include <dlfcn.h>
static void* open_library(const char* path) { return dlopen(path, RTLD_NOW); }
static void* find(void* library, const char* name) { return dlsym(library, name); }
#define FORK "GOMP_parallel"
#endif

typedef struct { void (*work)(void*); void* data; } job;
static int threads_seen;
static void* fork_;
static void counted(void* p) {
  const job* j = (const job*)p;
  __atomic_fetch_add(&threads_seen, 1, __ATOMIC_RELAXED);
  j->work(j->data);
}
#ifdef _WIN32
static void fork_counted(int parallel, int arguments, void (*work)(void*), ...) {
  va_list list;
  va_start(list, work);
  job j = {work, va_arg(list, void*)};
  va_end(list);
  threads_seen = 0;
  ((void (*)(int, int, void (*)(void*), ...))fork_)(parallel, arguments, counted, &j);
}
#else
static void fork_counted(void (*work)(void*), void* data, unsigned threads, unsigned flags) {
  job j = {work, data};
  threads_seen = 0;
  ((void (*)(void (*)(void*), void*, unsigned, unsigned))fork_)(counted, &j, threads, flags);
}
#endif

static void fail(const char* message) {
  fprintf(stderr, "%s\n", message);
  exit(1);
}
static void* take(FILE* file, int64_t bytes) {
  void* p = malloc((size_t)bytes + 1);
  if (!p || fread(p, 1, (size_t)bytes, file) != (size_t)bytes) fail("cannot read the call");
  return p;
}
static void give(FILE* file, const void* p, int64_t bytes) {
  if (fwrite(p, 1, (size_t)bytes, file) != (size_t)bytes) fail("cannot write the result");
}

int main(int argc, char** argv) {
  if (argc < 4) fail("usage: driver LIBRARY CALL RESULT [OPENMP]");
  void* library = open_library(argv[1]);
  if (!library) fail("cannot load the library");
  FILE *in = fopen(argv[2], "rb"), *out = fopen(argv[3], "wb");
  if (!in || !out) fail("cannot open the files");
  int64_t* n = take(in, 12 * 8);
  msda_call c = {0};
  c.B = n[0]; c.S = n[1]; c.Q = n[2]; c.M = n[3]; c.D = n[4]; c.L = n[5]; c.P = n[6]; c.reference_size = n[7];
  c.value_bf16 = c.logits_bf16 = n[8]; c.threads = n[9];  // offsets are fp32
  const int backward = n[10], plain = n[11];
  const int64_t size = n[8] ? 2 : 4, samples = c.B * c.Q * c.M * c.L * c.P, values = c.B * c.S * c.M * c.D;
  const int64_t outputs = c.B * c.Q * c.M * c.D, references = c.B * c.Q * c.L * c.reference_size;
  c.shapes = take(in, c.L * 16);
  c.value = take(in, values * size);
  c.reference = take(in, references * 4);
  c.offsets = take(in, samples * 8);
  c.logits = take(in, samples * size);
  c.grad_output = take(in, outputs * size);

  if (argc > 4) {
    void* runtime = open_library(argv[4]);
    fork_ = runtime ? find(runtime, FORK) : 0;
    if (!fork_) fail("cannot load the OpenMP runtime");
    void (*use_openmp)(void*, void*) = (void (*)(void*, void*))find(library, "msda_use_openmp");
    use_openmp((void*)fork_counted, find(runtime, "_vcomp_set_num_threads"));
  }
  const int64_t bytes = ((int64_t (*)(const msda_call*, int))find(library, "msda_scratch_bytes"))(&c, backward);
  if (bytes < 0) fail("the library does not support these sizes");
  if (!plain) c.scratch = ((void* (*)(int64_t))find(library, "msda_scratch"))(bytes);
  if (backward && c.threads > c.M) c.weight_scratch = malloc((size_t)(samples * 4));
  c.output = malloc((size_t)(outputs * size));
  c.grad_value = malloc((size_t)(values * size));
  c.grad_offsets = malloc((size_t)(samples * 8));
  c.grad_logits = malloc((size_t)(samples * size));
  c.grad_reference = references ? malloc((size_t)(references * c.M * 4)) : 0;
  if (((int (*)(const msda_call*))find(library, backward ? "msda_backward" : "msda_forward"))(&c)) fail("the call failed");
  if (backward) {
    give(out, c.grad_value, values * size);
    give(out, c.grad_offsets, samples * 8);
    give(out, c.grad_logits, samples * size);
    give(out, c.grad_reference, references * c.M * 4);
  } else {
    give(out, c.output, outputs * size);
  }
  fclose(out);
  if (c.scratch) ((void (*)(void*))find(library, "msda_release"))(c.scratch);
  printf("%s threads %d\n", ((const char* (*)(void))find(library, "msda_instruction_set"))(), threads_seen);
  return 0;
}
