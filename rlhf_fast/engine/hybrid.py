"""The hybrid engine: one set of weights, trained or generated from, one mode at a time.

    TRAIN     weights may change; nothing is generated
    GENERATE  the runner reads the weights; an optimizer step raises
    SCORE     finished sequences are read by the roles; an optimizer step raises. Also between two
              bursts of GENERATE, where a scorer reads what is finished

The engine does not copy weights. On one device the parameters become views of one flat buffer
(`AliasedWeights`) whose bytes training updates and generation reads; a switch of mode is a check of
addresses. What runs a model is chosen once and can be asked for (`path`, `reason`):

    fused     our forward over the aliased parameters: Llama, Mistral, Qwen2, Qwen3
    modules   the Hugging Face modules, attention through the paged ops
    padded    `HFGenerator`: the modules with their own cache, for every other architecture

One more can be asked for: `transformers`, continuous batching of transformers with our sampler.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rlhf_fast.default_device import host_by_default, on_the_host
from rlhf_fast.engine.decode_graphs import CudaRecorder
from rlhf_fast.engine.engine_facts import EngineFacts
from rlhf_fast.engine.expected_lengths import ExpectedLengths
from rlhf_fast.engine.fused_forward import FusedForward
from rlhf_fast.engine.fused_support import why_not_fused
from rlhf_fast.engine.generator import (
    HFGenerator,
    diverged,
    evaluation_mode,
    no_autocast,
    require_same_version,
    training_mode,
    without_gradients,
)
from rlhf_fast.engine.modes import Mode, Modes
from rlhf_fast.engine.module_forward import (
    ModuleForward,
    uncompiled,
    unwrapped,
    why_not_paged,
)
from rlhf_fast.engine.overlap import Overlap
from rlhf_fast.engine.paged_batch import PagedForward
from rlhf_fast.engine.path_choice import choose_path
from rlhf_fast.engine.progress import Progress, ProgressReports
from rlhf_fast.engine.requests import (
    Completions,
    Request,
    check_requests,
    context_limit,
    requests_of,
    rollout_of,
)
from rlhf_fast.engine.run import Room, Run
from rlhf_fast.engine.runner import Runner, RunnerSettings
from rlhf_fast.engine.settings import (
    EngineSettings,
    cache_budget,
    choose_attention_for,
    padded_slots,
)
from rlhf_fast.engine.sharded_views import Weights, WeightView, require_path
from rlhf_fast.engine.stopping import Decode, checked_eos_ids, require_decode, stops_of
from rlhf_fast.engine.weights import AliasedWeights
from rlhf_fast.errors import DivergedGeneration, GenerationError
from rlhf_fast.protocols import FinishedScorer
from rlhf_fast.types import PromptBatch, Rollout, SamplingParams
from rlhf_fast_kernels.attention_backends import AttentionChoice

if TYPE_CHECKING:
    from rlhf_fast.engine.transformers_runner import TransformersRunner


class HybridEngine(EngineFacts, Modes):
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
        progress_seconds: but not more often than that, and at the end; may be set later.
        expected: lengths that earlier rollouts had, to go on from.
        view: how the parameters are seen where they are sharded; `module` is its twin then.

    Raises:
        GenerationError: RF4003 the model cannot decode, RF4030 its weights cannot be aliased,
            RF4032 the path asked for cannot run, RF4046 `eos_ids` that are none.
    """

    @on_the_host
    def __init__(
        self,
        module: nn.Module,
        *,
        eos_ids: Iterable[int],
        weight_version: Callable[[], int] | None = None,
        settings: EngineSettings | None = None,
        decode: Decode | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        progress_seconds: float = 0.0,
        expected: ExpectedLengths | None = None,
        view: WeightView | None = None,
    ) -> None:
        self.module = module = uncompiled(module)
        self.view = view
        self.settings = EngineSettings() if settings is None else settings
        self.eos_ids = checked_eos_ids(eos_ids)
        self.on_progress = on_progress
        self.progress_seconds = progress_seconds
        self.on_finished: Callable[[list[int], Completions], None] | None = None
        self._version = weight_version
        self._weight_version = _unversioned if weight_version is None else weight_version
        self._decode = decode
        self._in_train_mode: list[nn.Module] = []
        self.expected = ExpectedLengths() if expected is None else expected
        self.path, self.reason = choose_path(module, self.settings.path)
        require_path(self.view, self.path)
        self.weights: Weights | None = None
        self.attention: AttentionChoice | None = None  # of the fused path
        self._runner: Runner | TransformersRunner | None = None
        self._padded: HFGenerator | None = None
        if self.path == "padded":
            self._padded = HFGenerator(
                module,
                eos_ids=self.eos_ids,
                weight_version=self._weight_version,
                max_batch=self.settings.max_batch,
                max_batch_tokens=padded_slots(module, self.settings.kv_bytes),
                decode=decode,
            )
        else:
            with self._reading():
                self._runner = self._make_runner()

    @classmethod
    def from_tokenizer(cls, module: nn.Module, tokenizer: Any, **options: Any) -> HybridEngine:
        """An engine that stops where this tokenizer and the model's generation config stop.

        `options` are the constructor's.
        """
        eos_ids, decode = stops_of(module, tokenizer)
        return cls(module, eos_ids=eos_ids, decode=decode, **options)

    def _make_runner(self) -> Runner | TransformersRunner:
        settings = self.settings
        options: dict[str, Any] = {
            "eos_ids": self.eos_ids,
            "decode": self._decode,
            "settings": RunnerSettings(
                max_rows=settings.max_batch,
                page_size=settings.page_size,
                prefill_tokens=settings.prefill_tokens,
                burst=settings.burst,
                poison=settings.poison,
            ),
            "cache_bytes": self._cache_bytes,
        }
        if self.path == "transformers":
            from rlhf_fast.engine.transformers_runner import TransformersRunner

            return TransformersRunner(self.module, self._device, **options)
        forward: PagedForward
        view = self.view
        if self.path == "fused":
            self.weights = AliasedWeights.of(self.module) if view is None else view.weights
            self.attention = choose_attention_for(self.module, settings, self._device)
            forward = FusedForward(
                self.module,
                self.weights,
                version=self._version,
                keep=settings.keep_memory,
                attention=self.attention,
                parallel=None if view is None else view.parallel,
            )
        else:
            forward = ModuleForward(self.module)
        graphs = settings.cuda_graphs and self._device.type == "cuda"
        recorder = functools.partial(CudaRecorder, self._device) if graphs else None
        return Runner(forward, self._device, recorder=recorder, **options)

    def _cache_bytes(self) -> int:
        """What there may be of keys and values, beside the copy of weights that is to come."""
        forward = self._runner.forward if isinstance(self._runner, Runner) else None
        coming = forward.compute.coming if isinstance(forward, FusedForward) else 0
        budget = cache_budget(self._device, self.settings.kv_bytes, coming)
        # Ranks in step have to give way to each other at the same moment.
        return budget if self.view is None else self.view.agreed(budget)

    @contextmanager
    def _scoring_between_bursts(self) -> Iterator[None]:
        """SCORE within GENERATE; the module is as it is after generation."""
        assert self._mode is Mode.GENERATE
        assert isinstance(self._runner, Runner)  # the only one that stops between bursts
        self._mode = Mode.SCORE
        try:
            with (
                self._runner.forward.paused(),
                training_mode(self._in_train_mode),
                no_autocast(self.module),
            ):
                yield
        finally:
            self._mode = Mode.GENERATE

    # ---- generation ---------------------------------------------------------------------------

    @property
    def _device(self) -> torch.device:
        return next(self.module.parameters()).device

    @on_the_host
    def generate(
        self,
        prompts: PromptBatch,
        sampling: SamplingParams,
        *,
        samples_per_prompt: int,
        seeds: Sequence[int],
        scorer: FinishedScorer | None = None,
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
            scorer: reads finished samples while the last ones are drawn, in mode SCORE; see
                `rlhf_fast.engine.overlap`. The padded path hands it none.

        Raises:
            GenerationError: RF4001 to RF4034; nothing is generated if a check of the input fails.
        """
        requests = requests_of(prompts, sampling, samples_per_prompt, seeds, self.expected)
        if self._padded is not None:
            self._padded.on_progress = self.on_progress
            self._padded.progress_seconds = self.progress_seconds
            with self._in(Mode.GENERATE), self._reading():
                rollout = self._padded.generate(
                    prompts, sampling, samples_per_prompt=samples_per_prompt, seeds=seeds
                )
            self.expected.observe(prompts.uid, rollout.lengths.tolist())
            return rollout
        version = self._weight_version()
        overlap = None
        if scorer is not None:
            overlap = Overlap(
                *(scorer, prompts, sampling, samples_per_prompt, version),
                capacity=self.settings.max_batch,
                surroundings=self._scoring_between_bursts,
                device=self._device,
            )
        out = self._complete(requests, overlap)
        self.expected.observe(prompts.uid, out.lengths.tolist())
        return rollout_of(prompts, sampling, samples_per_prompt, out, version)

    @on_the_host
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
        return self._complete(requests, None)

    def _complete(self, requests: Sequence[Request], overlap: Overlap | None) -> Completions:
        if self._runner is None:
            raise GenerationError(
                "RF4035",
                f"requests with settings of their own need pages: {self.reason}",
                remedy="call generate(), which runs on padded batches too, or try "
                "engine.path=transformers",
            )
        with self._reading():
            return self._run(requests, overlap)

    def _reading(self) -> AbstractContextManager[None]:
        """The parameters as training left them."""
        return nullcontext() if self.view is None else self.view.reading()

    @contextmanager
    def serving(
        self, room: Room, on_finished: Callable[[list[int], Completions], None]
    ) -> Iterator[Run]:
        """Mode GENERATE while the block lasts: requests join and leave a run between its turns.

        They must have passed `check`. See `rlhf_fast.engine.live` for who does all this.

        Args:
            room: how large the run may become.
            on_finished: given samples that ended, whose rows of the completions are final then.

        Raises:
            GenerationError: RF4035 on the paths whose requests cannot join; as `generate`.
        """
        if not isinstance(self._runner, Runner):
            raise GenerationError(
                "RF4035",
                f"requests cannot join a run of the path {self.path}: {self.reason}",
                remedy="use engine.path=auto with a model that runs on pages",
            )
        with self._reading():
            self._follow_changes()
            with self._generating(), self._runner.open(room, on_finished) as run:
                yield run

    def check(self, requests: Sequence[Request]) -> None:
        """Refuse what cannot be generated.

        Raises:
            GenerationError: as `check_requests`; RF4002, stop strings without a tokenizer.
        """
        model = unwrapped(self.module)
        parallel = None if self.view is None else self.view.parallel
        rows = model.get_input_embeddings().weight.shape[0]
        vocab = int(rows) if parallel is None else parallel.vocabulary
        check_requests(requests, vocab, context_limit(model.config))
        for request in requests:
            require_decode(request.sampling.stop_strings, self._decode)

    @contextmanager
    def _generating(self) -> Iterator[None]:
        """Weights are read: nobody may change them, and what ran out of step is an error."""
        assert self._runner is not None
        if self._device != self._runner.device:
            raise GenerationError(
                "RF4031",
                f"the model moved from {self._runner.device} to {self._device} since the engine "
                "was made",
                remedy="move the model first, then make the engine",
            )
        version = self._weight_version()
        with (
            host_by_default(),
            self._in(Mode.GENERATE),
            without_gradients(self.module),
            evaluation_mode(self.module) as self._in_train_mode,
        ):
            try:
                yield
            except DivergedGeneration as error:
                raise diverged(self.module, error.what, error.where) from None
            finally:
                if self._device.type != "cpu" and not self.settings.keep_memory:
                    self._runner.release()
        require_same_version(version, self._weight_version())

    def _run(self, requests: Sequence[Request], overlap: Overlap | None) -> Completions:
        self._follow_changes()
        self.check(requests)
        assert self._runner is not None

        def finished(samples: list[int], out: Completions) -> None:
            if self.on_finished is not None:
                self.on_finished(samples, out)
            if overlap is not None:
                overlap.finished(samples)

        with self._generating():
            try:
                return self._runner.run(
                    requests,
                    reports=self._reports(),
                    on_finished=finished,
                    after_burst=None if overlap is None else overlap.after_burst,
                )
            finally:
                if overlap is not None:
                    overlap.join()

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
        self.path, self.reason, self.attention = "modules", fault, None
        require_path(self.view, self.path)
        self._runner = self._make_runner()

    def halve_batch(self) -> bool:
        """Decode half as many samples side by side from now on; false if it is one already.

        For after a rollout that ran out of memory, whose pages are gone. What is sampled stays the
        same.
        """
        if self.settings.max_batch == 1:
            return False
        rows = self.settings.max_batch // 2
        self.settings = replace(self.settings, max_batch=rows)
        if self._padded is not None:
            self._padded.max_batch = rows
        if self._runner is not None:
            self._runner.settings = replace(self._runner.settings, max_rows=rows)
            self._runner.release()
        return True

    def _reports(self) -> ProgressReports | None:
        if self.on_progress is None:
            return None
        return ProgressReports(self.on_progress, self.progress_seconds)


def _unversioned() -> int:
    return 0
