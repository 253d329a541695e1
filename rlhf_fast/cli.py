"""`rlhf-fast demo | sft | rm | ppo | eval | plan | report | bench | env | check`.

Exit codes: 0 ok, 1 internal error, 2 config or data, 3 environment, 4 numerical abort, 75 preempted
after a good checkpoint, 130 interrupted. A user's mistake is one message; `--debug` adds the
traceback. Stages are imported when they run, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import importlib.util
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import rlhf_fast
from rlhf_fast.config import EvalConfig, PPOConfig, RewardModelConfig, SFTConfig, StageConfig
from rlhf_fast.config_loading import documented_yaml, load_config, to_yaml
from rlhf_fast.errors import (
    EXIT_ENVIRONMENT,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EnvironmentFault,
    PeerError,
    RLHFError,
)
from rlhf_fast.launch import launched_ranks

STAGES: dict[str, type[StageConfig]] = {
    "sft": SFTConfig,
    "rm": RewardModelConfig,
    "ppo": PPOConfig,
    "eval": EvalConfig,
}
STAGE_HELP = {
    "sft": "stage 1: supervised fine-tuning on demonstrations",
    "rm": "stage 2: reward model from ranked completions",
    "ppo": "stage 3: PPO with a KL penalty (RLOO and GRPO as settings)",
    "eval": "reward, KL and best-of-N of a policy",
}
#: Groups and presets of the benches, which are imported when they run.
BENCH_GROUPS = (
    *("kernels", "generate", "step", "memory", "learning", "distributed", "complexity"),
    "all",
)
BENCH_PRESETS = ("tiny", "quick", "cpu", "h200")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options, unknown = _parser().parse_known_args(arguments)
    # argparse ends the list of overrides at the first option; those after it arrive here.
    late = [word for word in unknown if "=" in word and not word.startswith("-")]
    if late and hasattr(options, "overrides"):
        options.overrides = [*options.overrides, *late]
        unknown = [word for word in unknown if word not in late]
    if unknown:
        _fail_once(f"RF1006: unknown option {unknown[0]}\n  to do:    see rlhf-fast --help")
        return 2
    _show_notices()
    try:
        _check_ranks(options.command)
        _check_op_choice()
        handler: Callable[[argparse.Namespace], int] = options.handler
        return handler(options)
    except PeerError as error:
        return error.exit_code  # another rank says why
    except RLHFError as error:
        if options.debug:
            traceback.print_exc()
        _fail_once(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        _fail_once("RF8099: interrupted before there was anything to save")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output left (`| head`): not an error of this program.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except OSError as error:
        return _os_fault(error, options.debug)
    except Exception as error:
        if options.debug:
            traceback.print_exc()
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
            _fail_once(
                f"RF7064: out of device memory: {error}\n"
                "  to do:    see `rlhf-fast plan` for what fits and what saves memory"
            )
            return EXIT_ENVIRONMENT
        _fail_once(
            f"RF9001: internal error: {type(error).__name__}: {error}\n"
            "  to do:    run again with --debug and report the traceback"
        )
        return 1


class _Notices(logging.Handler):
    """Warnings of this package as plain lines on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        from rlhf_fast.stages.progress import printable

        _fail(f"{record.levelname.lower()}: {printable(record.getMessage())}")


def _show_notices() -> None:
    logger = logging.getLogger("rlhf_fast")
    if not any(isinstance(handler, _Notices) for handler in logger.handlers):
        logger.addHandler(_Notices(logging.WARNING))


def _check_ranks(command: str) -> None:
    """Only training runs on several ranks; other commands would do the same thing N times."""
    if launched_ranks() > 1 and command not in ("sft", "rm", "ppo"):
        raise EnvironmentFault(
            "RF7053",
            f"{command} runs in one process",
            where="torchrun",
            expected="sft, rm or ppo under torchrun",
            remedy=f"start `rlhf-fast {command}` without torchrun",
        )


def _check_op_choice() -> None:
    """A wrong RLHF_FAST_OPS is the user's mistake: say so at the start, not in the first step."""
    if os.environ.get("RLHF_FAST_OPS"):
        from rlhf_fast.environment import check_op_choice

        check_op_choice()


def _fail(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _fail_once(message: str) -> None:
    """Say why this process ends; of several ranks that have not joined yet, one says it."""
    with suppress(EnvironmentFault):  # it may be this that is said
        if launched_ranks() > 1:
            from rlhf_fast.distributed.first_word import another_spoke_first

            if another_spoke_first():
                return
    _fail(message)


def _os_fault(error: OSError, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    what = "the disk is full" if full else f"{error.strerror or error}"
    remedy = "free some space and run again; the last checkpoint is intact" if full else ""
    lines = [f"RF7001: {what}", f"  where:    {error.filename or 'a file of the run'}"]
    _fail_once("\n".join([*lines, f"  to do:    {remedy}"] if remedy else lines))
    return EXIT_ENVIRONMENT


class _Parser(argparse.ArgumentParser):
    """argparse, with its mistakes in the project's one-message form."""

    def error(self, message: str) -> None:  # type: ignore[override]
        _fail_once(f"RF1006: {message}\n  to do:    see {self.prog} --help")
        raise SystemExit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="rlhf-fast", description="RLHF of language models with PPO.")
    parser.add_argument("--version", action="version", version=rlhf_fast.__version__)
    common = _Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo", parents=[common], help="SFT -> reward model -> PPO on a built-in task, on the CPU"
    )
    demo.add_argument("--output", default="runs/demo", help="folder of the run (%(default)s)")
    demo.add_argument("--seed", type=int, default=1)
    demo.add_argument("--quick", action="store_true", help="about a minute, smaller effects")
    demo.add_argument("--overwrite", action="store_true", help="discard an earlier demo there")
    demo.set_defaults(handler=_demo)

    for name in STAGES:
        stage = commands.add_parser(name, parents=[common], help=STAGE_HELP[name])
        _add_config_arguments(stage)
        stage.add_argument(
            "--print-config",
            action="store_true",
            help="print the resulting config, or with no config the documented defaults",
        )
        stage.set_defaults(handler=_stage)

    plan = commands.add_parser(
        "plan",
        parents=[common],
        help="memory of a PPO run, and what fits, before anything is loaded",
    )
    plan.add_argument("--model", default=None, help="directory or config.json; default: actor")
    plan.add_argument("--gpus", type=int, default=1, metavar="N")
    plan.add_argument(
        "--gpu-memory", default=None, metavar="80GB", help="of each; default: the GPU here"
    )
    plan.add_argument("--json", action="store_true")
    _add_config_arguments(plan)
    plan.set_defaults(handler=_plan)

    report = commands.add_parser("report", parents=[common], help="report.html of a run directory")
    report.add_argument("run_dir", type=Path)
    report.add_argument("--out", type=Path, default=None, help="default: RUN_DIR/report.html")
    report.set_defaults(handler=_report)

    bench = commands.add_parser(
        "bench", parents=[common], help="speed and memory beside other libraries, on this machine"
    )
    _add_bench_arguments(bench)

    env = commands.add_parser("env", parents=[common], help="what was built and what each op uses")
    env.add_argument("--json", action="store_true")
    env.set_defaults(handler=_env)

    check = commands.add_parser(
        "check", parents=[common], help="validate config, data and models without training"
    )
    check.add_argument("stage", nargs="?", choices=list(STAGES))
    check.add_argument("--ops", action="store_true", help="parity self-test of the compiled ops")
    _add_config_arguments(check)
    check.set_defaults(handler=_check)
    return parser


def _add_config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, default=None, help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example kl.coef=0.1")


def _add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("group", nargs="?", choices=BENCH_GROUPS, default="all")
    parser.add_argument(
        "--preset",
        choices=BENCH_PRESETS,
        default="cpu",
        help="tiny: seconds each, proves that all runs; quick: few turns; default: %(default)s",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("results"), help="folder of the reports (%(default)s)"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="benches of the group"
    )
    parser.add_argument(
        "--threads", type=int, default=None, metavar="N", help="of torch on the CPU"
    )
    parser.add_argument(
        "--trl-python", metavar="PYTHON", help="interpreter that has TRL; default: this one"
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep what went well in --out, run the rest"
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        default=None,
        metavar=("A", "B"),
        help="run nothing: what changed from report or folder A to B, and whether beyond the noise",
    )
    parser.set_defaults(handler=_bench)


def _demo(options: argparse.Namespace) -> int:
    from rlhf_fast.report import build_demo_report
    from rlhf_fast.stages.demo import conclusion, run_demo

    results = run_demo(
        Path(options.output), seed=options.seed, quick=options.quick, overwrite=options.overwrite
    )
    report = build_demo_report(results, Path(options.output) / "report.html")
    text, succeeded = conclusion(results, report)
    print(text)
    return EXIT_OK if succeeded else 1


def _stage(options: argparse.Namespace) -> int:
    kind = STAGES[options.command]
    if options.print_config:
        bare = options.config is None and not options.overrides
        print(
            documented_yaml(kind)
            if bare
            else to_yaml(load_config(kind, options.config, options.overrides)),
            end="",
        )
        return EXIT_OK
    config = load_config(kind, options.config, options.overrides)
    if config.run.overwrite and not isinstance(config, PPOConfig):
        # A mistyped path must not cost the run that is about to be discarded. PPO reads everything
        # before it touches its directory.
        from rlhf_fast.stages.check import check_stage

        check_stage(config)
    from rlhf_fast.stages.stop_signals import ending_at_once

    with ending_at_once():
        text = _run_stage(config)
    if os.environ.get("RANK", "0") == "0":
        print(text)
    return EXIT_OK


def _run_stage(config: StageConfig) -> str:
    if isinstance(config, SFTConfig):
        from rlhf_fast.stages.sft import run_sft

        return run_sft(config).summary()
    if isinstance(config, RewardModelConfig):
        from rlhf_fast.stages.reward_model import run_reward_model

        return run_reward_model(config).summary()
    if isinstance(config, PPOConfig):
        from rlhf_fast.stages.ppo import run_ppo

        return run_ppo(config).summary()
    from rlhf_fast.stages.evaluate import run_evaluate

    return run_evaluate(config).summary()


def _report(options: argparse.Namespace) -> int:
    from rlhf_fast.report import build_report

    out = options.out or options.run_dir / "report.html"
    print(f"report: {build_report(options.run_dir, out)}")
    return EXIT_OK


def _plan(options: argparse.Namespace) -> int:
    from rlhf_fast.stages.plan import run_plan
    from rlhf_fast.stages.plan_text import plan_as_json, show_plan

    result = run_plan(
        options.config,
        options.overrides,
        model=options.model,
        gpus=options.gpus,
        gpu_memory=options.gpu_memory,
    )
    if options.json:
        print(json.dumps(plan_as_json(result), indent=2))
    else:
        show_plan(result)
    return EXIT_OK


def _bench(options: argparse.Namespace) -> int:
    command = _bench_command()
    if options.compare is not None:
        shown: int = command.show_comparison(*options.compare)
        return shown
    done: int = command.run(
        options.group,
        options.preset,
        options.out,
        names=options.only,
        threads=options.threads,
        trl_python=options.trl_python,
        resume=options.resume,
    )
    return done


def _bench_command() -> ModuleType:
    """The benches beside this package: `rlhf_fast_bench` installed, `bench` in a checkout.

    Only beside it: an installed version must not measure another one's checkout, and there are
    other packages called `bench`.
    """
    home = Path(rlhf_fast.__file__).resolve().parents[1]
    checkout = (home / "setup.py").is_file()
    if checkout and str(home) not in sys.path:
        sys.path.append(str(home))  # it was installed in place
    # Installed in place, the benches of a checkout go by both names; one of them is enough.
    for name in ("bench", "rlhf_fast_bench") if checkout else ("rlhf_fast_bench", "bench"):
        spec = importlib.util.find_spec(name)
        places = [] if spec is None else spec.submodule_search_locations or []
        if any(Path(place).resolve().parent == home for place in places):
            return importlib.import_module(f"{name}.command")
    raise EnvironmentFault(
        "RF7032",
        "the benchmarks are not part of this installation",
        where=str(home),
        expected="the package rlhf_fast_bench beside rlhf_fast",
        remedy="install rlhf-fast from its wheel or repository, or run in a checkout",
    )


def _env(options: argparse.Namespace) -> int:
    from rlhf_fast.environment import collect, render

    facts = collect()
    print(json.dumps(facts, indent=2) if options.json else render(facts))
    return EXIT_OK


def _check(options: argparse.Namespace) -> int:
    if options.ops:
        from rlhf_fast.environment import check_ops

        text, passed = check_ops()
        print(text)
        return EXIT_OK if passed else EXIT_ENVIRONMENT
    if options.stage is None:
        names = ", ".join(STAGES)
        _fail(
            f"RF1006: check needs a stage ({names}) or --ops\n  to do:    rlhf-fast check ppo ..."
        )
        return 2
    from rlhf_fast.stages.check import check_stage

    print(check_stage(load_config(STAGES[options.stage], options.config, options.overrides)))
    return EXIT_OK
