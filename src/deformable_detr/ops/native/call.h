// The one structure that crosses from Python (native/library.py mirrors it field by field).
// B images, S tokens of all levels, Q queries, M heads, D channels a head, L levels, P points; all tensors contiguous.
#pragma once
#include <stdint.h>

#define MSDA_ABI 4
#define MSDA_MAX_SAMPLES 64    // L * P
#define MSDA_MAX_CHANNELS 256  // D

typedef struct {
  // Inputs. `value`, `grad_output` and `output` share one type; offsets and logits have their own.
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
  float* grad_reference;    // (B, M, Q, L, reference_size): the caller sums over M. May be null
  // Scratch, of msda_scratch_bytes. Null: values are read where they lie (few queries; see plain_allowed).
  float* scratch;
  float* weight_scratch;    // Q * M * L * P floats: null means a head's levels are one piece of work
  int64_t B, S, Q;
  int32_t M, D, L, P;
  int32_t reference_size;   // 2 (points), 4 (boxes), or 0: locations and weights are given
  int32_t value_bf16, offsets_bf16, logits_bf16;
  int32_t threads;
} msda_call;
