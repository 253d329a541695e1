// Ops on the simulated devices: the CPU's kernels over the same memory.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/transformers/attention.h>
#include <torch/library.h>

#include <cstring>
#include <set>

#include "simulated.h"

namespace simulated {

namespace {

Tensor tensor_over(const Tensor& like, c10::DispatchKey key, c10::Storage storage) {
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(key), like.dtype());
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(),
                                                      like.storage_offset());
  if (like.is_conj()) tensor._set_conj(true);
  if (like.is_neg()) tensor._set_neg(true);
  return tensor;
}

// The same memory as a CPU tensor, which keeps it alive.
Tensor seen_from_host(const Tensor& tensor) {
  auto* held = new c10::Storage(tensor.storage());
  at::DataPtr memory(tensor.storage().mutable_data(), held,
                     [](void* context) { delete static_cast<c10::Storage*>(context); },
                     c10::Device(c10::kCPU));
  c10::Storage storage(c10::Storage::use_byte_size_t(), tensor.storage().nbytes(),
                       std::move(memory), nullptr, false);
  return tensor_over(tensor, c10::DispatchKey::CPU, std::move(storage));
}

Tensor copied_to_device(const Tensor& result) {
  size_t elements = result.numel() ? result.storage_offset() + 1 : 0;
  for (int64_t d = 0; d < result.dim() && result.numel(); ++d)
    elements += (result.size(d) - 1) * result.stride(d);
  const size_t bytes = elements * result.dtype().itemsize();
  auto memory = device_allocator.allocate(bytes);
  if (bytes) memcpy(memory.get(), result.storage().data(), bytes);
  c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, std::move(memory),
                       &device_allocator, true);
  return tensor_over(result, c10::DispatchKey::CUDA, std::move(storage));
}

const std::set<std::string> TAKE_HOST_INDICES = {
    "aten::index.Tensor",      "aten::index.Tensor_out",      "aten::index_put",
    "aten::index_put_",        "aten::_index_put_impl_",      "aten::_unsafe_index.Tensor",
    "aten::_unsafe_index_put",
};
const std::set<std::string> GIVE_THE_HOST_A_NUMBER = {
    "aten::_local_scalar_dense", "aten::nonzero",       "aten::equal",
    "aten::masked_select",       "aten::_unique2",      "aten::unique_consecutive",
    "aten::unique_dim",          "aten::bincount",      "aten::repeat_interleave.Tensor",
};

std::string name_of(const c10::FunctionSchema& schema) {
  const auto& overload = schema.overload_name();
  return schema.operator_name().name + (overload.empty() ? "" : "." + overload);
}

// One call of an op: its arguments as the host sees them, and the results back on the device.
class Call {
 public:
  explicit Call(const c10::OperatorHandle& op) : op_(op), name_(name_of(op.schema())) {}

  void run(Stack* stack) {
    const size_t count = op_.schema().arguments().size();
    auto arguments = torch::jit::last(*stack, count).vec();
    for (size_t i = 0; i < count; ++i) take(arguments[i], op_.schema().arguments()[i]);
    index_ = index_of(index_);
    TORCH_CHECK(!of_host_ || TAKE_HOST_INDICES.count(name_),
                "Expected all tensors to be on the same device, but found at least two devices, "
                "cuda:", static_cast<int>(index_), " and cpu! (simulated, ", name_, ")");
    if (GIVE_THE_HOST_A_NUMBER.count(name_)) waits_for_the_device(name_);
    for (size_t i = 0; i < count; ++i)
      if (arguments[i].isNone() && op_.schema().arguments()[i].name() == "generator")
        arguments[i] = host_generator(default_generator(index_));

    Stack results(arguments.begin(), arguments.end());
    {
      at::AutoDispatchBelowADInplaceOrView guard;
      op_.callBoxed(&results);
    }
    OnDevice device(index_);
    for (auto& [target, result] : resized_) {
      if (target.sizes() != result.sizes()) target.resize_(result.sizes());
      if (result.numel()) seen_from_host(target).copy_(result);
    }
    torch::jit::drop(*stack, count);
    for (auto& result : results) give_back(result, stack);
    const bool only_a_view = outputs_.empty() && !op_.schema().is_mutable();
    if (recording() && !only_a_view)
      capturing->steps.push_back({op_, std::move(arguments), std::move(outputs_), {}});
  }

 private:
  void take(c10::IValue& value, const c10::Argument& argument) {
    const bool written = argument.alias_info() && argument.alias_info()->isWrite();
    if (value.isTensor()) {
      value = take(value.toTensor(), written);
    } else if (value.isTensorList()) {
      std::vector<Tensor> list;
      for (const Tensor& tensor : value.toTensorVector()) list.push_back(take(tensor, written));
      value = c10::IValue(list);
    } else if (value.isOptionalTensorList()) {
      take_indices(value);
    } else if (value.isDevice() && value.toDevice().is_cuda()) {
      if (index_ < 0) index_ = index_of(value.toDevice().index());
      value = c10::Device(c10::kCPU);
    } else if (value.isGenerator() && value.toGenerator().defined()) {
      const auto generator = value.toGenerator();
      TORCH_CHECK(generator.device().is_cuda(), "Expected a 'cuda' device type for generator but "
                  "found 'cpu' (simulated, ", name_, ")");
      value = host_generator(generator);
    }
  }

  void take_indices(c10::IValue& value) {
    c10::List<std::optional<Tensor>> list;
    for (std::optional<Tensor> tensor : value.toOptionalTensorList()) {
      const bool given = tensor && tensor->defined();
      if (given && tensor->scalar_type() == at::kBool)
        waits_for_the_device(name_ + " with a mask");
      if (given && tensor->is_cpu() && tensor->dim() > 0)
        waits_for_the_device(name_ + " with an index of the host");
      list.push_back(given ? std::optional<Tensor>(take(*tensor, false)) : std::nullopt);
    }
    value = list;
  }

  Tensor take(const Tensor& tensor, bool written) {
    if (!tensor.defined()) return tensor;
    if (!tensor.is_cuda()) {
      of_host_ = of_host_ || tensor.dim() > 0;  // a number may come from anywhere
      return tensor;
    }
    TORCH_CHECK(index_ < 0 || index_ == tensor.get_device(),
                "Expected all tensors to be on the same device, but found at least two devices, "
                "cuda:", static_cast<int>(index_), " and ", tensor.device(), "! (simulated, ",
                name_, ")");
    index_ = tensor.get_device();
    for (const auto& [device, host] : pairs_)
      if (device.unsafeGetTensorImpl() == tensor.unsafeGetTensorImpl()) return host;
    Tensor host;
    if (written && tensor.numel() == 0) {  // an `out` that the op is going to size
      host = at::empty(tensor.sizes(), tensor.options().device(c10::kCPU));
      resized_.emplace_back(tensor, host);
    } else {
      host = seen_from_host(tensor);
    }
    pairs_.emplace_back(tensor, host);
    return host;
  }

  void give_back(const c10::IValue& result, Stack* stack) {
    if (result.isTensor()) {
      torch::jit::push(*stack, give_back(result.toTensor()));
    } else if (result.isTensorList()) {
      std::vector<Tensor> list;
      for (const Tensor& tensor : result.toTensorVector()) list.push_back(give_back(tensor));
      torch::jit::push(*stack, c10::IValue(list));
    } else {
      torch::jit::push(*stack, result);
      ++position_;
    }
  }

  Tensor give_back(const Tensor& result) {
    const size_t position = position_++;
    if (!result.defined()) return result;
    for (const auto& [device, host] : pairs_)
      if (host.unsafeGetTensorImpl() == result.unsafeGetTensorImpl()) return device;
    for (const auto& [device, host] : pairs_)
      if (host.storage().unsafeGetStorageImpl() == result.storage().unsafeGetStorageImpl())
        return tensor_over(result, c10::DispatchKey::CUDA, device.storage());  // a view
    auto tensor = copied_to_device(result);
    if (recording()) outputs_.emplace_back(position, seen_from_host(tensor));
    return tensor;
  }

  c10::OperatorHandle op_;
  std::string name_;
  c10::DeviceIndex index_ = -1;
  bool of_host_ = false;
  size_t position_ = 0;
  std::vector<std::pair<Tensor, Tensor>> pairs_;    // device, host
  std::vector<std::pair<Tensor, Tensor>> resized_;  // device, host
  std::vector<std::pair<size_t, Tensor>> outputs_;
};

void on_the_host(const c10::OperatorHandle& op, Stack* stack) { Call(op).run(stack); }

Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype,
             std::optional<at::Layout>, std::optional<at::Device> device,
             std::optional<bool> pinned, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!pinned.value_or(false), "Only dense CPU tensors can be pinned");
  const auto index = index_of(device ? device->index() : -1);
  TORCH_CHECK(index < device_count, "CUDA error: invalid device ordinal");
  OnDevice there(index);
  return at::detail::empty_generic(
      C10_AS_INTARRAYREF_SLOW(size), &device_allocator,
      c10::DispatchKeySet(c10::DispatchKey::CUDA),
      dtype.value_or(at::get_default_dtype_as_scalartype()), format);
}

Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                     std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                     std::optional<at::Device> device, std::optional<bool>) {
  OnDevice there(index_of(device ? device->index() : -1));
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &device_allocator,
      c10::DispatchKeySet(c10::DispatchKey::CUDA),
      dtype.value_or(at::get_default_dtype_as_scalartype()));
}

Tensor& copy(Tensor& self, const Tensor& source, bool non_blocking) {
  if (self.device().type() != source.device().type() && self.numel() > 0) {
    const Tensor& of_host = self.is_cuda() ? source : self;
    if (!non_blocking || !is_pinned(of_host.storage().data()))
      waits_for_the_device("copy_ between host and device");
  }
  const Tensor target = self.is_cuda() ? seen_from_host(self) : self;
  const Tensor from = source.is_cuda() ? seen_from_host(source) : source;
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::copy_", "");
  if (recording()) capturing->steps.push_back({op, {target, from, false}, {}, {}});
  at::AutoDispatchBelowADInplaceOrView guard;
  target.copy_(from);
  return self;
}

}  // namespace

void resize_storage(c10::StorageImpl* storage, size_t bytes, c10::DeviceIndex index) {
  OnDevice there(index);
  auto memory = device_allocator.allocate(bytes);
  const size_t kept = std::min(bytes, storage->nbytes());
  if (kept) memcpy(memory.get(), storage->data(), kept);
  storage->set_data_ptr_noswap(std::move(memory));
  storage->set_nbytes(bytes);
}

namespace {

const Tensor& resize(const Tensor& self, c10::SymIntArrayRef size,
                     std::optional<at::MemoryFormat>) {
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  const size_t bytes =
      (c10::multiply_integers(sizes) + self.storage_offset()) * self.dtype().itemsize();
  auto* storage = self.storage().unsafeGetStorageImpl();
  if (bytes > storage->nbytes()) resize_storage(storage, bytes, self.get_device());
  self.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return self;
}

Tensor& set_to(Tensor& self, at::Storage source, at::IntArrayRef sizes, at::IntArrayRef strides,
               int64_t offset) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_sizes_and_strides(sizes, strides, offset);
  return self;
}

Tensor& set_all(Tensor& self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size,
                c10::SymIntArrayRef stride) {
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  c10::DimVector strides(C10_AS_INTARRAYREF_SLOW(stride));
  if (strides.size() != sizes.size()) strides = c10::contiguous_strides(sizes);
  return set_to(self, std::move(source), sizes, strides, offset.expect_int());
}

Tensor& set_storage(Tensor& self, at::Storage source) {
  const int64_t elements = source.nbytes() / self.dtype().itemsize();
  return set_to(self, std::move(source), {elements}, {1}, 0);
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_to(self, source.storage(), source.sizes(), source.strides(), source.storage_offset());
}

Tensor& set_empty(Tensor& self) { return set_tensor(self, at::empty({0}, self.options())); }

void record_stream(Tensor&, at::Stream) {}

// Products of half precision with fp32 results are CUDA's alone.
void check_half(const Tensor& a, const Tensor& b, at::ScalarType dtype, const Tensor& out) {
  const bool half = a.scalar_type() == at::kBFloat16 || a.scalar_type() == at::kHalf;
  TORCH_CHECK(half && a.scalar_type() == b.scalar_type() && dtype == at::kFloat &&
                  out.scalar_type() == dtype,
              "products with out_dtype (simulated) give fp32 from one half precision");
}

Tensor& addmm_out(const Tensor& c, const Tensor& a, const Tensor& b, at::ScalarType dtype,
                  const at::Scalar& beta, const at::Scalar& alpha, Tensor& out) {
  check_half(a, b, dtype, out);
  const auto sum = at::addmm(c.to(dtype), a.to(dtype), b.to(dtype), beta, alpha);
  if (out.sizes() != sum.sizes()) out.resize_(sum.sizes());
  return out.copy_(sum);
}

Tensor addmm(const Tensor& c, const Tensor& a, const Tensor& b, at::ScalarType dtype,
             const at::Scalar& beta, const at::Scalar& alpha) {
  auto out = at::empty({a.size(0), b.size(1)}, a.options().dtype(dtype));
  return addmm_out(c, a, b, dtype, beta, alpha, out);
}

Tensor& mm_out(const Tensor& a, const Tensor& b, at::ScalarType dtype, Tensor& out) {
  check_half(a, b, dtype, out);
  const auto product = at::mm(a.to(dtype), b.to(dtype));
  if (out.sizes() != product.sizes()) out.resize_(product.sizes());
  return out.copy_(product);
}

Tensor mm(const Tensor& a, const Tensor& b, at::ScalarType dtype) {
  auto out = at::empty({a.size(0), b.size(1)}, a.options().dtype(dtype));
  return mm_out(a, b, dtype, out);
}

int64_t plain_attention(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&,
                        double, bool, std::optional<double>, bool) {
  return 0;  // SDPBackend::math
}

TORCH_LIBRARY_IMPL(_, CUDA, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_host>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("copy_", copy);
  library.impl("resize_", resize);
  library.impl("set_.source_Storage", set_storage);
  library.impl("set_.source_Storage_storage_offset", set_all);
  library.impl("set_.source_Tensor", set_tensor);
  library.impl("set_", set_empty);
  library.impl("record_stream", record_stream);
  library.impl("mm.dtype", mm);
  library.impl("mm.dtype_out", mm_out);
  library.impl("addmm.dtype", addmm);
  library.impl("addmm.dtype_out", addmm_out);
}

}  // namespace

}  // namespace simulated

namespace at::native {
REGISTER_CUDA_DISPATCH(_fused_sdp_choice_stub, &simulated::plain_attention)
}
