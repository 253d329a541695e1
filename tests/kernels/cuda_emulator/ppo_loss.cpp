// csrc/cuda/ppo_loss.cu on the CPU, with C functions for ctypes in place of csrc/bindings/.
#include "cuda/ppo_loss.cu"

#include <limits>

using namespace rlhf_fast;

namespace {

TokenTensor tensor(const uint64_t* addresses, const int32_t* dtypes, int k) {
  TokenTensor result;
  result.data = reinterpret_cast<const void*>(addresses[k]);
  result.dtype = static_cast<DType>(dtypes[k]);
  return result;
}

float* output(const uint64_t* addresses, int k) { return reinterpret_cast<float*>(addresses[k]); }

}  // namespace

extern "C" int64_t emulated_workspace(int64_t tokens) { return ppo_loss_workspace(tokens); }

// settings: as Settings.native() with None replaced by infinity; number_type < 0: `number` counts.
extern "C" int emulated_ppo_loss(const uint64_t* inputs, const int32_t* dtypes, const uint8_t* mask,
                                 int64_t tokens, double number, const void* number_on_device,
                                 int32_t number_type, const double* settings,
                                 const uint64_t* outputs, double* workspace) {
  PpoLossArgs args;
  TokenTensor* fields[] = {&args.logprobs,     &args.old_logprobs, &args.advantages, &args.entropy,
                           &args.ref_logprobs, &args.weights,      &args.values,
                           &args.old_values,   &args.returns,      &args.kl};
  for (int k = 0; k < 10; ++k) *fields[k] = tensor(inputs, dtypes, k);
  args.tokens = tokens;
  args.mask = mask;
  args.normalizer = number;
  args.clip_eps_low = settings[0];
  args.clip_eps_high = settings[1];
  args.dual_clip = settings[2];
  args.entropy_coef = settings[3];
  args.kl_coef = settings[4];
  args.kl_estimator = static_cast<KlEstimator>(static_cast<int32_t>(settings[5]));
  args.own_kl_gradient = settings[6] != 0.0;
  args.value_clip_eps = settings[7];
  args.value_coef = settings[8];
  args.log_ratio_clamp = settings[9];
  if (settings[7] == std::numeric_limits<double>::infinity()) args.old_values = TokenTensor();
  args.loss = output(outputs, 0);
  args.sums = output(outputs, 1);
  args.extrema = output(outputs, 2);
  args.d_logprobs = output(outputs, 3);
  args.d_entropy = output(outputs, 4);
  args.d_values = output(outputs, 5);
  args.d_kl = output(outputs, 6);
  DeviceNumber normalizer;
  if (number_type >= 0) {
    normalizer.data = number_on_device;
    normalizer.type = static_cast<DeviceNumber::Type>(number_type);
  }
  return ppo_loss_cuda(args, normalizer, workspace, 0, nullptr).empty() ? 0 : 1;
}

extern "C" int emulated_scale(const uint64_t* from, const uint64_t* to, const int32_t* dtypes,
                              int64_t tokens, const float* upstream) {
  PpoScaleArgs args;
  args.tokens = tokens;
  args.upstream = upstream;
  for (int k = 0; k < PpoScaleArgs::kGradients; ++k) {
    args.from[k] = reinterpret_cast<const float*>(from[k]);
    args.to[k] = tensor(to, dtypes, k);
  }
  return ppo_loss_scale_cuda(args, 0, nullptr).empty() ? 0 : 1;
}
