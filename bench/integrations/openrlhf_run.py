"""One PPO step of OpenRLHF by its own code, in one process on a CPU: samples to stepped weights.

Driven are `RemoteExperienceMaker.make_experience` and `compute_advantages_and_returns` on
`Experience` objects, then `training_step` of the actor's and the critic's trainer on its `Actor`
and critic modules. In the place of Ray's groups and of DeepSpeed's strategy stand a call in this
process and a plain optimizer. For tests and benches alone.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from . import models

MAKER = "openrlhf.trainer.ppo_utils.experience_maker"


@dataclass(frozen=True)
class Sizes(models.Sizes):
    """Of the model and of the batch, and where the KL penalty goes."""

    kl_in_loss: bool = False


TINY = Sizes(vocab=64, hidden=32, layers=2, rows=4, prompt=6, response=10)


class Run:
    """Actor, reference and critic of one shape, the same at every construction."""

    def __init__(self, sizes: Sizes = TINY) -> None:
        self.sizes = sizes
        self.args = _arguments(sizes)
        actor = importlib.import_module("openrlhf.models.actor").Actor
        actor_trainer = importlib.import_module("openrlhf.trainer.ray.ppo_actor").ActorPPOTrainer
        critic_trainer = importlib.import_module("openrlhf.trainer.ray.ppo_critic").CriticPPOTrainer
        self.actor, self.reference = (
            actor(models.causal_lm(sizes, 0)),
            actor(models.causal_lm(sizes, 1)),
        )
        for module in (self.actor, self.reference):
            module.packing_samples = False
            module.temperature = 0.9
        self.critic = _critic(sizes)
        strategy = _Strategy(self.args)
        self.optimizers = [
            torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (self.actor, self.critic)
        ]
        schedules = [torch.optim.lr_scheduler.ConstantLR(o, factor=1.0) for o in self.optimizers]
        options = {"micro_train_batch_size": sizes.rows, "buffer_cpu_offload": False}
        with (
            # They ask for a GPU and for other ranks, for a buffer that no step here reads.
            mock.patch("torch.cuda.current_device", return_value=0),
            mock.patch("openrlhf.trainer.ray.ppo_actor.torch_dist_barrier_and_cuda_sync"),
        ):
            self.actor_trainer = actor_trainer(
                *(strategy, self.actor, None, self.optimizers[0], schedules[0]), **options
            )
            self.critic_trainer = critic_trainer(
                *(strategy, self.critic, self.optimizers[1], schedules[1]), **options
            )
        groups = (_group(self.actor), _group(self.critic), None, _group(self.reference))
        self.kl = SimpleNamespace(value=0.1)
        maker = importlib.import_module(MAKER).RemoteExperienceMaker
        self.maker = maker(*groups, self.kl, strategy, None)

    def step(self) -> dict[str, Any]:
        """Samples to stepped weights; what was computed on the way."""
        in_process = SimpleNamespace(get=lambda x: x, put=lambda x: x)
        with mock.patch.object(importlib.import_module(MAKER), "ray", in_process):
            (experience,) = self.maker.make_experience([self.samples()])
            (experience,) = self.maker.compute_advantages_and_returns([experience])
        # As of an older policy: with every ratio 1 nothing would be clipped.
        generator = torch.Generator().manual_seed(1)
        old = experience.action_log_probs
        experience.action_log_probs = old + 0.3 * torch.randn(old.shape, generator=generator)
        mask = experience.action_mask
        names = ("action_log_probs", "values", "advantages", "returns")
        found = {name: getattr(experience, name) * mask for name in names}
        actor = self.actor_trainer.training_step(experience, self.kl.value, 0)["metrics"]
        critic = self.critic_trainer.training_step(experience, 0)
        return found | {"actor": _numbers(actor), "critic": _numbers(critic)}

    def gradients(self) -> dict[str, Tensor]:
        """What the optimizers stepped with."""
        return {n: p.grad for n, p in self._parameters() if p.grad is not None}

    def weights(self) -> dict[str, Tensor]:
        return {n: p.detach() for n, p in self._parameters()}

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        modules = {"actor": self.actor, "critic": self.critic}
        return [(f"{m}.{n}", p) for m in modules for n, p in modules[m].named_parameters()]

    def samples(self) -> Any:
        """An `Experience` as the generator leaves it: right-padded, a hole in one action mask."""
        s = self.sizes
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(4, s.vocab, (s.rows, s.prompt + s.response), generator=generator)
        at = torch.arange(ids.shape[1])
        ends = s.prompt + s.response - torch.arange(s.rows) % s.response
        attention = (at < ends.unsqueeze(1)).long()
        actions = (at >= s.prompt).long() * attention
        actions[0, s.prompt + s.response // 2] = 0  # the reply of a tool
        experience = importlib.import_module("openrlhf.trainer.ppo_utils.experience").Experience
        lengths = attention.sum(-1)
        return experience(
            sequences=ids * attention,
            attention_mask=attention,
            action_mask=actions[:, 1:],
            rewards=torch.randn(s.rows, generator=generator),
            response_length=lengths - s.prompt,
            total_length=lengths,
            truncated=torch.zeros(s.rows),
            index=list(range(s.rows)),
        )


# ---- what stands in for Ray and DeepSpeed -------------------------------------------------------


class _Strategy:
    """What the trainers ask of their strategy, of a plain optimizer."""

    ring_attn_group = None
    ds_device_mesh = None

    def __init__(self, args: Any) -> None:
        self.args = args

    def backward(self, loss: Tensor, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        loss.backward()

    def optimizer_step(
        self, optimizer: torch.optim.Optimizer, model: nn.Module, schedule: Any, name: str
    ) -> None:
        optimizer.step()
        schedule.step()

    def get_grad_norm(self, model: nn.Module) -> float:
        norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        return float(torch.stack(norms).norm())


def _group(module: nn.Module) -> Any:
    """A group of one worker, whose calls run here and whose references are the results."""

    def run(
        method_name: str,
        sequences: list[Tensor],
        action_mask: list[Tensor],
        attention_mask: list[Tensor],
    ) -> list[list[Tensor]]:
        assert method_name == "forward"
        module.eval()
        rows = zip(sequences, action_mask, attention_mask, strict=True)
        return [[module(ids, actions, attention) for ids, actions, attention in rows]]

    return SimpleNamespace(async_run_method_batch=run)


def _arguments(sizes: Sizes) -> Any:
    """The part of OpenRLHF's command line that this path reads."""

    def of(**fields: Any) -> SimpleNamespace:
        return SimpleNamespace(**fields)

    return of(
        actor=of(
            eps_clip_low_high=(0.2, 0.28),
            dual_clip=None,
            loss_agg_mode=sizes.loss_agg_mode,
            policy_loss_type="ppo",
            aux_loss_coef=0.0,
            entropy_coef=0.01,
        ),
        algo=of(
            advantage=of(
                estimator="gae",
                gamma=0.99,
                lambd=0.95,
                no_std_norm=False,
                is_correction_level="off",
                is_correction_mode="mask",
                is_correction_gating="ratio",
                is_correction_threshold=[0.5, 5.0],
            ),
            kl=of(
                use_loss=sizes.kl_in_loss, init_coef=0.1, estimator="k3", unbiased_gradient=False
            ),
        ),
        ds=of(packing_samples=False, ring_attn_size=1, tensor_parallel_size=1),
        reward=of(clip_range=(-10, 10), overlong_buffer_len=None, stop_properly_penalty_coef=None),
        rollout=of(n_samples_per_prompt=1, max_new_tokens=sizes.response),
        train=of(
            max_epochs=1,
            dynamic_batch_enable=False,
            colocate_all=False,
            colocate_actor_ref=False,
            colocate_critic_reward=False,
            async_enable=False,
        ),
        vllm=of(sync_backend="gloo"),
    )


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {n: float(torch.as_tensor(v).float().mean()) for n, v in metrics.items()}


def _critic(sizes: Sizes) -> nn.Module:
    from transformers import LlamaModel
    from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

    config = models.llama_config(sizes, normalize_reward=False)
    torch.manual_seed(2)
    make = importlib.import_module("openrlhf.models.model")._get_critic_model
    return make(LlamaPreTrainedModel, LlamaModel)(config)
