// csrc/cuda/rewards_and_gae.cu on the CPU, with a C function for ctypes in place of csrc/bindings/.
#include "cuda/rewards_and_gae.cu"

using namespace rlhf_fast;

namespace {

// fields: address, dtype, row stride, column stride
View view(const int64_t* fields) {
  View result;
  result.data = reinterpret_cast<const void*>(fields[0]);
  result.dtype = static_cast<DType>(fields[1]);
  result.row_stride = fields[2];
  result.column_stride = fields[3];
  return result;
}

template <class T>
T* address(int64_t number) {
  return reinterpret_cast<T*>(number);
}

}  // namespace

// views: rewards, old_logprobs, ref_logprobs, kl, scores, values, mask, bootstrap, four fields each;
// shape: rows, columns, tokens, cu_seqlens, wide; flags: scores_per_token, estimator, kl_in_reward;
// numbers: kl_coef, log_ratio_clamp, reward_clip, gamma, gae_lambda; outputs as in the bindings.
extern "C" int emulated_gae(const int64_t* views, const int64_t* shape, const int64_t* flags,
                            const double* numbers, const int64_t* outputs) {
  RewardsAndGaeArgs args;
  View* fields[] = {&args.rewards, &args.old_logprobs, &args.ref_logprobs,
                    &args.kl,      &args.scores,       &args.values};
  for (int k = 0; k < 6; ++k) *fields[k] = view(views + 4 * k);
  args.mask.data = address<const uint8_t>(views[24]);
  args.mask.row_stride = views[26];
  args.mask.column_stride = views[27];
  args.bootstrap = view(views + 28);
  args.rows = shape[0];
  args.columns = shape[1];
  args.tokens = shape[2];
  args.cu_seqlens = address<const void>(shape[3]);
  args.wide_offsets = shape[4] != 0;
  args.scores_per_token = flags[0] != 0;
  args.kl_estimator = static_cast<KlEstimator>(flags[1]);
  args.kl_in_reward = flags[2] != 0;
  args.kl_coef = static_cast<float>(numbers[0]);
  args.log_ratio_clamp = static_cast<float>(numbers[1]);
  args.reward_clip = static_cast<float>(numbers[2]);
  args.gamma = static_cast<float>(numbers[3]);
  args.gae_lambda = static_cast<float>(numbers[4]);
  args.out_advantages = address<float>(outputs[0]);
  args.out_returns = address<float>(outputs[1]);
  args.out_rewards = address<float>(outputs[2]);
  args.out_kl = address<float>(outputs[3]);
  args.out_moments = address<double>(outputs[4]);
  return rewards_and_gae_cuda(args, 0, nullptr).empty() ? 0 : 1;
}
