// NCCL by gloo, on the memory of simulated devices as the host sees it.

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <torch/csrc/distributed/c10d/reducer_timer.hpp>
#include <torch/csrc/utils/pybind.h>

namespace {

using at::Tensor;
using Tensors = std::vector<Tensor>;
using Ended = c10::intrusive_ptr<c10d::Work>;

Tensor seen_from_host(const Tensor& tensor) {
  TORCH_CHECK(tensor.is_cuda(), "NCCL takes tensors of CUDA devices (simulated), not of ",
              tensor.device());
  TORCH_CHECK(tensor.is_contiguous(), "Tensors must be contiguous (simulated NCCL)");
  const auto type = tensor.scalar_type();
  TORCH_CHECK(type != at::kShort && type != at::kUInt16 && type != at::kUInt32 &&
                  !at::isComplexType(type),
              "Input tensor data type is not supported for NCCL process group: ", type);
  const Tensor held = tensor;
  return at::from_blob(tensor.mutable_data_ptr(), tensor.numel(), [held](void*) {},
                       at::TensorOptions().dtype(tensor.dtype()));
}

Tensors seen_from_host(const Tensors& tensors) {
  Tensors seen;
  for (const auto& tensor : tensors) seen.push_back(seen_from_host(tensor));
  return seen;
}

std::vector<Tensors> seen_from_host(const std::vector<Tensors>& lists) {
  std::vector<Tensors> seen;
  for (const auto& list : lists) seen.push_back(seen_from_host(list));
  return seen;
}

struct Done final : c10d::Work {
  explicit Done(Tensors outputs) : outputs_(std::move(outputs)) {
    future_ = c10::make_intrusive<c10::ivalue::Future>(
        c10::ListType::create(c10::TensorType::get()));
    future_->markCompleted(c10::IValue(outputs_));
  }
  bool isCompleted() override { return true; }
  bool isSuccess() const override { return true; }
  bool wait(std::chrono::milliseconds) override { return true; }
  void synchronize() override {}
  Tensors result() override { return outputs_; }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override { return future_; }

 private:
  Tensors outputs_;
  c10::intrusive_ptr<c10::ivalue::Future> future_;
};

Ended done(Tensors outputs) { return c10::make_intrusive<Done>(std::move(outputs)); }

struct NcclOptions final : c10d::Backend::Options {
  explicit NcclOptions(bool is_high_priority_stream = false)
      : Options("nccl"), is_high_priority_stream(is_high_priority_stream) {}

  bool is_high_priority_stream;
  // Of NCCL alone: gloo makes a group anew.
  c10::intrusive_ptr<c10d::Backend> split_from;
  int64_t split_color = 0;
};

class SimulatedNccl : public c10d::Backend {
 public:
  SimulatedNccl(c10::intrusive_ptr<c10d::Backend> gloo, c10::intrusive_ptr<Options> options)
      : Backend(gloo->getRank(), gloo->getSize()),
        gloo_(std::move(gloo)),
        options_(std::move(options)) {}

  const std::string getBackendName() const override { return "nccl"; }
  c10::intrusive_ptr<Options> getBackendOptions() override { return options_; }
  // How PyTorch makes the axes of a mesh where the default group is bound to a device.
  bool supportsSplitting() const override { return true; }
  c10::intrusive_ptr<Backend> split(const c10::intrusive_ptr<c10d::Store>& store,
                                    const std::vector<int>& ranks,
                                    const c10::intrusive_ptr<Options>& options) override {
    auto part = gloo_->split(store, ranks, gloo_->getBackendOptions());
    if (!part) return nullptr;
    return c10::make_intrusive<SimulatedNccl>(std::move(part), options);
  }
  bool supportsCoalescing() const override { return true; }
  void startCoalescing() override {}
  Ended endCoalescing() override { return done({}); }
  void setTimeout(std::chrono::milliseconds timeout) override { gloo_->setTimeout(timeout); }
  void setSequenceNumberForGroup() override { gloo_->setSequenceNumberForGroup(); }
  uint64_t getSequenceNumberForGroup() override { return gloo_->getSequenceNumberForGroup(); }
  void abort() override { gloo_->abort(); }
  void shutdown() override { gloo_->shutdown(); }

  Ended broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override {
    auto seen = seen_from_host(tensors);
    gloo_->broadcast(seen, options)->wait();
    return done(tensors);
  }
  Ended allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override {
    for (auto& tensor : seen_from_host(tensors)) sum(tensor, options.reduceOp);
    return done(tensors);
  }
  Ended allreduce_coalesced(Tensors& tensors,
                            const c10d::AllreduceCoalescedOptions& options) override {
    for (auto& tensor : seen_from_host(tensors)) sum(tensor, options.reduceOp);
    return done(tensors);
  }
  Ended reduce(Tensors& tensors, const c10d::ReduceOptions& options) override {
    for (auto& tensor : seen_from_host(tensors)) {
      auto all = tensor.clone();
      sum(all, options.reduceOp);
      if (rank_ == options.rootRank) tensor.copy_(all);
    }
    return done(tensors);
  }
  Ended allgather(std::vector<Tensors>& outputs, Tensors& inputs,
                  const c10d::AllgatherOptions& options) override {
    auto seen = seen_from_host(outputs);
    auto from = seen_from_host(inputs);
    gloo_->allgather(seen, from, options)->wait();
    return done(outputs[0]);
  }
  Ended _allgather_base(Tensor& output, Tensor& input,
                        const c10d::AllgatherOptions& options) override {
    auto to = seen_from_host(output), from = seen_from_host(input);
    gloo_->_allgather_base(to, from, options)->wait();
    return done({output});
  }
  Ended allgather_into_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                        const c10d::AllgatherOptions& options) override {
    for (size_t i = 0; i < outputs.size(); ++i) _allgather_base(outputs[i], inputs[i], options);
    return done(outputs);
  }
  Ended gather(std::vector<Tensors>& outputs, Tensors& inputs,
               const c10d::GatherOptions& options) override {
    auto seen = seen_from_host(outputs);
    auto from = seen_from_host(inputs);
    gloo_->gather(seen, from, options)->wait();
    return done(outputs.empty() ? Tensors{} : outputs[0]);
  }
  Ended scatter(Tensors& outputs, std::vector<Tensors>& inputs,
                const c10d::ScatterOptions& options) override {
    auto seen = seen_from_host(inputs);
    auto to = seen_from_host(outputs);
    gloo_->scatter(to, seen, options)->wait();
    return done(outputs);
  }
  Ended _reduce_scatter_base(Tensor& output, Tensor& input,
                             const c10d::ReduceScatterOptions& options) override {
    auto all = seen_from_host(input).clone();
    sum(all, options.reduceOp);
    auto to = seen_from_host(output);
    to.copy_(all.narrow(0, rank_ * to.numel(), to.numel()));
    return done({output});
  }
  Ended reduce_scatter(Tensors& outputs, std::vector<Tensors>& inputs,
                       const c10d::ReduceScatterOptions& options) override {
    auto all = at::cat(seen_from_host(inputs[0]));
    sum(all, options.reduceOp);
    auto to = seen_from_host(outputs[0]);
    to.copy_(all.narrow(0, rank_ * to.numel(), to.numel()));
    return done(outputs);
  }
  Ended reduce_scatter_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                        const c10d::ReduceScatterOptions& options) override {
    for (size_t i = 0; i < outputs.size(); ++i)
      _reduce_scatter_base(outputs[i], inputs[i], options);
    return done(outputs);
  }
  Ended alltoall_base(Tensor& output, Tensor& input, std::vector<int64_t>& output_sizes,
                      std::vector<int64_t>& input_sizes,
                      const c10d::AllToAllOptions& options) override {
    auto to = seen_from_host(output).view(output.sizes());
    auto from = seen_from_host(input).view(input.sizes());
    gloo_->alltoall_base(to, from, output_sizes, input_sizes, options)->wait();
    return done({output});
  }
  Ended send(Tensors& tensors, int to, int tag) override {
    auto seen = seen_from_host(tensors);
    gloo_->send(seen, to, tag)->wait();
    return done(tensors);
  }
  Ended recv(Tensors& tensors, int from, int tag) override {
    auto seen = seen_from_host(tensors);
    gloo_->recv(seen, from, tag)->wait();
    return done(tensors);
  }
  Ended barrier(const c10d::BarrierOptions&) override {
    gloo_->barrier(c10d::BarrierOptions())->wait();
    return done({});
  }

 private:
  // gloo knows no average.
  void sum(Tensor& tensor, c10d::ReduceOp reduction) {
    const bool average = reduction == c10d::ReduceOp::AVG;
    c10d::AllreduceOptions options;
    options.reduceOp = average ? c10d::ReduceOp(c10d::ReduceOp::SUM) : reduction;
    Tensors one{tensor};
    gloo_->allreduce(one, options)->wait();
    if (average) tensor.div_(size_);
  }

  c10::intrusive_ptr<c10d::Backend> gloo_;
  c10::intrusive_ptr<Options> options_;
};

// DistributedDataParallel times its passes on the device of its parameters.
struct HostTimer final : c10d::Timer {
  explicit HostTimer(c10::Device) {}
  std::optional<int64_t> measureDifference(Event start, Event end) override {
    const auto from = getTimestamp(start), to = getTimestamp(end);
    if (!from || !to) return std::nullopt;
    return *to - *from;
  }
};

}  // namespace

namespace c10d {
C10_REGISTER_TYPED_CLASS(TimerRegistry, c10::kCUDA, HostTimer);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  py::module_::import("torch.distributed");
  using Held = c10::intrusive_ptr<SimulatedNccl>;
  using Options = c10::intrusive_ptr<NcclOptions>;
  py::class_<SimulatedNccl, Held, c10d::Backend> nccl(module, "SimulatedNccl");
  py::class_<NcclOptions, Options, c10d::Backend::Options>(nccl, "Options")
      .def(py::init<bool>(), py::arg("is_high_priority_stream") = false)
      .def_readwrite("is_high_priority_stream", &NcclOptions::is_high_priority_stream)
      .def_readwrite("split_from", &NcclOptions::split_from)
      .def_readwrite("split_color", &NcclOptions::split_color)
      .def("__deepcopy__", [](const NcclOptions& options, py::dict) {
        return c10::make_intrusive<NcclOptions>(options);
      });
  nccl.def(py::init<c10::intrusive_ptr<c10d::Backend>, Options>())
      .def_property_readonly("options", &SimulatedNccl::getBackendOptions)
      .def("perform_nocolor_split", [](const SimulatedNccl&, py::object) {});
}
