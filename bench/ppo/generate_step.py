"""transformers' `generate` on the policy, prompts and lengths of a case: the first phase alone.

    python -m bench.ppo.generate_step CASE_JSON      # a child of bench_step, see bench.ppo.side

One padded batch that runs to the longest response, as TRL's generation does, without the scores
that TRL asks for.
"""

from __future__ import annotations

import sys

import torch

from ..engine.peers import generate
from . import resident
from .case import Case, build_models, warm_libraries
from .meter import Meter
from .side import Turns


def main() -> None:
    """Build the model, say so, and generate when told to."""
    turns = Turns()
    case = Case.from_json(sys.argv[1])
    torch.set_num_threads(case.threads)
    warm_libraries()
    empty = resident.resident()
    policy = build_models(case).policy.eval()
    base = resident.resident()
    run = generate(policy, case.prompts(), case.response_lengths())
    meter = Meter(base)
    turns.tell({"models_bytes": base - empty})
    while turns.wait():
        meter.begin()
        with meter.phase("generate"):
            run()
        turns.tell(meter.end())


if __name__ == "__main__":
    main()
