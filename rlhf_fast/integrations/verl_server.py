"""The server of verl's rollout: requests of its agent loops, answered by our generator.

`Server` runs as a Ray actor beside the worker that trains; its methods are those that verl's
`LLMServerClient`, `RolloutReplica` and `CheckpointEngineManager` call. Requests that are there at
the same time decode side by side (`rlhf_fast.engine.live`).

Weights are the server's own memory, which the worker maps and writes (`verl_weights`). Between
`begin_update` and `finish_update` they belong to the worker: an update that fails half-way leaves a
server that refuses to generate.

A draw has a seed from (`rollout.seed`, replica, weights' step, prompt, how often this prompt was
asked for since), whatever else is asked for at the time; a seed that comes with a request rules.
"""

from __future__ import annotations

import asyncio
import importlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import torch

from rlhf_fast.engine.hybrid import HybridEngine
from rlhf_fast.engine.live import Answer, LiveRequests
from rlhf_fast.engine.requests import Request, context_limit
from rlhf_fast.engine.run import Room
from rlhf_fast.engine.settings import EngineSettings, cache_budget
from rlhf_fast.engine.stopping import stops_of
from rlhf_fast.errors import EnvironmentFault
from rlhf_fast.integrations.verl_options import NAME, refuse, sampling_of, unsupported_of_server
from rlhf_fast.integrations.verl_weights import Places, SharedWeights, build_module, device_here
from rlhf_fast.seeds import derive_seed

# Stop ids of a request beside those that end every response, before a run is laid out anew.
_SPARE_STOPS = 4


class Server:
    """One model on one device.

    Args:
        config: verl's `RolloutConfig`. `engine_kwargs.rlhf_fast` holds fields of `EngineSettings`.
        model_config: verl's `HFModelConfig`, or the section that becomes one.
        replica_rank: number of this replica.
        visible_devices: of the worker whose device this shares; None: as the process has them.

    Raises:
        EnvironmentFault: RF7331, an option or an architecture that our generator lacks.
    """

    def __init__(
        self,
        config: Any,
        model_config: Any,
        replica_rank: int = 0,
        visible_devices: str | None = None,
    ) -> None:
        if visible_devices is not None:
            platform = importlib.import_module("verl.plugin.platform").get_platform()
            os.environ[platform.visible_devices_envvar()] = visible_devices
        as_dataclass = importlib.import_module("verl.utils.config").omega_conf_to_dataclass
        kind = importlib.import_module("verl.workers.config").HFModelConfig
        self._config = as_dataclass(config)
        self._model_config = as_dataclass(model_config, dataclass_type=kind)
        refuse(unsupported_of_server(self._config, self._model_config))
        self._outputs = importlib.import_module("verl.workers.rollout.replica").TokenOutput
        self._rank = replica_rank
        self._device = device_here()
        if self._device.type == "cuda":
            # Memory of such segments cannot be mapped by the worker.
            importlib.import_module("verl.utils.device").set_expandable_segments(False)
        self._module = build_module(self._model_config, self._config.dtype)
        self._weights = SharedWeights(self._module, self._device)
        self._eos_ids, self._decode = stops_of(self._module, self._model_config.tokenizer)
        self._limit = self._longest_sequence()
        self._engine: HybridEngine | None = self._make_engine()
        self._live: LiveRequests | None = None
        self._complete = self._asleep = self._blocked = self._rejecting = False
        self._given_up = False
        self._allowed = asyncio.Event()
        self._allowed.set()
        self._unanswered: dict[str, Future[Answer]] = {}
        self._asked: Counter[int] = Counter()
        self._updates = 0
        self._global_steps: int | None = None

    def _longest_sequence(self) -> int:
        """Tokens of prompt and response together, at most."""
        config, positions = self._config, context_limit(self._module.config)
        wished = config.max_model_len
        if wished is not None and positions is not None and wished > positions:
            refuse([f"max_model_len={wished} of a model with {positions} positions"])
        lengths = config.prompt_length + config.response_length
        return int(wished or positions or lengths)

    def _make_engine(self) -> HybridEngine:
        config = self._config
        wished: dict[str, Any] = dict(config.engine_kwargs.get(NAME, {}))
        defaults = {"max_batch": config.max_num_seqs, "cuda_graphs": not config.enforce_eager}
        if self._device.type == "cuda":
            share = config.gpu_memory_utilization * torch.cuda.mem_get_info(self._device)[1]
            free = cache_budget(self._device, 0)
            defaults["kv_bytes"] = max(1, min(free, int(share) - self._weights.nbytes))
        settings = EngineSettings(**defaults | wished)
        # Where a response ends is asked of every request.
        engine = HybridEngine(self._module, eos_ids=(), decode=self._decode, settings=settings)
        if engine.path not in ("fused", "modules"):
            refuse([f"requests that join others on the path {engine.path}: {engine.reason}"])
        return engine

    # ---- generation -----------------------------------------------------------------------------

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling_params: Mapping[str, Any],
        request_id: str,
        image_data: Any = None,
        video_data: Any = None,
        audio_data: Any = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        priority: int = 0,
    ) -> Any:
        """Draw one response.

        Args:
            prompt_ids: P token ids.
            sampling_params: by the names of vLLM's `SamplingParams`, see `sampling_of`.
            request_id: for `abort_request`.
            image_data, video_data, audio_data: refused unless None or empty.
            mm_processor_kwargs, priority: have no meaning here.

        Returns:
            `TokenOutput`: ids, the one that ended it included; with `logprobs` their log-probs
            under the distribution that was drawn from, of greedy draws under the model; stop_reason
            completed or aborted; extra_fields has the weights' `global_steps`.

        Raises:
            EnvironmentFault: RF7331 a setting that we lack, RF7332 no weights, RF7333 asleep.
            GenerationError: as `HybridEngine.complete`.
        """
        media = {"image_data": image_data, "video_data": video_data, "audio_data": audio_data}
        refuse([name for name, value in media.items() if value], where=f"request {request_id}")
        while self._blocked:
            if self._rejecting:
                return self._output(Answer([], [], [], False, aborted=True), None)
            await self._allowed.wait()
        normalized = importlib.import_module("verl.utils").normalize_token_ids(prompt_ids)
        prompt = tuple(int(token) for token in normalized)
        eos_ids = tuple(self._eos_ids)
        sampling = sampling_of(sampling_params, len(prompt), self._config, self._limit, eos_ids)
        seed = sampling_params.get("seed")
        seed = self._next_seed(prompt) if seed is None else int(seed) & (2**63 - 1)
        request = Request(prompt, sampling, (seed,), name=f"request {request_id}")
        future = self._running().submit(request)
        self._unanswered[request_id] = future
        steps = self._global_steps
        try:
            answer = await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if self._live is not None:
                self._live.abort([future])
            raise
        finally:
            self._unanswered.pop(request_id, None)
        drawn = None
        if sampling_params.get("logprobs", False):
            greedy = sampling.temperature == 0.0
            drawn = answer.raw_logprobs if greedy else answer.logprobs
        return self._output(answer, drawn, steps)

    def _running(self) -> LiveRequests:
        """Who answers requests.

        Raises:
            EnvironmentFault: RF7332, RF7333.
        """
        if self._asleep:
            raise EnvironmentFault(
                "RF7333",
                "a request came while the rollout sleeps",
                expected="wake_up() before generate()",
            )
        if not self._complete:
            raise EnvironmentFault(
                "RF7332",
                "the rollout has no weights, or not all of them",
                expected="an update of the weights that has come to its end before generate()",
            )
        if self._engine is None:
            self._engine = self._make_engine()
        if self._live is None:
            config = self._config
            longest = min(self._limit, config.prompt_length + config.response_length)
            stops = len(self._eos_ids) + _SPARE_STOPS
            rows = self._engine.settings.max_batch
            room = Room(rows, config.response_length, longest, stops)
            self._live = LiveRequests(self._engine, room)
        return self._live

    def _next_seed(self, prompt: tuple[int, ...]) -> int:
        key = derive_seed(*prompt)
        self._asked[key] += 1
        weights = (self._global_steps or 0, self._updates)  # steps alone may stand still
        return derive_seed(self._config.seed, self._rank, *weights, key, self._asked[key])

    def _output(
        self, answer: Answer, logprobs: list[float] | None, steps: int | None = None
    ) -> Any:
        return self._outputs(
            token_ids=answer.tokens,
            log_probs=logprobs,
            stop_reason="aborted" if answer.aborted else "completed",
            extra_fields={"global_steps": self._global_steps if steps is None else steps},
        )

    # ---- weights --------------------------------------------------------------------------------

    async def begin_update(self) -> Places:
        """Hand the weights over for writing; what is not answered yet is answered as aborted."""
        self._complete = False
        await self._pause()
        if self._given_up:
            self._weights.allocate_again()
            self._given_up = False
        return self._weights.places()

    async def finish_update(self, global_steps: int | None = None) -> None:
        """All weights have been written.

        Args:
            global_steps: of the trainer; None: as before.
        """
        self._complete = True
        self._updates += 1
        self._asked.clear()
        if global_steps is not None:
            self._global_steps = global_steps
        if self._live is not None and not self._blocked:
            self._live.resume()

    async def set_global_steps(self, global_steps: int) -> None:
        """What answers say of the weights that drew them."""
        self._global_steps = global_steps

    # ---- memory ---------------------------------------------------------------------------------

    async def sleep(self) -> None:
        """Give pages back, and a GPU also the weights, which then have to be written again.

        What is not answered yet is answered as aborted.
        """
        if not self._config.free_cache_engine or self._asleep:
            return
        self._asleep = True
        await self._free_pages()
        if self._weights.give_up():
            self._complete, self._given_up = False, True

    async def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Take memory again: `weights`, and with `kv_cache` requests are answered again."""
        wanted = ("weights", "kv_cache") if tags is None else tags
        if "weights" in wanted and self._given_up:
            self._weights.allocate_again()
            self._given_up = False
        if "kv_cache" in wanted:
            self._asleep = False

    async def release_kv_cache(self) -> None:
        """Give pages back; the weights stay."""
        if self._config.free_cache_engine:
            await self._free_pages()

    async def resume_kv_cache(self) -> None:
        """Pages come with the next request."""

    async def clear_kv_cache(self) -> None:
        """Nothing to do: pages serve running requests alone, and no run outlives its weights."""

    async def _free_pages(self) -> None:
        live, self._live, self._engine = self._live, None, None
        if live is not None:
            await asyncio.to_thread(live.close)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    async def _pause(self) -> int:
        return 0 if self._live is None else await asyncio.to_thread(self._live.pause)

    # ---- requests as a whole --------------------------------------------------------------------

    async def abort_all_requests(
        self, reset_prefix_cache: bool = True, reject_request: bool = False
    ) -> dict[str, Any]:
        """Answer everybody with what there is, and hold who comes until `resume_generation`.

        Args:
            reset_prefix_cache: has no meaning here.
            reject_request: answer who comes as aborted, instead.
        """
        self._blocked, self._rejecting = True, reject_request
        self._allowed.clear()
        names = list(self._unanswered)
        await self._pause()
        return {"aborted_count": len(names), "request_ids": names}

    async def resume_generation(self) -> None:
        """Requests are answered again."""
        self._blocked = self._rejecting = False
        if self._live is not None:
            self._live.resume()
        self._allowed.set()

    async def abort_request(self, request_id: str) -> dict[str, Any]:
        """Answer one request with what there is."""
        future = self._unanswered.get(request_id)
        if future is None or self._live is None:
            return {"aborted": False, "request_id": request_id}
        self._live.abort([future])
        return {"aborted": True, "request_id": request_id}

    async def wait_for_requests_to_drain(self) -> None:
        """Until nothing is unanswered."""
        while self._unanswered:
            waiting = [asyncio.wrap_future(future) for future in self._unanswered.values()]
            await asyncio.gather(*waiting, return_exceptions=True)
            await asyncio.sleep(0)

    # ---- the rest of what verl calls ------------------------------------------------------------

    def get_rollout_config(self) -> Any:
        """verl's `RolloutConfig`."""
        return self._config

    async def start_profile(self, **options: Any) -> None:
        """Nothing is profiled here."""

    async def stop_profile(self) -> None:
        """Nothing is profiled here."""
