"""One optimizer step, guarded: clip, check for NaN and Inf, apply or skip, advance the schedule."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from rlhf_fast.adamw8bit import AdamW8bit
from rlhf_fast.config import OptimConfig
from rlhf_fast.errors import ConfigError, NumericalError
from rlhf_fast.optimizer_host import HostState


class StepResult(NamedTuple):
    """grad_norm before clipping; applied is false if it was not finite and nothing changed."""

    grad_norm: float
    applied: bool


class GradientExchange(Protocol):
    """What an optimizer asks of the ranks it steps together with.

    `rlhf_fast.distributed.gradients.RankGradients` is the one there is. All ranks call the same
    methods in the same order.
    """

    def shard(self, parameter: nn.Parameter) -> nn.Parameter:
        """The part that this rank steps: the parameter, or a leaf over the memory of its shard."""
        ...

    def gather(self, parameters: Sequence[nn.Parameter], shards: Sequence[nn.Parameter]) -> None:
        """Complete the gradients over the ranks and put them on the shards, None where none is."""
        ...

    def total_norm(
        self, parameters: Sequence[nn.Parameter], shards: Sequence[nn.Parameter]
    ) -> Tensor:
        """[] float32 norm of all gradients, the same on all ranks, NaN and Inf included."""
        ...


def schedule(config: OptimConfig, total_steps: int) -> Callable[[int], float]:
    """Learning-rate factor of optimizer step 0, 1, ...: linear warm-up, then decay to 0."""

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        span = max(1, total_steps - config.warmup_steps)
        done = min(1.0, (step - config.warmup_steps) / span)
        if config.schedule == "linear":
            return 1.0 - done
        if config.schedule == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * done))
        return 1.0

    return factor


def _trained(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in module.named_parameters() if p.requires_grad]


def _groups(
    named: Iterable[tuple[str, nn.Parameter]], config: OptimConfig
) -> list[dict[str, object]]:
    """Matrices with weight decay, vectors (norms and biases) without; none that is empty."""
    parameters = [p for _, p in named]
    groups: list[dict[str, object]] = []
    for decay, chosen in (
        (config.weight_decay, [p for p in parameters if p.dim() >= 2]),
        (0.0, [p for p in parameters if p.dim() < 2]),
    ):
        if chosen:
            groups.append({"params": chosen, "weight_decay": decay, "lr": config.lr})
    return groups


class InBackward:
    """Steps the parameters of an optimizer one by one, each when its gradient is complete.

    Reading each norm makes the host wait for the device, once a tensor.

    Args:
        optimizer: whose `step` moves a parameter by its own gradient and state alone.
        require_state: called before each step; raises if the state is not at hand.

    Attributes:
        stepped: tensors stepped in the last backward.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, require_state: Callable[[], None]) -> None:
        self._optimizer = optimizer
        self._require_state = require_state
        self._norms: dict[Tensor, float] = {}
        self.stepped = 0
        for index, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(_arriving(weakref.ref(self), index))

    def arrived(self, index: int, parameter: Tensor) -> None:
        """The gradient of a parameter of the group `index` is complete."""
        self._require_state()
        if parameter in self._norms:
            raise RuntimeError("step_in_backward: a second backward before the step was closed")
        if not self._norms:
            self.stepped = 0
        assert parameter.grad is not None
        finite = all(map(math.isfinite, self._norms.values()))
        self._norms[parameter] = norm = float(torch.linalg.vector_norm(parameter.grad))
        if finite and math.isfinite(norm):
            every = self._optimizer.param_groups
            self._optimizer.param_groups = [every[index] | {"params": [parameter]}]
            try:
                self._optimizer.step()
            finally:
                self._optimizer.param_groups = every
            self.stepped += 1
        parameter.grad = None

    def finish(self) -> float:
        """The norm of all gradients since the last call, NaN or Inf if one was."""
        norm = math.hypot(*self._norms.values())
        if any(map(math.isnan, self._norms.values())):
            norm = math.nan
        self._norms.clear()
        return norm


def _arriving(steps: weakref.ref[InBackward], index: int) -> Callable[[Tensor], None]:
    """A hook that does not hold what it calls.

    Python's collector does not see through the hooks of a tensor: a hook that held the optimizer,
    and so the tensor itself, would keep weights and moments to the end of the process.
    """

    def hook(parameter: Tensor) -> None:
        alive = steps()
        if alive is not None:
            alive.arrived(index, parameter)

    return hook


class GuardedOptimizer:
    """AdamW over a module's trainable parameters, its schedule, and the non-finite guard.

    Weight decay spares vectors (norms and biases). A step whose gradient norm is NaN or Inf is
    skipped before it touches weights or moments; the schedule advances all the same, so that a
    skipped step does not shift the ones after it.

    Args:
        module: its parameters with requires_grad are trained.
        config: hyper-parameters.
        total_steps: optimizer steps of the whole run, the span of the schedule.
        max_bad_steps: skipped steps in a row that raise NumericalError.
        name: the role, for messages.
        bits: 32, or 8 for moments of `AdamW8bit`.
        in_backward: step each parameter as soon as its gradient is complete, and drop the gradient:
            `backward` steps, `step` closes the books. Bit for bit the step that an ordinary
            optimizer without clipping takes after one backward. The guard then works a tensor at a
            time: from the first non-finite gradient on no further tensor is stepped, but those
            whose gradients came before it have been. Backward begins at the loss, so a NaN in the
            loss is met before any step.
        heads: further modules by name, stepped in the same step with learning rate and weight decay
            of their own config; all else is as in `config`.
        ranks: for parameters that are sharded or trained by several ranks. Each rank then steps its
            shards, ordinary tensors over the memory of the sharded parameters, and every rank skips
            a step that one would skip. The 8-bit moments of a shard are blocks of that shard.
            Excludes `in_backward`.

    Attributes:
        named_parameters: (name, what `optimizer` steps: the parameter, or this rank's shard of it).
    """

    def __init__(
        self,
        module: nn.Module,
        config: OptimConfig,
        total_steps: int,
        *,
        max_bad_steps: int = 3,
        name: str = "model",
        bits: int = 32,
        in_backward: bool = False,
        heads: Mapping[str, tuple[nn.Module, OptimConfig]] | None = None,
        ranks: GradientExchange | None = None,
    ) -> None:
        if in_backward and ranks is not None:
            raise ConfigError(
                "RF1060",
                "a step in backward with several ranks",
                where=f"optimizer of the {name}",
                expected="one rank: gradients are summed over the ranks before any is applied",
                remedy="switch step_in_backward off; shards take the memory of gradients already",
            )
        self.named_parameters: list[tuple[str, nn.Parameter]] = []
        self._whole: list[nn.Parameter] = []
        groups = self._add("", module, config, ranks)
        for head_name, (head, head_config) in (heads or {}).items():
            groups += self._add(f"{head_name}.", head, head_config, ranks)
        self._ranks = ranks
        if in_backward and config.max_grad_norm > 0:
            raise ValueError(f"in_backward needs max_grad_norm=0, got {config.max_grad_norm}")
        betas = (config.beta1, config.beta2)
        self.optimizer: torch.optim.Optimizer
        if bits == 8:
            self.optimizer = AdamW8bit(groups, lr=config.lr, betas=betas, eps=config.eps)
        else:
            self.optimizer = torch.optim.AdamW(
                groups, lr=config.lr, betas=betas, eps=config.eps, fused=True
            )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, schedule(config, total_steps)
        )
        self.max_grad_norm = config.max_grad_norm
        self.max_bad_steps = max_bad_steps
        self.name = name
        self.bad_steps = 0
        self._host = HostState(self.optimizer)
        self._in_backward = InBackward(self.optimizer, self._require_state) if in_backward else None

    def _add(
        self, prefix: str, module: nn.Module, config: OptimConfig, ranks: GradientExchange | None
    ) -> list[dict[str, object]]:
        trained = _trained(module)
        self._whole += [p for _, p in trained]
        named = [(prefix + n, p if ranks is None else ranks.shard(p)) for n, p in trained]
        self.named_parameters += named
        return _groups(named, config)

    @property
    def whole_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """`named_parameters` as the modules have them: DTensors, if shards of them are stepped."""
        names = (name for name, _ in self.named_parameters)
        return list(zip(names, self._whole, strict=True))

    @property
    def parameters(self) -> Iterable[nn.Parameter]:
        """The trained parameters."""
        return (p for _, p in self.named_parameters)

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return self.rates[0]

    @property
    def rates(self) -> list[float]:
        """The learning rate of each parameter group in the next step, those of heads last."""
        return [float(rate) for rate in self.scheduler.get_last_lr()]

    def follow_schedule(self) -> None:
        """Set the learning rate to this schedule's for the present step.

        A run resumed with another number of steps has loaded the rate of its former schedule, which
        is 0 where that one had ended.
        """
        done, bases = self.scheduler.last_epoch, self.scheduler.base_lrs
        factors = [factor(done) for factor in self.scheduler.lr_lambdas]
        rates = [base * factor for base, factor in zip(bases, factors, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self.scheduler._last_lr = rates

    def zero_grad(self) -> None:
        """Drop all gradients."""
        if self._in_backward is not None:
            self._in_backward.finish()
        self.optimizer.zero_grad(set_to_none=True)
        for parameter in self._whole:
            parameter.grad = None

    def offload_state(self) -> None:
        """Move the moments to host memory, where a checkpoint may read them; free on return."""
        self._host.offload()

    def state_tensors(self) -> Iterator[tuple[Tensor, Tensor, bool]]:
        """(parameter, state tensor, whether in host memory) of all there is."""
        return self._host.tensors()

    def restore_state(self) -> None:
        """Bring the moments back, every bit of them; does nothing if they are not away."""
        self._host.restore()

    def step(self) -> StepResult:
        """Clip and apply the accumulated gradients, then drop them.

        Raises:
            RuntimeError: the moments are in host memory.
            NumericalError: `max_bad_steps` steps in a row had a non-finite gradient.
        """
        self._require_state()
        norm = self._apply() if self._in_backward is None else self._in_backward.finish()
        applied = math.isfinite(norm)
        self.bad_steps = 0 if applied else self.bad_steps + 1
        # LambdaLR warns when the optimizer has not stepped yet; a skipped first step is legal here.
        self.optimizer._opt_called = True  # type: ignore[attr-defined]
        self.scheduler.step()
        self.zero_grad()
        if self.bad_steps >= self.max_bad_steps:
            touched = "were not touched"
            if self._in_backward is not None:
                touched = f"had been stepped in {self._in_backward.stepped} tensors when it was met"
            raise NumericalError(
                "RF6001",
                f"{self.name}: gradient norm was {norm} in {self.bad_steps} steps in a row",
                where=f"optimizer of the {self.name}",
                remedy="check rewards and data for extremes; a lower learning rate is another run, "
                f"in another output_dir or with run.overwrite=true; weights {touched}",
            )
        return StepResult(norm, applied)

    def _apply(self) -> float:
        """Step with the accumulated gradients if their norm is finite; returns it."""
        stepped = [p for _, p in self.named_parameters]
        if self._ranks is not None:
            self._ranks.gather(self._whole, stepped)
        grads: list[Tensor] = [p.grad for p in stepped if p.grad is not None]
        if self._ranks is not None:
            total = self._ranks.total_norm(self._whole, stepped)
        else:
            total = torch.nn.utils.get_total_norm(grads) if grads else torch.zeros(())
        norm = float(total)
        if math.isfinite(norm):
            if self.max_grad_norm > 0 and grads:
                torch.nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, total)
            self.optimizer.step()
        return norm

    def _require_state(self) -> None:
        if self._host.away:
            raise RuntimeError(f"{self.name}: step while the optimizer state is offloaded")
