"""The documentation against the code: names, files, settings, metrics, error codes, examples."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch

from rlhf_fast import errors
from rlhf_fast.cli import _parser
from rlhf_fast.config import EvalConfig, PPOConfig, RewardModelConfig, SFTConfig
from rlhf_fast.config_loading import load_config
from rlhf_fast.data.formats import parse_prompt, parse_sft
from rlhf_fast.data.preferences import parse_preference
from rlhf_fast.data.rows import Row
from rlhf_fast.models.reward_function import load_reward_function
from rlhf_fast.stages.evaluate import run_evaluate
from rlhf_fast.stages.ppo import run_ppo
from rlhf_fast.stages.reward_model import run_reward_model
from rlhf_fast.stages.sft import run_sft
from tests.models.tiny import build_classifier, tokenizer
from tests.stages.tiny_runs import as_pairs, demonstrations, model_directory, ranked, write_rows

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
EXAMPLES = {
    "sft.yaml": SFTConfig,
    "rm.yaml": RewardModelConfig,
    "ppo.yaml": PPOConfig,
    "eval.yaml": EvalConfig,
}
_CODE = re.compile(r"RF\d{4}")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def config_page() -> ModuleType:
    """docs/generate_config.py, by its path: `docs` is no package."""
    path = ROOT / "docs" / "generate_config.py"
    spec = importlib.util.spec_from_file_location("generate_config", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def table(text: str) -> list[list[str]]:
    """Rows of Markdown tables whose first cell is code or an error code."""
    rows = [line.strip().strip("|").split("|") for line in text.splitlines() if line[:2] == "| "]
    return [[cell.strip() for cell in row] for row in rows]


# ---- names and links ----------------------------------------------------------------------------


@cache
def functions_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_test_file_and_link_named_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for file, function in re.findall(r"(tests/[\w/]+\.py)::(\w+)", text):
        assert function in functions_of(ROOT / file), f"{file}::{function}"
    places = re.findall(
        r"`((?:rlhf_fast|kernels|csrc|tests|bench|docs|examples)/[\w./]*\w\.\w+)[`:]", text
    )
    missing = [place for place in places if not (ROOT / place).exists()]
    assert missing == []
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_page_is_reachable_from_the_readme() -> None:
    readme = read("README.md")
    pages = [f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")]
    assert [page for page in pages if f"({page})" not in readme] == []


def test_first_screen_of_the_readme_holds_both_commands() -> None:
    first = "\n".join(read("README.md").splitlines()[:12])
    assert "make demo" in first
    assert "make test" in first


def test_every_detail_is_done_different_or_later() -> None:
    items = re.split(r"\n(?=\d+\. |## )", read("docs/ppo_details.md"))
    details = [item for item in items if re.match(r"\d+\. \*\*", item)]
    assert len(details) == 52
    for item in details:
        assert re.search(r"\b(Done|Different|Later)\b", item), item
        assert "tests/" in item or re.search(r"\*\* Later\.\s*$", item), item


# ---- settings -----------------------------------------------------------------------------------


def test_page_of_settings_is_up_to_date() -> None:
    assert read("docs/config.md") == config_page().render(), "run: python docs/generate_config.py"


def test_settings_named_in_the_migration_page_exist() -> None:
    text = read("docs/migrating_from_trl.md")
    keys = {
        match for row in table(text) if len(row) > 1 for match in re.findall(r"`([^`]+)`", row[1])
    }
    page = read("docs/config.md")
    for key in keys:
        section, _, leaf = key.partition("=")[0].rpartition(".")
        if section in ("run", "rollout", "sampling", "reward", "kl", "algorithm", "data"):
            block = page.split("## PPO")[1].split(f"\n{section}:\n")[1]
            assert re.match(rf"(?:  .*\n)*?  {leaf}: ", block), key


def test_defaults_of_the_reward_model_are_the_recipe() -> None:
    config = RewardModelConfig()
    assert config.epochs == 1
    assert config.optim.schedule == "linear"
    assert "dropout" not in read("docs/config.md")


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_configs_are_valid(name: str) -> None:
    load_config(EXAMPLES[name], ROOT / "examples" / name)


def test_example_reward_function_scores_and_abstains() -> None:
    reward = load_reward_function(f"{ROOT / 'examples' / 'reward_function.py'}:reward")
    scores = reward(prompts=["a", "b", "c"], completions=["x y", "x x", " "])
    assert scores == [2 / 40, 1 / 40, None]


# ---- errors -------------------------------------------------------------------------------------


def _sources() -> Iterator[ast.Module]:
    for root in ("rlhf_fast", "kernels", "bench"):
        for path in sorted((ROOT / root).rglob("*.py")):
            yield ast.parse(path.read_text(encoding="utf-8"))


def _docstrings(tree: ast.Module) -> set[int]:
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef)
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, owners) and node.body]
    return {id(body[0].value) for body in bodies if isinstance(body[0], ast.Expr)}


def codes_in_source() -> dict[str, set[str]]:
    """code -> kinds of error that carry it; a message printed without one has the kind ''."""
    found: dict[str, set[str]] = {}
    for tree in _sources():
        prose = _docstrings(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                if id(node) not in prose:
                    for code in _CODE.findall(node.value):
                        found.setdefault(code, set())
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
                first = node.args[0]
                if isinstance(first, ast.Constant) and hasattr(errors, node.func.id):
                    found.setdefault(str(first.value), set()).add(node.func.id)
    return found


def test_error_codes_in_source_and_page_are_the_same() -> None:
    listed = [row[0] for row in table(read("docs/errors.md")) if _CODE.fullmatch(row[0])]
    assert len(listed) == len(set(listed)), "a code has two rows"
    assert set(listed) == set(codes_in_source())


def test_each_code_belongs_to_one_kind_of_its_family() -> None:
    families = {
        "1": {"ConfigError"},
        "2": {"DataError"},
        "3": {"ModelError"},
        "4": {"GenerationError", "DivergedGeneration"},
        "5": {"RewardError"},
        "6": {"NumericalError"},
        "7": {"EnvironmentFault", "LoneOutOfMemory"},
        "8": {"CheckpointError", "Preempted", "Interrupted", "StoppedEarly"},
        "9": set(),
    }
    for code, kinds in codes_in_source().items():
        assert len(kinds) <= 1, f"{code} is raised as {kinds}"
        assert kinds <= families[code[2]], f"{code} is raised as {kinds}"


def test_rows_of_errors_say_what_and_stand_in_their_family() -> None:
    for section in read("docs/errors.md").split("\n## ")[1:]:
        family = section[:3]
        for code, what, _, remedy in (r for r in table(section) if _CODE.fullmatch(r[0])):
            assert code.startswith(family)
            assert what
            assert remedy


# ---- metrics and examples, run on tiny models ---------------------------------------------------

SMALL = ["run.device=cpu", "data.max_prompt_length=24", "data.max_length=48"]
SAMPLING = ["sampling.max_new_tokens=6", "sampling.temperature=1.0"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four example configs, one after the other, on tiny models and data."""
    home = tmp_path_factory.mktemp("pipeline")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        (home / "data").mkdir()
        model_directory(home / "models" / "base")
        rows = demonstrations(24)
        write_rows(home / "data" / "demonstrations.jsonl", rows[:16])
        write_rows(home / "data" / "demonstrations_test.jsonl", rows[16:])
        write_rows(home / "data" / "preferences.jsonl", as_pairs(ranked(24, 2)))
        prompts = [{"prompt": row["prompt"]} for row in rows]
        write_rows(home / "data" / "prompts.jsonl", prompts[:16])
        write_rows(home / "data" / "prompts_test.jsonl", prompts[16:20])
        (home / "judge.py").write_text(
            "def judge(prompts, completions):\n    return [float(len(c)) for c in completions]\n",
            encoding="utf-8",
        )

        def example(name: str, *overrides: str) -> object:
            path = ROOT / "examples" / name
            return load_config(EXAMPLES[name], path, [*SMALL, *overrides])

        run_sft(example("sft.yaml", "batch_size=8", "run.save_every=1"), quiet=True)
        run_reward_model(example("rm.yaml", "batch_size=8", "run.save_every=1"), quiet=True)
        steps = ["total_steps=2", "rollout.prompts=4", "algorithm.ppo_epochs=1", "run.save_every=1"]
        ptx = ["ptx.coef=1", "ptx.data=data/demonstrations.jsonl", "ptx.batch_size=4"]
        run_ppo(example("ppo.yaml", *SAMPLING, *steps, *ptx, "kl.estimator=exact"))
        judges = ["reward.function=judge.py:judge", "samples_per_prompt=2", "best_of=[1,2]"]
        run_evaluate(example("eval.yaml", *SAMPLING, *judges), quiet=True)
    return home


def documented(section: str) -> set[str]:
    text = read("docs/metrics.md").split(f"\n## {section}\n")[1].split("\n## ")[0]
    return {row[0].strip("`") for row in table(text) if row[0].startswith("`")}


def written(run: Path) -> set[str]:
    names: set[str] = set()
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        names |= set(json.loads(line))
    return names - {"step"}


def test_every_hint_is_documented_and_the_reverse() -> None:
    source = read("rlhf_fast/ppo/health.py")
    section = read("docs/metrics.md").split("\n## Hints\n")[1].split("\n## ")[0]
    listed = {row[0] for row in table(section)[1:]}
    assert listed == set(re.findall(r'Hint\(\s*"([\w-]+)"', source))


@pytest.mark.parametrize(
    ("section", "folder"),
    [("SFT", "sft"), ("Reward model", "rm"), ("PPO", "ppo"), ("Evaluation", "eval")],
)
def test_every_metric_written_is_documented_and_the_reverse(
    pipeline: Path, section: str, folder: str
) -> None:
    names = {name for name in written(pipeline / "runs" / folder) if name[:5] != "time/"}
    if folder == "eval":
        names = {re.sub(r"best_of_\d+", "best_of_<n>", name) for name in names}
        names = {name.removesuffix("_stderr") for name in names}
    assert names == documented(section)


def test_phases_written_are_documented(pipeline: Path) -> None:
    paragraph = read("docs/metrics.md").split("`time/<phase>`")[1].split("\n## ")[0]
    listed = set(re.findall(r"`(\w+)`", paragraph))
    found = {
        name.removeprefix("time/")
        for folder in ("sft", "rm", "ppo")
        for name in written(pipeline / "runs" / folder)
        if name.startswith("time/")
    }
    assert found == listed


def test_files_of_a_run_are_those_documented(pipeline: Path) -> None:
    tree = read("docs/checkpoints.md").split("```")[1]
    documented_names = set(re.findall(r"^  (?:  )*([\w.-]+)/?(?=[ ,.\n])", tree, re.MULTILINE))
    run = pipeline / "runs" / "ppo"
    found = {path.name for path in run.iterdir()} | {
        p.name for p in (run / "checkpoints").iterdir()
    }
    found = {name for name in found if not name.startswith((".", "step-"))}
    assert found <= documented_names
    step = next((run / "checkpoints").glob("step-*"))
    assert {p.name for p in step.iterdir()} >= {"manifest.json", "state.json", "rng.safetensors"}


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", read(page), re.DOTALL)


def run_example(
    source: str, changes: dict[str, str], given: dict[str, object] | None = None
) -> dict[str, object]:
    for old, new in changes.items():
        assert old in source, old
        source = source.replace(old, new)
    space: dict[str, object] = dict(given or {})
    exec(compile(source, "example", "exec"), space)
    return space


def test_migration_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model_directory(tmp_path / "sft-model")
    build_classifier().save_pretrained(tmp_path / "reward-model")
    tokenizer().save_pretrained(tmp_path / "reward-model")
    changes = {"total_steps=157": "total_steps=1", "prompts=64": "prompts=8"}
    (example,) = python_blocks("docs/migrating_from_trl.md")
    run_example(example, changes)
    assert (tmp_path / "out" / "model" / "config.json").exists()
    assert (tmp_path / "out" / "final" / "model.safetensors").exists()


def test_readme_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model_directory(tmp_path / "sft-model")
    changes = {"total_steps=100": "total_steps=1", "prompts=64": "prompts=8"}
    training, _ = python_blocks("README.md")
    run_example(training, changes)
    assert "objective/scores" in written(tmp_path / "runs" / "arithmetic")


def test_readme_example_of_an_op_runs() -> None:
    _, op = python_blocks("README.md")
    head = torch.nn.Linear(8, 30)
    given: dict[str, object] = {
        "hidden": torch.randn(5, 8, requires_grad=True),
        "lm_head": head,
        "labels": torch.arange(5),
        "mask": torch.tensor([False, True, True, True, False]),
        "old_logprobs": torch.full((5,), -3.0),
        "advantages": torch.randn(5),
    }
    run_example(op, {}, given)
    assert head.weight.grad is not None
    assert bool(head.weight.grad.any())


def test_commands_of_the_pages_are_understood() -> None:
    pages = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    lines = re.findall(r"^(?: {4})?rlhf-fast (.*)$", pages, re.MULTILINE)
    lines += [
        line
        for line in re.findall(r"`rlhf-fast ([^`]*)`", pages)
        if not re.search(r"\||--help", line)
    ]
    shown = set()
    for line in lines:
        words = shlex.split(line, comments=True)
        options, unknown = _parser().parse_known_args(words)
        assert unknown == [], line
        shown.add(options.command)
    assert shown == {"demo", "sft", "rm", "ppo", "eval", "plan", "report", "bench", "env", "check"}


@pytest.mark.parametrize(("page", "count"), [("README.md", 4), ("docs/data.md", 5)])
def test_example_rows_are_read_as_some_stage_reads_them(page: str, count: int) -> None:
    blocks = re.findall(r"```json\n(.*?)```", read(page), re.DOTALL)
    rows = [json.loads(line) for block in blocks for line in block.splitlines()]
    assert len(rows) == count
    for i, fields in enumerate(rows):
        row = Row(f"{page}[{i}]", i, fields)
        if "chosen" in fields or "completions" in fields:
            parse_preference(row)
        elif "completion" in fields or "messages" in fields:
            parse_sft(row)
        else:
            parse_prompt(row)
