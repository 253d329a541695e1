"""Our generator as verl's rollout: `actor_rollout_ref.rollout.name=rlhf_fast`.

`Rollout` is what verl's workers make by that name (`get_rollout_class`), once
`rlhf_fast.integrations.verl` is on. It has the methods of verl's `BaseRollout`: `update_weights`,
`resume`, `release` and, in one process, `generate_sequences`.

Weights. A worker hands them over by name and tensor; they are copied into a module that the rollout
owns, as verl's other rollouts hold a copy of their own. Who has the trained module in the same
process calls `share(module)` instead: generation then reads the very parameters that are trained,
and `update_weights` has nothing to do.

Samples. Rows come repeated for several samples a prompt, as verl repeats them; equal neighbours are
prefilled once. Each row is drawn with a seed from (`rollout.seed`, rank, call, row), so it does not
depend on what else is in the batch.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import AsyncIterable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast.engine.hybrid import HybridEngine
from rlhf_fast.engine.requests import Completions, Request
from rlhf_fast.engine.settings import EngineSettings
from rlhf_fast.engine.stopping import stops_of
from rlhf_fast.errors import EnvironmentFault
from rlhf_fast.integrations.verl_options import NAME, refuse, unsupported
from rlhf_fast.integrations.verl_weights import (
    build_module,
    copy_weights,
    device_here,
    require_full_weights,
)
from rlhf_fast.seeds import derive_seed
from rlhf_fast.types import SamplingParams


class Rollout:
    """One process's generator, by the interface of verl's `BaseRollout`.

    Args:
        config: verl's `RolloutConfig`. `engine_kwargs.rlhf_fast` holds fields of `EngineSettings`.
        model_config: verl's `HFModelConfig`; of no use once a module is shared.
        device_mesh: with a dimension `dp`; None: one process.

    Raises:
        EnvironmentFault: RF7331, an option that our generator lacks.
    """

    def __init__(self, config: Any, model_config: Any, device_mesh: Any = None) -> None:
        as_dataclass = importlib.import_module("verl.utils.config").omega_conf_to_dataclass
        self.config = as_dataclass(config)
        self.model_config = as_dataclass(model_config)
        refuse(unsupported(self.config))
        settings = {"max_batch": self.config.max_num_seqs}
        self._settings = EngineSettings(**settings | dict(self.config.engine_kwargs.get(NAME, {})))
        self._rank = 0 if device_mesh is None else device_mesh.get_local_rank("dp")
        self._module: nn.Module | None = None
        self._shared = False
        self._engine: HybridEngine | None = None
        self._calls = itertools.count()

    # ---- weights --------------------------------------------------------------------------------

    def share(self, module: nn.Module) -> None:
        """Generate from the parameters of this causal LM, which others train; nothing is copied.

        The parameters stay the same objects. Their gradients must not exist yet.
        """
        self._module, self._shared, self._engine = module, True, None

    async def update_weights(
        self,
        weights: Iterable[tuple[str, Tensor]] | AsyncIterable[tuple[str, Tensor]],
        wire_format: str = "named_tensors",
        **options: Any,
    ) -> None:
        """Copy named tensors into the module that generates; a shared module has them already.

        Raises:
            EnvironmentFault: RF7331 another wire format or adapters alone, RF7332 names or shapes
                that are not those of the module.
        """
        if self._shared:
            return
        require_full_weights(wire_format, options)
        module = self._module
        if module is None:
            module, self._engine = self._make_module(), None
        self._module = None  # what a failure leaves behind must not generate
        targets = module.state_dict(keep_vars=True)
        buffers = [name for name, _ in module.named_buffers()]
        await copy_weights(targets, weights, optional=buffers)
        self._module = module

    def _make_module(self) -> nn.Module:
        """A module of an architecture that transformers has, whose weights are still to come."""
        return build_module(self.model_config, self.config.dtype).to(device_here())

    async def resume(self, tags: list[str]) -> None:
        """Bring the weights back to their device; pages come with the next call that generates."""
        if "weights" in tags and self._module is not None and not self._shared:
            self._module.to(device_here())

    async def release(self) -> None:
        """Give pages and recorded steps back, and the device what an own copy of weights takes.

        Shared weights are training's, and stay where they are.
        """
        if not self.config.free_cache_engine:
            return
        self._engine = None
        if self._module is not None and not self._shared:
            self._module.to("cpu")

    # ---- generation -----------------------------------------------------------------------------

    def generate_sequences(self, prompts: Any) -> Any:
        """Draw one response for each row.

        Args:
            prompts: `DataProto` with `input_ids` and `attention_mask` `[B, P]`, left-padded.
                `meta_info` may hold do_sample, validate, temperature, top_k, top_p, min_p,
                response_length, eos_token_id (one or a list) and pad_token_id.

        Returns:
            `DataProto` of `prompts` `[B, P]`, `responses` and `response_mask` `[B, R]`,
            `input_ids`, `attention_mask` and `position_ids` `[B, P + R]`, int64, and with
            `rollout.calculate_log_probs` also `rollout_log_probs` `[B, R]` fp32, 0 in masked slots:
            under the distribution that was drawn from. R is `rollout.response_length`.

        Raises:
            EnvironmentFault: RF7332, no weights have come yet.
            GenerationError: as `HybridEngine.complete`.
            ValueError: meta_info asks for more tokens than `rollout.response_length`, or neither it
                nor a tokenizer names the ids that end and fill a response.
        """
        engine = self._ready()
        ids, attention = prompts.batch["input_ids"], prompts.batch["attention_mask"]
        eos_ids, pad_id = self._special_tokens(prompts.meta_info)
        sampling = self._sampling(prompts.meta_info, eos_ids)
        rows = [tuple(r[m].tolist()) for r, m in zip(ids, attention.bool(), strict=True)]
        out = engine.complete(self._requests(rows, sampling))
        return self._as_proto(prompts.batch, out, sampling, pad_id)

    def _ready(self) -> HybridEngine:
        if self._module is None:
            raise EnvironmentFault(
                "RF7332",
                "the rollout has no weights yet",
                expected="update_weights() or share() before generate_sequences()",
            )
        if self._engine is None:
            if not self._shared:
                self._module.to(device_here())
            # Where a response ends is asked of every call.
            self._engine = HybridEngine(self._module, eos_ids=(), settings=self._settings)
        return self._engine

    def _special_tokens(self, meta: Mapping[str, Any]) -> tuple[tuple[int, ...], int]:
        """(ids that end a response, id that fills up), of the call or of the tokenizer."""
        tokenizer: Any = getattr(self.model_config, "tokenizer", None)
        eos, pad = meta.get("eos_token_id"), meta.get("pad_token_id")
        if tokenizer is None and (eos is None or pad is None):
            raise ValueError("without a tokenizer a call names eos_token_id and pad_token_id")
        if eos is None:
            assert self._module is not None
            eos = stops_of(self._module, tokenizer)[0]
        if self.config.ignore_eos:
            eos = []
        ids = tuple(eos) if isinstance(eos, list | tuple) else (int(eos),)
        return ids, tokenizer.pad_token_id if pad is None else pad

    def _sampling(self, meta: Mapping[str, Any], eos_ids: tuple[int, ...]) -> SamplingParams:
        config, width = self.config, self.config.response_length
        tokens = meta.get("response_length", width)
        if tokens > width:
            raise ValueError(f"response_length={tokens} of a call exceeds the rollout's {width}")
        if not meta.get("do_sample", config.do_sample):
            return SamplingParams(tokens, temperature=0.0, stop_token_ids=eos_ids)
        # A call that validates has settings of its own, which the call does not override.
        source = config.val_kwargs if meta.get("validate", False) else config
        asked = {} if meta.get("validate", False) else meta
        return SamplingParams(
            tokens,
            temperature=asked.get("temperature", source.temperature),
            top_k=max(0, asked.get("top_k", source.top_k)),
            top_p=asked.get("top_p", source.top_p),
            min_p=meta.get("min_p", 0.0),
            stop_token_ids=eos_ids,
        )

    def _requests(self, rows: list[tuple[int, ...]], sampling: SamplingParams) -> list[Request]:
        """One request a run of equal rows: their prefill is shared."""
        call = next(self._calls)
        requests = []
        for prompt, run in itertools.groupby(range(len(rows)), key=lambda i: rows[i]):
            seeds = tuple(derive_seed(self.config.seed, self._rank, call, i) for i in run)
            requests.append(Request(prompt, sampling, seeds))
        return requests

    def _as_proto(self, batch: Any, out: Completions, sampling: SamplingParams, pad_id: int) -> Any:
        prompt, attention = batch["input_ids"], batch["attention_mask"]
        device, width = prompt.device, self.config.response_length
        lengths = out.lengths.to(device)
        mask = torch.arange(width, device=device) < lengths.unsqueeze(-1)

        def filled(values: Tensor, fill: float) -> Tensor:
            whole = torch.full(mask.shape, fill, dtype=values.dtype, device=device)
            whole[:, : values.shape[1]] = values.to(device)
            return whole.where(mask, fill)

        responses = filled(out.tokens, pad_id)
        whole_mask = torch.cat([attention, mask.to(attention.dtype)], dim=1)
        found = {
            "prompts": prompt,
            "responses": responses,
            "response_mask": mask.to(attention.dtype),
            "input_ids": torch.cat([prompt, responses], dim=1),
            "attention_mask": whole_mask,
            "position_ids": (whole_mask.cumsum(-1) - 1).clamp(min=0),
        }
        if self.config.calculate_log_probs:
            # A greedy draw has probability 1; what verl's rollouts report for it is the model's.
            drawn = out.raw_logprobs if sampling.temperature == 0.0 else out.logprobs
            found["rollout_log_probs"] = filled(drawn, 0.0)
        return importlib.import_module("verl").DataProto.from_single_dict(found)
