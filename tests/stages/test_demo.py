"""The short demo, end to end, and its exported policy judged once more by plain transformers."""

import dataclasses
import errno
import json
import math
import statistics
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_fast.cli import main
from rlhf_fast.distributed.durable import FileSystem
from rlhf_fast.errors import CheckpointError, EnvironmentFault
from rlhf_fast.stages import demo as demo_module
from rlhf_fast.stages.demo import DEMO_FILE, conclusion, run_demo
from rlhf_fast.stages.demo_plan import RESPONSE_TOKENS
from rlhf_fast.tasks.demo_results import DemoResults
from rlhf_fast.tasks.gold import gold_scores
from rlhf_fast.tasks.reviews import prompt_split

SEED = 3


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(folder, exit code) of one quick demo through the command line."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    return folder, main(["demo", "--quick", "--seed", str(SEED), "--output", str(folder)])


@pytest.mark.slow
def test_the_demo_succeeds_and_leaves_what_it_says(demo):
    folder, code = demo
    results = DemoResults.load(folder / "demo_results.json")
    assert code == 0
    assert results.gold_rise >= 0.8
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert "<svg" in report
    assert "://" not in report.replace("http://www.w3.org/2000/svg", "")
    assert all(Path(place).exists() for place in results.files.values())
    gold = [point.gold for point in results.best_of_n]
    assert gold == sorted(gold)


@pytest.mark.slow
def test_plain_transformers_reproduces_the_gold_score(demo):
    folder, _ = demo
    reported = DemoResults.load(folder / "demo_results.json").ppo[-1]
    tokenizer = AutoTokenizer.from_pretrained(folder / "ppo" / "model", padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder / "ppo" / "model")
    prompts = prompt_split(SEED)[1] * 16
    batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    torch.manual_seed(0)
    with torch.no_grad():
        out = model.generate(
            **batch, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=RESPONSE_TOKENS
        )
    texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    scores = gold_scores(prompts, texts)
    error = math.hypot(statistics.stdev(scores) / math.sqrt(len(scores)), reported.gold_error)
    assert abs(statistics.fmean(scores) - reported.gold) < 4 * error


@pytest.mark.slow
def test_a_finished_demo_is_not_run_again_and_keeps_its_folder(demo, capsys):
    folder, _ = demo
    before = (folder / "demo_results.json").read_bytes()
    assert main(["demo", "--quick", "--seed", str(SEED), "--output", str(folder)]) == 0
    assert "finished before" in capsys.readouterr().out
    assert (folder / "demo_results.json").read_bytes() == before
    with pytest.raises(CheckpointError, match="RF8402"):
        run_demo(folder, seed=SEED + 1, quick=True)


@pytest.mark.slow
def test_a_demo_whose_gold_score_does_not_rise_fails(demo):
    folder, _ = demo
    results = DemoResults.load(folder / "demo_results.json")
    last = dataclasses.replace(results.ppo[-1], gold=results.sft.gold + 0.79)
    text, succeeded = conclusion(
        dataclasses.replace(results, ppo=(*results.ppo[:-1], last)), folder / "report.html"
    )
    assert not succeeded
    assert "FAILED" in text


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(CheckpointError, match="RF8401"):
        run_demo(tmp_path)
    with pytest.raises(CheckpointError, match="RF8401"):
        run_demo(tmp_path, overwrite=True)
    assert (tmp_path / "mine.txt").read_text() == "keep me"
    with pytest.raises(CheckpointError, match="RF8401"):
        run_demo(tmp_path / "mine.txt")


def test_a_full_disk_leaves_a_demo_its_mark(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FileSystem, "write", full)
        with pytest.raises(EnvironmentFault, match="RF7101"):
            run_demo(tmp_path / "run", seed=SEED)
    assert not list((tmp_path / "run").iterdir())
    monkeypatch.setattr(demo_module, "Demo", stop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_demo(tmp_path / "run", seed=SEED)
        # A folder whose demo has begun is not written to before its first stage is.
        monkeypatch.setattr(demo_module, "write_json", lambda *_: pytest.fail("written again"))
    assert json.loads((tmp_path / "run" / DEMO_FILE).read_text())["seed"] == SEED
