// csrc/cuda/whiten.cu on the CPU, with C functions for ctypes in place of csrc/bindings/.
#include "cuda/whiten.cu"

using namespace rlhf_fast;

namespace {

// fields of x, then of the mask: address, dtype, row stride, column stride
template <class Args>
void set_inputs(Args& args, int64_t rows, int64_t columns, const int64_t* fields) {
  args.rows = rows;
  args.columns = columns;
  args.x.data = reinterpret_cast<const void*>(fields[0]);
  args.x.dtype = static_cast<DType>(fields[1]);
  args.x.row_stride = fields[2];
  args.x.column_stride = fields[3];
  args.mask.data = reinterpret_cast<const uint8_t*>(fields[4]);
  args.mask.row_stride = fields[6];
  args.mask.column_stride = fields[7];
}

}  // namespace

extern "C" int64_t emulated_chunk() { return kMomentsChunk; }

extern "C" int emulated_moments(int64_t rows, int64_t columns, const int64_t* fields,
                                double* partials, double* out) {
  MaskedMomentsArgs args;
  set_inputs(args, rows, columns, fields);
  args.partials = partials;
  args.out = out;
  return masked_moments_cuda(args, 0, nullptr).empty() ? 0 : 1;
}

extern "C" int emulated_whiten(int64_t rows, int64_t columns, const int64_t* fields,
                               const double* stats, int64_t sets, double* merged, int shift_mean,
                               int unbiased, double eps, float* out) {
  WhitenArgs args;
  set_inputs(args, rows, columns, fields);
  args.stats = stats;
  args.sets = sets;
  args.merged = merged;
  args.shift_mean = shift_mean != 0;
  args.unbiased = unbiased != 0;
  args.eps = eps;
  args.out = out;
  return whiten_cuda(args, 0, nullptr).empty() ? 0 : 1;
}
