"""One PPO step of verl by its own code, in one process on a CPU, from a batch to stepped weights.

Driven is what a worker of verl runs: `apply_kl_penalty`, `compute_advantage`, and two engines
(`FSDPEngineWithLMHead`, `FSDPEngineWithValueHead`) with `ppo_loss` and `value_loss`, microbatches,
clipping and AdamW. Not FSDP itself: the engines hold the plain modules, which they also take where
a subclass does not shard. For tests and benches alone.
"""

from __future__ import annotations

import importlib
import socket
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import models, verl_cpu

PAD = 0


@dataclass(frozen=True)
class Sizes(models.Sizes):
    """Of the model and of the batch, and which loss."""

    microbatch: int = 2
    loss_mode: str = "vanilla"


TINY = Sizes(vocab=64, hidden=32, layers=2, rows=4, prompt=6, response=10)


def one_process() -> None:
    """verl on this CPU, and a gloo group of one rank."""
    verl_cpu.use_cpu()
    if not torch.distributed.is_initialized():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)


class Run:
    """Actor, reference and critic of one shape, the same at every construction."""

    def __init__(self, sizes: Sizes = TINY) -> None:
        self.sizes = sizes
        self._gradients: dict[str, Tensor] = {}
        workers = importlib.import_module("verl.workers.config")
        losses = importlib.import_module("verl.workers.utils.losses")
        self.actor_config = workers.ActorConfig(
            strategy="fsdp",
            rollout_n=1,
            use_dynamic_bsz=True,
            clip_ratio_high=0.28,
            use_kl_loss=True,
            entropy_coeff=0.01,
            loss_agg_mode=sizes.loss_agg_mode,
            policy_loss=workers.PolicyLossConfig(loss_mode=sizes.loss_mode),
        )
        critic_config = workers.CriticConfig(
            strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, loss_agg_mode=sizes.loss_agg_mode
        )
        self.actor = _engine("FSDPEngineWithLMHead", models.causal_lm(sizes, 0))
        self.reference = _engine("FSDPEngineWithLMHead", models.causal_lm(sizes, 1))
        self.critic = _engine("FSDPEngineWithValueHead", _value(sizes))
        self.actor_loss = partial(losses.ppo_loss, config=self.actor_config)
        self.critic_loss = partial(losses.value_loss, config=critic_config)

    # ---- the trainer's part ---------------------------------------------------------------------

    def step(self, batch: Any = None) -> dict[str, Any]:
        """Rollout batch (None: `batch()`) to stepped weights; what was computed on the way."""
        batch = self.batch() if batch is None else batch
        trainer = importlib.import_module("verl.trainer.ppo.ray_trainer")
        core = importlib.import_module("verl.trainer.ppo.core_algos")
        old = self.inferred(self.actor, batch, "log_probs")
        # As of an older policy: with every ratio 1 nothing would be clipped.
        generator = torch.Generator().manual_seed(1)
        batch.batch["old_log_probs"] = old + 0.3 * torch.randn(old.shape, generator=generator)
        batch.batch["ref_log_prob"] = self.inferred(self.reference, batch, "log_probs")
        batch.batch["values"] = self.inferred(self.critic, batch, "values")
        kl = core.FixedKLController(0.1)
        batch, reward_metrics = trainer.apply_kl_penalty(batch, kl, "low_var_kl")
        gae = core.AdvantageEstimator.GAE
        batch = trainer.compute_advantage(batch, gae, gamma=0.99, lam=0.95, config={})
        actor = self._trained(self.actor, batch, self.actor_loss, calculate_entropy=True)
        critic = self._trained(self.critic, batch, self.critic_loss)
        mask = batch.batch["response_mask"]
        names = ("old_log_probs", "ref_log_prob", "values", "token_level_rewards", "advantages")
        found = {name: batch.batch[name] * mask for name in (*names, "returns")}
        return found | {"reward": reward_metrics, "actor": actor, "critic": critic}

    def weights(self) -> dict[str, Tensor]:
        modules = {"actor": self.actor.module, "critic": self.critic.module}
        return {f"{m}.{n}": p.detach() for m in modules for n, p in modules[m].named_parameters()}

    def gradients(self) -> dict[str, Tensor]:
        """What the optimizers stepped with, clipped."""
        return self._gradients

    def batch(self) -> Any:
        """A `DataProto` in verl's layout: left-padded prompts, right-padded responses, a hole."""
        s = self.sizes
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(4, s.vocab, (s.rows, s.prompt + s.response), generator=generator)
        mask = torch.ones_like(ids)
        for row in range(s.rows):
            mask[row, : row % s.prompt] = 0
            mask[row, s.prompt + s.response - row % s.response :] = 0
        response_mask = mask[:, s.prompt :].clone()
        response_mask[0, s.response // 2] = 0  # the reply of a tool
        scores = torch.zeros(s.rows, s.response)
        last = response_mask.cumsum(-1).argmax(-1)
        scores[torch.arange(s.rows), last] = torch.randn(s.rows, generator=generator)
        proto = importlib.import_module("verl").DataProto.from_single_dict(
            {
                "prompts": ids[:, : s.prompt],
                "responses": ids[:, s.prompt :].where(mask[:, s.prompt :] > 0, PAD),
                "response_mask": response_mask,
                "input_ids": ids.where(mask > 0, PAD),
                "attention_mask": mask,
                "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
                "token_level_scores": scores,
            }
        )
        proto.meta_info["temperature"] = 0.9
        return proto

    # ---- the workers' part ----------------------------------------------------------------------

    def _as_engine_input(self, batch: Any, **options: Any) -> Any:
        padding = importlib.import_module("verl.workers.utils.padding")
        tensordicts = importlib.import_module("verl.utils.tensordict_utils")
        data = padding.left_right_2_no_padding(batch.to_tensordict())
        tensordicts.assign_non_tensor(
            data,
            use_remove_padding=False,
            use_dynamic_bsz=False,
            micro_batch_size_per_gpu=self.sizes.microbatch,
            use_fused_kernels=False,
            global_batch_size=self.sizes.rows,
            **options,
        )
        return data

    def inferred(self, engine: Any, batch: Any, name: str) -> Tensor:
        """`log_probs` or `values` of an engine, fp32 `[B, R]`."""
        padding = importlib.import_module("verl.workers.utils.padding")
        data = self._as_engine_input(batch)
        with engine.eval_mode():
            found = engine.infer_batch(data)["model_output"][name]
        return padding.no_padding_2_padding(found, data).float()

    def _trained(self, engine: Any, batch: Any, loss: Any, **options: Any) -> dict[str, Any]:
        data = self._as_engine_input(batch, **options)
        with engine.train_mode():
            metrics = engine.train_batch(data, loss_function=loss)["metrics"]
            for name, parameter in engine.module.named_parameters():
                if parameter.grad is not None:
                    self._gradients[f"{type(engine.module).__name__}.{name}"] = parameter.grad
        engine.lr_scheduler_step()
        return {name: _number(value) for name, value in metrics.items()}


def _number(metric: Any) -> float:
    """Of what verl collects: a number, one a microbatch, or its `Metric` of them."""
    if hasattr(metric, "aggregate"):
        return float(metric.aggregate())
    return float(torch.as_tensor(metric, dtype=torch.float64).mean())


# ---- engines ------------------------------------------------------------------------------------


def _value(sizes: Sizes) -> nn.Module:
    from transformers import LlamaForTokenClassification

    torch.manual_seed(2)
    return LlamaForTokenClassification(models.llama_config(sizes, num_labels=1))


def _engine(name: str, module: nn.Module) -> Any:
    """verl's engine over a plain module: its two hooks that build one and shard it give ours."""
    fsdp = importlib.import_module("verl.workers.engine.fsdp.transformer_impl")
    workers = importlib.import_module("verl.workers.config")

    def built(self: Any, _: nn.Module | None = None) -> nn.Module:
        self._autocast_dtype = torch.float32
        return module

    own = getattr(fsdp, name)
    unsharded = type(name, (own,), {"_build_module": built, "_build_fsdp_module": built})
    model_config = workers.HFModelConfig.__new__(workers.HFModelConfig)
    for key, value in {"use_remove_padding": False, "lora_rank": 0, "lora": {}}.items():
        object.__setattr__(model_config, key, value)
    engine = unsharded(
        model_config,
        workers.FSDPEngineConfig(strategy="fsdp", use_torch_compile=False),
        workers.FSDPOptimizerConfig(lr=1e-3, total_training_steps=100),
        None,
    )
    engine._build_model_optimizer()
    return engine
