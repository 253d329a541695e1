"""verl's own trainer as users start it: its processes, what they import, what they print."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.integrations import verl_loop

ROOT = Path(__file__).parents[2]
# What verl imports in each process, by the device that it trains on.
EXTERNAL = {
    "cpu": "rlhf_fast.integrations.verl,bench.integrations.verl_cpu",
    "cuda": "rlhf_fast.integrations.verl,bench.integrations.verl_alone",
}


def environment(device: str = "cpu", *folders: Path) -> dict[str, str]:
    """Of every process of a run: they find this checkout and switch the adapter on.

    Args:
        device: where verl trains.
        folders: of modules beside the checkout.
    """
    paths: list[Path | str] = [*folders, ROOT, ROOT / "kernels"]
    simulated = {}
    if device == "cuda" and "simulated_cuda" in sys.modules:
        paths.insert(0, ROOT / "tests" / "simulated_cuda" / "every_process")
        simulated["SIMULATED_CUDA_DEVICES"] = "1"  # as Ray shares them out
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    return simulated | {
        "VERL_USE_EXTERNAL_MODULES": EXTERNAL[device],
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        # Not niced: on a machine with other work Ray's workers would get no turn.
        "RAY_worker_niceness": "0",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


def trained(
    directory: Path, ranks: int, *overrides: str, device: str = "cpu", external: str = ""
) -> str:
    """What two steps of `main_ppo` print, with a training worker and a server a rank.

    Their samples were drawn with the probabilities that verl's engine gives.

    Args:
        directory: of `verl_loop.write_model` and `verl_loop.write_run`.
        ranks: how many GPUs Ray is told of.
        overrides: of verl's config, after those of `verl_loop`.
        device: where verl trains.
        external: one more module that verl imports, in `directory`.
    """
    ray_options = ["num_cpus=16", f"+num_gpus={ranks}", "+include_dashboard=False"]
    ray_options = [
        f"{'+' * o.startswith('+')}ray_kwargs.ray_init.{o.lstrip('+')}" for o in ray_options
    ]
    arguments = verl_loop.overrides(directory, directory / "model", device)
    arguments.append(f"trainer.n_gpus_per_node={ranks}")
    variables = os.environ | environment(device, directory)
    variables["VERL_USE_EXTERNAL_MODULES"] += f",{external}" * bool(external)
    done = subprocess.run(
        [sys.executable, "-m", "verl.trainer.main_ppo", *arguments, *ray_options, *overrides],
        cwd=directory,
        env=variables,
        capture_output=True,
        text=True,
        timeout=560,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    printed = done.stdout + done.stderr
    gaps = numbers(printed, "rollout_probs_diff_max")
    assert len(gaps) == 2
    assert max(gaps) < 1e-5
    return printed


def numbers(printed: str, name: str) -> list[float]:
    """What verl printed by a name, as a number of Python or of NumPy."""
    return [float(x) for x in re.findall(rf"{name}:(?:np\.\w+\()?([\d.e+-]+)", printed)]


def require_steps(printed: str, *models: str) -> None:
    """Each of these models was updated twice."""
    for model in models:
        norms = numbers(printed, f"{model}/grad_norm")
        assert len(norms) == 2
        assert min(norms) > 0
