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
from rlhf_fast.ppo.out_of_memory import TokenBudget
from rlhf_fast.ppo.trainer import PPOLearner
from rlhf_fast.stages.messages import say
from rlhf_fast.stages.run import OUT_OF_MEMORY_NAME, Run
from rlhf_fast.stages.run_files import read_json, unreadable, write_json
from rlhf_fast.stages.saved_state import difference

_MAX_HALVINGS = 64  # of a number of samples: more cannot be


@contextmanager
def remembering(run: Run, budget: TokenBudget, learner: PPOLearner | None = None) -> Iterator[None]:
    """Start with what an earlier run found to fit; write down what is found now.

    Args:
        run: the open run.
        budget: tokens of a forward.
        learner: whose rollouts may have been too large.
    """
    path = run.path / OUT_OF_MEMORY_NAME
    _recall(run, path, budget, learner)
    try:
        yield
    except LoneOutOfMemory:
        halvings = 0 if learner is None else learner.rollout_halvings
        write_json(path, {"token_budget": budget.state_dict(), "rollout_halvings": halvings})
        raise


def _recall(run: Run, path: Path, budget: TokenBudget, learner: PPOLearner | None) -> None:
    found = run.on_main(lambda: read_json(path))
    if found is None:
        return
    like = {"token_budget": budget.state_dict(), "rollout_halvings": 0}
    problem = difference(found, like, "it", complete=True)
    if problem is None and found["rollout_halvings"] > _MAX_HALVINGS:
        problem = f"it.rollout_halvings is {found['rollout_halvings']}"
    if problem:
        raise unreadable(path, problem)
    before = found["token_budget"]
    fewest = min(before["tokens"], budget.tokens)  # a checkpoint may know of less still
    budget.load_state_dict(before | {"tokens": fewest})
    if learner is not None:
        learner.rollout_halvings = int(found["rollout_halvings"])
        for _ in range(learner.rollout_halvings):
            learner.roles.halve_rollout()
    say(
        [
            f"an earlier run ran out of memory: {budget.tokens} tokens in a forward, rollouts "
            f"halved {found['rollout_halvings']} times ({path})"
        ]
    )
