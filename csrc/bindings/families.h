// One function a family of ops; each puts its ops into the module. csrc/bindings.cpp calls them all.
#pragma once

#include <pybind11/pybind11.h>

namespace rlhf_fast {

void bind_rewards(pybind11::module_& m);    // rewards_and_gae, gae, whiten
void bind_logprobs(pybind11::module_& m);   // logprobs_from_logits, kl_from_logits
void bind_losses(pybind11::module_& m);     // ppo_loss
void bind_row_ops(pybind11::module_& m);    // what the next two families return
void bind_decoding(pybind11::module_& m);   // decode_state, gather_rows, rms_norm, silu_mul, linear_small, sample
void bind_attention(pybind11::module_& m);  // packed_attention, paged_attention, rope_and_store
void bind_layers(pybind11::module_& m);     // swiglu, rotary, rms_norm_backward
void bind_host(pybind11::module_& m);       // kv_pages

}  // namespace rlhf_fast
