// The arguments of a call, mirrored field by field in native/library.py. All tensors are contiguous.
// B images, S tokens of all levels, Q queries, M heads, D channels per head, L levels, P points.
#pragma once
#include <stdint.h>

#define MSDA_ABI 5
#define MSDA_MAX_SAMPLES 64    // L * P
#define MSDA_MAX_CHANNELS 256  // D

#ifdef _WIN32
#define API __declspec(dllexport)
#else
#define API __attribute__((visibility("default")))
#endif

typedef struct {
  // Inputs. `value`, `grad_output` and `output` share one dtype; offsets and logits have their own.
  const void* value;        // (B, S, M, D)
  const int64_t* shapes;    // (L, 2): height, width
  const float* reference;   // (B, Q, L, reference_size)
  const void* offsets;      // (B, Q, M, L, P, 2); without reference: sampling locations in 0..1
  const void* logits;       // (B, Q, M, L, P); without reference: attention weights
  const void* grad_output;  // (B, Q, M, D), backward only
  // Results.
  void* output;             // (B, Q, M, D)
  void* grad_value;         // like value
  void* grad_offsets;       // like offsets
  void* grad_logits;        // like logits
  float* grad_reference;    // (B, M, Q, L, reference_size), to be summed over M by the caller; may be null
  // msda_scratch_bytes of scratch. Null: values are read in place (see msda_plain_allowed).
  float* scratch;
  float* weight_scratch;    // Q * M * L * P floats; null: all levels of a head are one work item
  int64_t B, S, Q;
  int32_t M, D, L, P;
  int32_t reference_size;   // 2 (points), 4 (boxes), or 0 (offsets are locations and logits are weights)
  int32_t value_bf16, offsets_bf16, logits_bf16;
  int32_t threads;
} msda_call;
