"""The hybrid engine: one set of weights, trained or generated from, one mode at a time.

    TRAIN     weights may change; nothing is generated
    GENERATE  the runner reads the weights; an optimizer step raises
    SCORE     finished sequences are read by the roles; an optimizer step raises

The engine does not copy weights. On one device the parameters become views of one flat buffer
(`AliasedWeights`) whose bytes training updates and generation reads; a switch of mode is a check of
addresses. What runs a model is chosen once and can be asked for (`path`, `reason`):

    fused     our forward over the aliased parameters: Llama, Mistral, Qwen2, Qwen3
    modules   the Hugging Face modules, attention through the paged ops
    padded    `HFGenerator`: the modules with their own cache, for every other architecture
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rlhf_fast.config import EngineConfig
from rlhf_fast.engine.decode_graphs import CudaRecorder, GraphReport
from rlhf_fast.engine.expected_lengths import ExpectedLengths
from rlhf_fast.engine.fused_forward import FusedForward
from rlhf_fast.engine.fused_support import why_not_fused
from rlhf_fast.engine.generator import (
    HFGenerator,
    diverged,
    evaluation_mode,
    require_same_version,
    without_gradients,
)
from rlhf_fast.engine.host_memory import available_host_memory
from rlhf_fast.engine.module_forward import (
    ModuleForward,
    cache_shape_of,
    unwrapped,
    why_not_paged,
)
from rlhf_fast.engine.paged_batch import PagedForward
from rlhf_fast.engine.requests import (
    Completions,
    Progress,
    Request,
    check_requests,
    context_limit,
    requests_of,
    rollout_of,
)
from rlhf_fast.engine.runner import Runner, RunnerSettings, page_size_of
from rlhf_fast.engine.stopping import Decode, stops_of
from rlhf_fast.engine.weights import AliasedWeights
from rlhf_fast.errors import DivergedGeneration, GenerationError
from rlhf_fast.types import PromptBatch, Rollout, SamplingParams
from rlhf_fast_kernels.attention_backends import AttentionChoice, choose_attention

PATHS = ("auto", "fused", "modules", "padded")
# Of what is free before a rollout: the rest is for activations and for what else runs.
_GPU_SHARE, _CPU_SHARE = 0.8, 0.25


class Mode(enum.Enum):
    """What the engine is doing."""

    TRAIN = "train"
    GENERATE = "generate"
    SCORE = "score"


@dataclass(frozen=True)
class EngineSettings:
    """How generation runs.

    Args:
        path: one of PATHS; auto takes the first of fused, modules and padded that can run.
        max_batch: samples decoded side by side at most.
        kv_bytes: key-value memory at most; 0: four fifths of the free memory of a GPU, a quarter of
            that of the host.
        page_size: tokens of a page; 0: 64 on a CPU, 256 on a GPU.
        prefill_tokens: tokens of one prefill forward.
        burst: decoding steps between two looks of the host; 0: 1 on a CPU, 8 on a GPU.
        poison: debug mode: freed pages become NaN.
        keep_memory: hold a GPU's key-value memory, and a bf16 copy of fp32 weights, between
            rollouts.
        attention: what attends on the fused path, one of `attention_backends.NAMES`, or auto.
        cuda_graphs: record decoding steps on a GPU; see `decode_graphs`.
    """

    path: str = "auto"
    max_batch: int = 256
    kv_bytes: int = 0
    page_size: int = 0
    prefill_tokens: int = 8192
    burst: int = 0
    poison: bool = False
    keep_memory: bool = False
    cuda_graphs: bool = True
    attention: str = "auto"


def engine_settings(config: EngineConfig, max_batch: int) -> EngineSettings:
    """The engine section of a stage's config, and how many samples decode side by side."""
    return EngineSettings(
        path=config.path,
        max_batch=max_batch,
        kv_bytes=int(config.kv_gb * 1e9),
        page_size=config.page_size,
        prefill_tokens=config.prefill_tokens,
        burst=config.burst,
        keep_memory=config.keep_memory,
        cuda_graphs=config.cuda_graphs,
        attention=config.attention,
    )


class HybridEngine:
    """Generation from the weights that training updates, as `rlhf_fast.protocols.Generator`.

    Make it when the module is on its device and before its optimizer steps; moving or casting the
    module afterwards is an error that the next rollout raises.

    Args:
        module: causal LM of transformers, or a peft wrapper around one.
        eos_ids: ids that end a response.
        weight_version: read before and after each rollout; stamped on it. None: 0, and weights that
            are copied into another type are copied for every rollout.
        settings: how generation runs.
        decode: ids to texts, for stop strings.
        on_progress: called after every burst of decoding steps.
        expected: lengths that earlier rollouts had, to go on from.

    Raises:
        GenerationError: RF4003 the model cannot decode, RF4030 its weights cannot be aliased,
            RF4032 the path asked for cannot run.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        eos_ids: Iterable[int],
        weight_version: Callable[[], int] | None = None,
        settings: EngineSettings | None = None,
        decode: Decode | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        expected: ExpectedLengths | None = None,
    ) -> None:
        self.module = module
        self.settings = EngineSettings() if settings is None else settings
        self.eos_ids = tuple(sorted(set(eos_ids)))
        self.on_progress = on_progress
        self.on_finished: Callable[[list[int], Completions], None] | None = None
        self._version = weight_version
        self._weight_version = _unversioned if weight_version is None else weight_version
        self._decode = decode
        self._mode = Mode.TRAIN
        self.expected = ExpectedLengths() if expected is None else expected
        self.path, self.reason = _choose_path(module, self.settings.path)
        self.weights: AliasedWeights | None = None
        self.attention: AttentionChoice | None = None  # of the fused path
        self._runner: Runner | None = None
        self._padded: HFGenerator | None = None
        if self.path == "padded":
            self._padded = HFGenerator(
                module,
                eos_ids=self.eos_ids,
                weight_version=self._weight_version,
                max_batch=self.settings.max_batch,
                max_batch_tokens=_padded_slots(module, self.settings.kv_bytes),
                decode=decode,
                on_progress=self._show,
            )
        else:
            self._runner = self._make_runner()

    @classmethod
    def from_tokenizer(cls, module: nn.Module, tokenizer: Any, **options: Any) -> HybridEngine:
        """An engine that stops where this tokenizer and the model's generation config stop.

        `options` are the constructor's.
        """
        eos_ids, decode = stops_of(module, tokenizer)
        return cls(module, eos_ids=eos_ids, decode=decode, **options)

    def _make_runner(self) -> Runner:
        settings = self.settings
        forward: PagedForward
        if self.path == "fused":
            self.weights = AliasedWeights.of(self.module)
            self.attention = _choose_attention(self.module, self._device, settings)
            forward = FusedForward(
                self.module,
                self.weights,
                version=self._version,
                keep=settings.keep_memory,
                attention=self.attention,
            )
        else:
            forward = ModuleForward(self.module)
        graphs = settings.cuda_graphs and self._device.type == "cuda"
        return Runner(
            forward,
            self._device,
            eos_ids=self.eos_ids,
            decode=self._decode,
            settings=RunnerSettings(
                max_rows=settings.max_batch,
                page_size=settings.page_size,
                prefill_tokens=settings.prefill_tokens,
                burst=settings.burst,
                poison=settings.poison,
            ),
            cache_bytes=functools.partial(_cache_budget, self._device, settings.kv_bytes),
            recorder=functools.partial(CudaRecorder, self._device) if graphs else None,
        )

    # ---- modes --------------------------------------------------------------------------------

    @property
    def mode(self) -> Mode:
        """What the engine is doing."""
        return self._mode

    @contextmanager
    def _in(self, mode: Mode) -> Iterator[None]:
        if self._mode is not Mode.TRAIN:
            raise GenerationError(
                "RF4033",
                f"the engine cannot {mode.value} while it is in mode {self._mode.value}",
                expected="one mode at a time: generate, then score, then train",
                remedy="leave the block of the other mode first",
            )
        self._mode = mode
        try:
            yield
        finally:
            self._mode = Mode.TRAIN

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """While roles read finished sequences: weights may not change."""
        with self._in(Mode.SCORE):
            yield

    def guard(self, optimizer: torch.optim.Optimizer) -> None:
        """Make every step of `optimizer` outside TRAIN an error (RF4034)."""

        def refuse(*_: Any) -> None:
            if self._mode is not Mode.TRAIN:
                raise GenerationError(
                    "RF4034",
                    f"an optimizer step while the engine is in mode {self._mode.value}",
                    expected="weights that do not change while they are read",
                    remedy="step after the rollout and its scoring",
                )

        optimizer.register_step_pre_hook(refuse)

    # ---- generation ---------------------------------------------------------------------------

    @property
    def _device(self) -> torch.device:
        return next(self.module.parameters()).device

    def generate(
        self,
        prompts: PromptBatch,
        sampling: SamplingParams,
        *,
        samples_per_prompt: int,
        seeds: Sequence[int],
    ) -> Rollout:
        """Draw G samples per prompt.

        `rollout_logprobs` are under softmax(logits / temperature), before top-k, top-p and min-p
        (softmax(logits) at temperature 0): the quantity that the trainer recomputes. R is the
        length of the longest response. Tensors come back on the device of the prompts. Modes of the
        module and its submodules are what they were before, whatever happens.

        Args:
            prompts: B prompts of at least one token each.
            sampling: how to draw.
            samples_per_prompt: G.
            seeds: S = B*G integers, see `rlhf_fast.seeds.derive_seed`.

        Raises:
            GenerationError: RF4001 to RF4034; nothing is generated if a check of the input fails.
        """
        requests = requests_of(prompts, sampling, samples_per_prompt, seeds, self.expected)
        if self._padded is not None:
            with self._in(Mode.GENERATE):
                return self._padded.generate(
                    prompts, sampling, samples_per_prompt=samples_per_prompt, seeds=seeds
                )
        version = self._weight_version()
        out = self.complete(requests)
        self.expected.observe(prompts.uid, out.lengths.tolist())
        return rollout_of(prompts, sampling, samples_per_prompt, out, version)

    def complete(self, requests: Sequence[Request]) -> Completions:
        """Draw the samples of requests, each with settings of its own.

        Args:
            requests: prompts with settings and seeds.

        Returns:
            All samples, those of the first request first, on the module's device.

        Raises:
            GenerationError: as `generate`; RF4035 on the padded path, which has one set of settings
                for all.
        """
        if self._runner is None:
            raise GenerationError(
                "RF4035",
                f"requests with settings of their own need pages: {self.reason}",
                remedy="call generate(), which runs on padded batches too",
            )
        self._follow_changes()
        if self._device != self._runner.device:
            raise GenerationError(
                "RF4031",
                f"the model moved from {self._runner.device} to {self._device} since the engine "
                "was made",
                remedy="move the model first, then make the engine",
            )
        model = unwrapped(self.module)
        vocab = int(model.get_input_embeddings().weight.shape[0])
        check_requests(requests, vocab, context_limit(model.config))
        version = self._weight_version()
        with self._in(Mode.GENERATE), without_gradients(self.module), evaluation_mode(self.module):
            try:
                out = self._runner.run(requests, on_progress=self._show, on_finished=self._finished)
            except DivergedGeneration as error:
                raise diverged(self.module, error.what, error.where) from None
            finally:
                if self._device.type != "cpu" and not self.settings.keep_memory:
                    self._runner.release()
        require_same_version(version, self._weight_version())
        return out

    def _follow_changes(self) -> None:
        """A hook or a patch put on since then is not in the fused forward."""
        fault = why_not_fused(self.module) if self.path == "fused" else None
        if fault is None:
            return
        if self.settings.path == "fused" or why_not_paged(self.module) is not None:
            raise GenerationError(
                "RF4032",
                f"the model has changed since the engine was made: {fault}",
                remedy="use engine.path=auto, or change the model before the engine is made",
            )
        assert self.weights is not None
        self.weights.check()
        self.path, self.reason = "modules", fault
        self._runner = self._make_runner()

    @property
    def preemptions(self) -> int:
        """Samples of the last rollout that gave their pages back and were recomputed."""
        return 0 if self._runner is None else self._runner.last_preemptions

    @property
    def graphs(self) -> GraphReport:
        """What the CUDA graphs of the last rollout were."""
        return GraphReport() if self._runner is None else self._runner.last_graphs

    def _show(self, progress: Progress) -> None:
        if self.on_progress is not None:
            self.on_progress(progress)

    def _finished(self, samples: list[int], out: Completions) -> None:
        if self.on_finished is not None:
            self.on_finished(samples, out)


def _choose_attention(
    module: nn.Module, device: torch.device, settings: EngineSettings
) -> AttentionChoice:
    shape = cache_shape_of(module)
    page_size = page_size_of(settings.page_size, device)
    try:
        return choose_attention(
            device, shape.dtype, shape.head_dim, page_size, wish=settings.attention
        )
    except ValueError as error:
        raise GenerationError(
            "RF4032", f"engine.attention: {error}", remedy="use engine.attention=auto"
        ) from error


def _unversioned() -> int:
    return 0


def _choose_path(module: nn.Module, wish: str) -> tuple[str, str]:
    """(path, why that one)."""
    if wish not in PATHS:
        raise GenerationError("RF4032", f"no path {wish!r}", expected=f"one of {', '.join(PATHS)}")
    if any(c.is_prompt_learning for c in getattr(module, "peft_config", {}).values()):
        raise GenerationError(
            "RF4003",
            "adapters of prompt learning put tokens before the prompt, which no path samples from",
            expected="adapters inside the layers, such as LoRA",
        )
    not_fused = why_not_fused(module)
    not_paged = why_not_paged(module)
    obstacles = {"fused": not_fused, "modules": not_paged, "padded": None}
    if wish == "auto":
        if not_fused is None:
            return "fused", "the fused forward knows this architecture"
        if not_paged is None:
            return "modules", not_fused
        return "padded", not_paged
    obstacle = obstacles[wish]
    if obstacle is not None:
        raise GenerationError(
            "RF4032",
            f"engine.path={wish} cannot run: {obstacle}",
            remedy="use engine.path=auto",
        )
    return wish, "asked for"


def _padded_slots(module: nn.Module, kv_bytes: int) -> int | None:
    """Tokens that a padded batch may hold in all; None: no limit was set."""
    return kv_bytes // cache_shape_of(module).token_bytes if kv_bytes else None


def _cache_budget(device: torch.device, wish: int) -> int:
    """Bytes of key-value memory at most."""
    if wish > 0:
        return wish
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(_GPU_SHARE * (free + held))
    return int(_CPU_SHARE * available_host_memory())
