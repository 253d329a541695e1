"""A GRPO run on our generator under torchrun: each rank writes what it drew and where it ended."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

# By the name it has beside this script: verl and OpenRLHF bring a package called `tests`.
from trl_cases import Recorder, online_trainer

from rlhf_fast.integrations import trl_rollout


def main(folder: Path) -> None:
    recorder = Recorder()
    trainer = online_trainer("GRPO", folder, recorder)
    trl_rollout.attach(trainer)
    trainer.train()
    found = {
        "device": str(trainer.model.device),
        "wrapper": type(trainer.model_wrapped).__name__,
        "completions": recorder.completions,
        "weights": [float(p.detach().double().sum()) for p in trainer.model.parameters()],
    }
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(found), encoding="utf-8")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # Threads of gloo outlive their group in DDP's hands. One that still drops a tensor while the
    # interpreter ends aborts the process; what this script is for is written by now.
    os._exit(0)
