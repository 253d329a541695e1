// One head of one token at a time, in fp32 in the first-level cache.
#include "cpu/rope_and_store.h"

#include <cmath>
#include <type_traits>

#include "cpu/vec_math.h"
#include "host/parallel.h"

namespace rlhf_fast {
namespace RLHF_FAST_ISA {
namespace {

constexpr int64_t kWidth = RopeAndStoreArgs::kWidest;
// Elements of a chunk of tokens: enough for the wake-up of a second thread (about 10 us) to pay.
constexpr int64_t kChunk = 1 << 15;

struct Float32 {
  using Element = float;
  static float get(float x) { return x; }
  static float set(float x) { return x; }
};

struct BFloat16 {
  using Element = uint16_t;
  static float get(uint16_t x) { return bf16_to_float(x); }
  static uint16_t set(float x) { return float_to_bf16(x); }
};

template <class Type>
float rounded(float x) {
  return Type::get(Type::set(x));
}

template <class Type>
void normalise(float* x, const typename Type::Element* weight, int64_t count, float eps) {
  vfloat squares = splat(0.0f);
  int64_t done = 0;
  for (; done + kLanes <= count; done += kLanes) {
    const vfloat part = load(x + done);
    squares = fma(part, part, squares);
  }
  double sum = 0.0;
  for (int lane = 0; lane < kLanes; ++lane) sum += static_cast<double>(squares[lane]);
  for (; done < count; ++done) sum += static_cast<double>(x[done]) * x[done];
  const float scale = 1.0f / std::sqrt(static_cast<float>(sum / count) + eps);
  for (int64_t i = 0; i < count; ++i) {
    x[i] = rounded<Type>(Type::get(weight[i]) * rounded<Type>(x[i] * scale));
  }
}

// x cos + rotate_half(x) sin, as Hugging Face lays the halves out.
void rotate(float* x, const float* cos, const float* sin, int64_t count) {
  const int64_t half = count / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float low = x[i];
    const float high = x[i + half];
    x[i] = low * cos[i] - high * sin[i];
    x[i + half] = high * cos[i + half] + low * sin[i + half];
  }
}

// The same from one head into another, which may be itself, where halves are whole vectors.
void rotate_vectors(const float* from, const float* cos, const float* sin, int64_t count, float* to) {
  const int64_t half = count / 2;
  for (int64_t i = 0; i < half; i += kLanes) {
    const vfloat low = load(from + i), high = load(from + i + half);
    store(to + i, low * load(cos + i) - high * load(sin + i));
    store(to + i + half, high * load(cos + i + half) + low * load(sin + i + half));
  }
}

// Head `from` into `to`, by way of norm and rotation.
template <class Type>
void move_head(const RopeAndStoreArgs& args, const typename Type::Element* from, const void* norm,
               int64_t token, typename Type::Element* to) {
  if constexpr (std::is_same_v<Type, Float32>) {
    if (norm == nullptr && args.rotary_dim == args.head_dim && args.rotary_dim % (2 * kLanes) == 0) {
      const int64_t position = args.positions[token];
      return rotate_vectors(from, args.cos + position * args.cos_stride,
                            args.sin + position * args.sin_stride, args.rotary_dim, to);
    }
  }
  float x[kWidth];
  for (int64_t i = 0; i < args.head_dim; ++i) x[i] = Type::get(from[i]);
  if (norm != nullptr) {
    normalise<Type>(x, static_cast<const typename Type::Element*>(norm), args.head_dim,
                    args.norm_eps);
  }
  if (args.rotary_dim > 0) {
    const int64_t position = args.positions[token];
    rotate(x, args.cos + position * args.cos_stride, args.sin + position * args.sin_stride,
           args.rotary_dim);
  }
  for (int64_t i = 0; i < args.head_dim; ++i) to[i] = Type::set(x[i]);
}

template <class Type>
void run_token(const RopeAndStoreArgs& args, int64_t n) {
  using Element = typename Type::Element;
  if (args.rotary_dim > 0 || args.q_norm != nullptr) {
    Element* q = static_cast<Element*>(args.q) + n * args.q_strides[0];
    for (int64_t h = 0; h < args.query_heads; ++h, q += args.q_strides[1]) {
      move_head<Type>(args, q, args.q_norm, n, q);
    }
  }
  if (args.slots[n] < 0) return;
  const int64_t page = args.slots[n] / args.page_size;
  const int64_t slot = args.slots[n] % args.page_size;
  const Element* k = static_cast<const Element*>(args.k) + n * args.k_strides[0];
  const Element* v = static_cast<const Element*>(args.v) + n * args.v_strides[0];
  Element* key =
      static_cast<Element*>(args.keys) + page * args.key_strides[0] + slot * args.key_strides[1];
  Element* value = static_cast<Element*>(args.values) + page * args.value_strides[0] +
                   slot * args.value_strides[1];
  for (int64_t h = 0; h < args.kv_heads; ++h) {
    move_head<Type>(args, k + h * args.k_strides[1], args.k_norm, n, key + h * args.key_strides[2]);
    std::memcpy(value + h * args.value_strides[2], v + h * args.v_strides[1],
                args.head_dim * sizeof(Element));
  }
}

template <class Type>
void run(const RopeAndStoreArgs& args) {
  const int64_t each = (args.query_heads + 2 * args.kv_heads) * args.head_dim;
  parallel_for(args.tokens, larger(1, kChunk / each), args.threads, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) run_token<Type>(args, n);
  });
}

}  // namespace

void rope_and_store(const RopeAndStoreArgs& args) {
  if (args.dtype == DType::f32) return run<Float32>(args);
  run<BFloat16>(args);
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
