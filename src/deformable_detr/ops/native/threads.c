#include "threads.h"
#include "call.h"

typedef struct {
  int64_t next, n;
  void (*body)(const void*, int64_t);
  const void* context;
} loop;

// Runs on every thread of the team; a thread that is done takes the next k.
static void work(void* p) {
  loop* l = (loop*)p;
  for (int64_t k; (k = __atomic_fetch_add(&l->next, 1, __ATOMIC_RELAXED)) < l->n;) l->body(l->context, k);
}

#ifdef _WIN32  // the entry points that Microsoft's compiler calls
typedef void (*fork_function)(int parallel, int arguments, void (*function)(void*), ...);
static void (*set_num_threads_)(int);
#else  // those that GCC calls
typedef void (*fork_function)(void (*function)(void*), void* data, unsigned threads, unsigned flags);
#endif
static fork_function fork_;

// Addresses of GOMP_parallel and null, or on Windows of _vcomp_fork and _vcomp_set_num_threads.
API void msda_use_openmp(void* fork, void* set_num_threads) {
  fork_ = (fork_function)fork;
#ifdef _WIN32
  set_num_threads_ = (void (*)(int))set_num_threads;
#else
  (void)set_num_threads;
#endif
}

void msda_parallel_for(int threads, int64_t n, void (*body)(const void*, int64_t), const void* context) {
  loop l = {0, n, body, context};
  if (threads <= 1 || n <= 1 || !fork_) {
    work(&l);
    return;
  }
#ifdef _WIN32
  set_num_threads_(threads);
  fork_(1, 1, work, &l);
#else
  fork_(work, &l, (unsigned)threads, 0);
#endif
}
