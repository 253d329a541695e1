"""What a run that ran out of memory found to be too much, for the run that goes on after it.

Memory that runs out on one rank alone, in the middle of a forward of a model that is cut, ends the
job: the other ranks cannot be reached. The rank writes `out_of_memory.json` before it leaves, and
the next run starts from the last checkpoint with half the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf_fast.errors import LoneOutOfMemory
from rlhf_fast.ppo.trainer import PPOLearner
from rlhf_fast.stages.messages import say
from rlhf_fast.stages.run import OUT_OF_MEMORY_NAME, Run
from rlhf_fast.stages.run_files import read_json, write_json


@contextmanager
def remembering(run: Run, learner: PPOLearner) -> Iterator[None]:
    """Start with what an earlier run found to fit; write down what is found now."""
    path = run.path / OUT_OF_MEMORY_NAME
    _recall(run, path, learner)
    try:
        yield
    except LoneOutOfMemory:
        write_json(
            path,
            {
                "token_budget": learner.budget.state_dict(),
                "rollout_halvings": learner.rollout_halvings,
            },
        )
        raise


def _recall(run: Run, path: Path, learner: PPOLearner) -> None:
    found = run.on_main(lambda: read_json(path))
    if found is None:
        return
    budget = found["token_budget"]
    fewest = min(budget["tokens"], learner.budget.tokens)  # a checkpoint may know of less still
    learner.budget.load_state_dict(budget | {"tokens": fewest})
    for _ in range(int(found["rollout_halvings"])):
        learner.roles.halve_rollout()
    learner.rollout_halvings = int(found["rollout_halvings"])
    say(
        [
            f"an earlier run ran out of memory: {learner.budget.tokens} tokens in a forward, "
            f"rollouts halved {learner.rollout_halvings} times ({path})"
        ]
    )
