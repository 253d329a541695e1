// Products add to the residual and to each other's gradients instead of a pass of their own; norms and
// swiglu are formed again in backward; gradients are written over what they were made from.
#include "cpu/decoder_layer.h"

#include "cpu/layer_gradients.h"
#include "cpu/matmul.h"
#include "cpu/packed_attention.h"
#include "cpu/rms_norm.h"
#include "cpu/vec.h"

namespace rlhf_fast {
namespace RLHF_FAST_ISA {
namespace {

constexpr float kZero = 0.0f, kOne = 1.0f;

// A matrix in memory whose rows are `stride` apart, or the transpose of it. Which of the two cannot be told
// from strides: of a single row or column both are 1.
struct Matrix {
  const float* data;
  int64_t stride;
  bool turned;

  int64_t row() const { return turned ? 1 : stride; }
  int64_t column() const { return turned ? stride : 1; }
};

inline Matrix plain(const float* data, int64_t stride) { return {data, stride, false}; }
inline Matrix turned(const float* data, int64_t stride) { return {data, stride, true}; }

void copy_rows(const float* from, int64_t from_row, float* to, int64_t to_row, int64_t rows,
               int64_t columns) {
  for (int64_t i = 0; i < rows; ++i) {
    std::memcpy(to + i * to_row, from + i * from_row, static_cast<size_t>(columns) * 4);
  }
}

class Layer {
 public:
  explicit Layer(const DecoderLayerArgs& args)
      : a_(args),
        w_(args.weights),
        kept_(args.kept),
        q_(args.heads * args.head_dim),
        kv_(args.kv_heads * args.head_dim),
        qkv_(q_ + 2 * kv_),
        normed_(args.weights.q_norm != nullptr),
        one_product_(tiles_usable()) {}

  void forward() {
    norm(a_.x, w_.input_norm, a_.out);
    project(a_.out);
    if (normed_) {
      norm_heads(kept_.qkv, w_.q_norm, a_.heads, kept_.q);
      norm_heads(kept_.qkv + q_, w_.k_norm, a_.kv_heads, kept_.k);
    }
    rotate(kept_.q, normed_ ? q_ : qkv_, a_.heads, false);
    rotate(kept_.k, normed_ ? kv_ : qkv_, a_.kv_heads, false);
    PackedAttentionArgs attention = attention_args();
    RLHF_FAST_ISA::packed_attention(attention);
    multiply(plain(kept_.attended, q_), turned(w_.o, q_), a_.tokens, q_, a_.hidden, a_.x, a_.hidden,
             kept_.y, a_.hidden);
    if (w_.o_bias != nullptr) add_bias(w_.o_bias, kept_.y);
    norm(kept_.y, w_.post_norm, a_.out);
    const Matrix rows = plain(a_.out, a_.hidden);
    multiply(rows, turned(w_.gate, a_.hidden), a_.tokens, a_.hidden, a_.inner, nullptr, 0, kept_.gate,
             a_.inner);
    multiply(rows, turned(w_.up, a_.hidden), a_.tokens, a_.hidden, a_.inner, nullptr, 0, kept_.up,
             a_.inner);
    SwigluArgs gated;
    gated.count = a_.tokens * a_.inner;
    gated.gate = kept_.gate;
    gated.up = kept_.up;
    gated.out = a_.product;
    gated.threads = a_.threads;
    RLHF_FAST_ISA::swiglu(gated);
    multiply(plain(a_.product, a_.inner), turned(w_.down, a_.inner), a_.tokens, a_.inner, a_.hidden,
             kept_.y, a_.hidden, a_.out, a_.hidden);
  }

  void backward() {
    float* rows = a_.room;                            // of a norm, formed again
    float* of_rows = rows + a_.tokens * a_.hidden;    // its gradient
    float* first = of_rows + a_.tokens * a_.hidden;   // swiglu's result, then the gradient of q|k|v
    float* second = first + a_.tokens * larger(a_.inner, qkv_);  // swiglu's gradient, then attention's
    float* heads = second + a_.tokens * larger(a_.inner, q_);
    of_inner(rows, of_rows, first, second);
    of_attention(first, second, heads);
    of_input(rows, of_rows, first);
  }

 private:
  // From out to y.
  void of_inner(float* rows, float* of_rows, float* product, float* spread) {
    multiply(plain(a_.above, a_.hidden), plain(w_.down, a_.inner), a_.tokens, a_.hidden, a_.inner,
             nullptr, 0, spread, a_.inner);
    SwigluArgs gated;
    gated.count = a_.tokens * a_.inner;
    gated.gate = kept_.gate;
    gated.up = kept_.up;
    gated.out = product;
    gated.grad_out = spread;
    gated.grad_gate = kept_.gate;
    gated.grad_up = kept_.up;
    gated.threads = a_.threads;
    RLHF_FAST_ISA::swiglu(gated);
    norm(kept_.y, w_.post_norm, rows);
    of_weight(a_.above, a_.hidden, a_.hidden, product, a_.inner, a_.gradients.down);
    of_weight(kept_.gate, a_.inner, a_.inner, rows, a_.hidden, a_.gradients.gate);
    of_weight(kept_.up, a_.inner, a_.inner, rows, a_.hidden, a_.gradients.up);
    multiply(plain(kept_.gate, a_.inner), plain(w_.gate, a_.hidden), a_.tokens, a_.inner, a_.hidden,
             nullptr, 0, of_rows, a_.hidden);
    multiply(plain(kept_.up, a_.inner), plain(w_.up, a_.hidden), a_.tokens, a_.inner, a_.hidden,
             of_rows, a_.hidden, of_rows, a_.hidden);
    of_norm(kept_.y, w_.post_norm, of_rows, a_.above, a_.gradients.post_norm);
  }

  // From y, whose gradient is in below, to q|k|v before norms and rotation.
  void of_attention(float* of_qkv, float* of_attended, float* room) {
    of_weight(a_.below, a_.hidden, a_.hidden, kept_.attended, q_, a_.gradients.o);
    of_bias(a_.below, a_.hidden, a_.hidden, a_.gradients.o_bias);
    multiply(plain(a_.below, a_.hidden), plain(w_.o, q_), a_.tokens, a_.hidden, q_, nullptr, 0,
             of_attended, q_);
    PackedAttentionArgs attention = attention_args();
    attention.grad_out = {of_attended, q_, a_.head_dim};
    attention.grad_q = {of_qkv, qkv_, a_.head_dim};
    attention.grad_k = {of_qkv + q_, qkv_, a_.head_dim};
    attention.grad_v = {of_qkv + q_ + kv_, qkv_, a_.head_dim};
    RLHF_FAST_ISA::packed_attention_backward(attention);
    rotate(of_qkv, qkv_, a_.heads, true);
    rotate(of_qkv + q_, qkv_, a_.kv_heads, true);
    if (!normed_) return;
    of_head_norm(kept_.qkv, w_.q_norm, of_qkv, a_.heads, a_.gradients.q_norm, room);
    of_head_norm(kept_.qkv + q_, w_.k_norm, of_qkv + q_, a_.kv_heads, a_.gradients.k_norm, room);
  }

  // From q|k|v and y to x.
  void of_input(float* rows, float* of_rows, float* of_qkv) {
    norm(a_.x, w_.input_norm, rows);
    const float* part = of_qkv;
    const float* add = nullptr;
    const float* weights[] = {w_.q, w_.k, w_.v};
    const int64_t widths[] = {q_, kv_, kv_};
    for (int i = 0; i < 3; ++i) {
      int64_t width = widths[i];
      const float* weight = weights[i];
      while (one_product_ && i < 2 && weights[i + 1] == weights[i] + widths[i] * a_.hidden) {
        width += widths[++i];
      }
      multiply(plain(part, qkv_), plain(weight, a_.hidden), a_.tokens, width, a_.hidden, add, a_.hidden,
               of_rows, a_.hidden);
      add = of_rows;
      part += width;
    }
    of_weight(of_qkv, qkv_, qkv_, rows, a_.hidden, a_.gradients.q);
    of_bias(of_qkv, qkv_, q_, a_.gradients.q_bias);
    of_bias(of_qkv + q_, qkv_, kv_, a_.gradients.k_bias);
    of_bias(of_qkv + q_ + kv_, qkv_, kv_, a_.gradients.v_bias);
    of_norm(a_.x, w_.input_norm, of_rows, a_.below, a_.gradients.input_norm);
  }

  // q, k and v: in one product where weights, and biases, lie one after another and that changes no
  // bit of a result.
  void project(const float* rows) {
    const float* weights[] = {w_.q, w_.k, w_.v};
    const float* biases[] = {w_.q_bias, w_.k_bias, w_.v_bias};
    const int64_t widths[] = {q_, kv_, kv_};
    float* out = kept_.qkv;
    for (int i = 0; i < 3; ++i) {
      int64_t width = widths[i];
      const float *weight = weights[i], *bias = biases[i];
      while (one_product_ && i < 2 && weights[i + 1] == weights[i] + widths[i] * a_.hidden &&
             (bias == nullptr ? biases[i + 1] == nullptr : biases[i + 1] == biases[i] + widths[i])) {
        width += widths[++i];
      }
      multiply(plain(rows, a_.hidden), turned(weight, a_.hidden), a_.tokens, a_.hidden, width, bias, 0,
               out, qkv_);
      out += width;
    }
  }

  // out [rows, columns] = a b (+ add).
  void multiply(const Matrix& a, const Matrix& b, int64_t rows, int64_t inner, int64_t columns,
                const float* add, int64_t add_row, float* out, int64_t out_row) {
    if (tiles_usable()) {
      MatmulArgs args;
      args.rows = rows;
      args.inner = inner;
      args.columns = columns;
      args.a = a.data;
      args.a_row = a.row();
      args.a_inner = a.column();
      args.b = b.data;
      args.b_inner = b.row();
      args.b_column = b.column();
      args.add = add;
      args.add_row = add_row;
      args.out = out;
      args.out_row = out_row;
      args.scratch = a_.scratch;
      args.threads = a_.threads;
      return RLHF_FAST_ISA::matmul(args);
    }
    if (rows == 0 || columns == 0) return;
    if (add != nullptr && add != out) copy_rows(add, add_row, out, out_row, rows, columns);
    if (inner == 0) {
      for (int64_t i = 0; add == nullptr && i < rows; ++i) {
        std::memset(out + i * out_row, 0, static_cast<size_t>(columns) * 4);
      }
      return;
    }
    // Column-major it is out^T = b^T a^T.
    a_.sgemm(b.turned ? "T" : "N", a.turned ? "T" : "N", &columns, &rows, &inner, &kOne, b.data,
             &b.stride, a.data, &a.stride, add == nullptr ? &kZero : &kOne, out, &out_row);
  }

  void of_weight(const float* above, int64_t above_row, int64_t outputs, const float* rows,
                 int64_t inputs, float* gradient) {
    if (gradient == nullptr) return;
    multiply(turned(above, above_row), plain(rows, inputs), outputs, a_.tokens, inputs, nullptr, 0,
             gradient, inputs);
  }

  // Sums of columns, in fp64: there may be many rows.
  void of_bias(const float* above, int64_t above_row, int64_t columns, float* gradient) {
    if (gradient == nullptr) return;
    constexpr int64_t kColumns = 64;
    for (int64_t begin = 0; begin < columns; begin += kColumns) {
      const int64_t count = smaller(kColumns, columns - begin);
      double sums[kColumns] = {};
      for (int64_t i = 0; i < a_.tokens; ++i) {
        const float* row = above + i * above_row + begin;
        for (int64_t j = 0; j < count; ++j) sums[j] += row[j];
      }
      for (int64_t j = 0; j < count; ++j) gradient[begin + j] = static_cast<float>(sums[j]);
    }
  }

  void add_bias(const float* bias, float* out) {
    for (int64_t i = 0; i < a_.tokens; ++i) {
      for (int64_t j = 0; j < a_.hidden; ++j) out[i * a_.hidden + j] += bias[j];
    }
  }

  void norm(const float* x, const float* weight, float* out) {
    RmsNormArgs args;
    args.rows = a_.tokens;
    args.columns = a_.hidden;
    args.x = {const_cast<float*>(x), a_.hidden, 0};
    args.weight = weight;
    args.out = {out, a_.hidden, 0};
    args.eps = a_.eps;
    args.threads = a_.threads;
    RLHF_FAST_ISA::rms_norm(args);
  }

  void norm_heads(float* x, const float* weight, int64_t heads, float* out) {
    RmsNormArgs args;
    args.rows = a_.tokens * heads;
    args.inner = heads;
    args.columns = a_.head_dim;
    args.x = {x, qkv_, a_.head_dim};
    args.weight = weight;
    args.out = {out, heads * a_.head_dim, a_.head_dim};
    args.eps = a_.eps;
    args.threads = a_.threads;
    RLHF_FAST_ISA::rms_norm(args);
  }

  // Into below, with the residual's gradient.
  void of_norm(const float* x, const float* weight, const float* grad_y, const float* residual,
               float* grad_weight) {
    RmsNormBackwardArgs args;
    args.rows = a_.tokens;
    args.columns = a_.hidden;
    args.x = x;
    args.weight = weight;
    args.grad_y = grad_y;
    args.eps = a_.eps;
    args.residual = residual;
    args.grad_x = a_.below;
    args.grad_weight = grad_weight;
    args.threads = a_.threads;
    RLHF_FAST_ISA::rms_norm_backward(args);
  }

  // Heads lie apart in q|k|v, and the op reads rows one after another.
  void of_head_norm(const float* raw, const float* weight, float* gradient, int64_t heads,
                    float* grad_weight, float* room) {
    const int64_t width = heads * a_.head_dim;
    float* grad = room + a_.tokens * width;
    copy_rows(raw, qkv_, room, width, a_.tokens, width);
    copy_rows(gradient, qkv_, grad, width, a_.tokens, width);
    RmsNormBackwardArgs args;
    args.rows = a_.tokens * heads;
    args.columns = a_.head_dim;
    args.x = room;
    args.weight = weight;
    args.grad_y = grad;
    args.eps = a_.eps;
    args.grad_x = grad;
    args.grad_weight = grad_weight;
    args.threads = a_.threads;
    RLHF_FAST_ISA::rms_norm_backward(args);
    copy_rows(grad, width, gradient, qkv_, a_.tokens, width);
  }

  void rotate(float* x, int64_t token_stride, int64_t heads, bool transposed) {
    RotaryArgs args;
    args.tokens = a_.tokens;
    args.heads = heads;
    args.half = a_.head_dim / 2;
    args.x = x;
    args.token_stride = token_stride;
    args.head_stride = a_.head_dim;
    args.cos = a_.cos;
    args.sin = a_.sin;
    args.out = x;
    args.out_token_stride = token_stride;
    args.out_head_stride = a_.head_dim;
    args.transposed = transposed;
    args.threads = a_.threads;
    RLHF_FAST_ISA::rotary(args);
  }

  PackedAttentionArgs attention_args() {
    PackedAttentionArgs args;
    args.segments = a_.segments;
    args.query_heads = a_.heads;
    args.kv_heads = a_.kv_heads;
    args.head_dim = a_.head_dim;
    args.cu_seqlens = a_.cu_seqlens;
    args.scale = a_.scale;
    args.window = a_.window;
    args.q = {kept_.q, normed_ ? q_ : qkv_, a_.head_dim};
    args.k = {kept_.k, normed_ ? kv_ : qkv_, a_.head_dim};
    args.v = {kept_.qkv + q_ + kv_, qkv_, a_.head_dim};
    args.out = {kept_.attended, q_, a_.head_dim};
    args.lse = kept_.lse;
    args.threads = a_.threads;
    return args;
  }

  const DecoderLayerArgs& a_;
  const LayerParameters<const float>& w_;
  const LayerKept& kept_;
  const int64_t q_, kv_, qkv_;  // widths
  const bool normed_;
  // On tiles a column has its bits whatever lies beside it. BLAS chooses by the shape of the product, and
  // weights in one buffer would give other numbers than their copy elsewhere.
  const bool one_product_;
};

}  // namespace

void decoder_layer_forward(const DecoderLayerArgs& args) { Layer(args).forward(); }

void decoder_layer_backward(const DecoderLayerArgs& args) { Layer(args).backward(); }

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
