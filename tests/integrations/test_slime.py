"""slime's functions, from their definitions in fp64, and the switch on a stand-in of slime.

slime is not on PyPI. Its own tests are run on our functions outside of this suite.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf_fast.errors import EnvironmentFault
from rlhf_fast.integrations import slime as adapter
from tests.integrations.peers import EXAMPLES, Batch, batches

RATES = st.sampled_from((0.0, 0.5, 0.95, 1.0))
VOCAB = 13


def discounted(numbers: Tensor, rate: float) -> Tensor:
    """Sum over k of rate^k numbers[:, t + k], term by term."""
    steps = range(numbers.shape[1])
    rows = [sum(rate ** (k - t) * numbers[:, k] for k in steps if k >= t) for t in steps]
    return torch.stack(rows, dim=1)


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    step = 1e-5 if dtype == torch.float32 else 2**-8
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=step, atol=step)


@EXAMPLES
@given(batch=batches(), gamma=RATES, lambd=RATES)
def test_both_forms_of_gae(batch: Batch, gamma: float, lambd: float) -> None:
    rewards, values = batch.floats(), batch.floats()
    v = values.double()
    following = torch.cat([v[:, 1:], torch.zeros(len(v), 1, dtype=torch.float64)], dim=1)
    expected = discounted(rewards.double() + gamma * following - v, gamma * lambd)
    for function in (adapter.vanilla_gae, adapter.chunked_gae):
        advantages, returns = function(rewards, values, gamma, lambd)
        close(advantages, expected, batch.dtype)
        close(returns, expected + v, batch.dtype)


@EXAMPLES
@given(batch=batches(), discount=RATES, chunk_size=st.sampled_from((2, 128)))
def test_discounted_returns(batch: Batch, discount: float, chunk_size: int) -> None:
    rewards = batch.floats()
    found = adapter.chunked_discounted_returns(rewards, discount, chunk_size)
    close(found, discounted(rewards.double(), discount), batch.dtype)
    in_fp64 = adapter.chunked_discounted_returns(rewards.double(), discount)
    torch.testing.assert_close(in_fp64, discounted(rewards.double(), discount))


@EXAMPLES
@given(batch=batches(), with_entropy=st.booleans(), with_gradient=st.booleans())
def test_log_probs_and_entropy(batch: Batch, with_entropy: bool, with_gradient: bool) -> None:
    logits = batch.floats(VOCAB, scale=4.0).flatten(0, 1).requires_grad_()
    tokens = batch.labels(VOCAB).flatten()
    log_probs, entropy = adapter.log_probs_and_entropy(
        logits, tokens, None, with_entropy, with_gradient
    )
    exact = logits.detach().double().requires_grad_()
    everything = exact - exact.exp().sum(-1, keepdim=True).log()
    expected = everything.gather(-1, tokens[:, None])
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs.double(), expected, rtol=1e-5, atol=1e-5)
    assert (entropy is not None) == with_entropy
    weights = torch.linspace(-1, 1, len(tokens), dtype=torch.float64)
    truth, loss = (expected[:, 0] * weights).sum(), (log_probs[:, 0] * weights).sum()
    if entropy is not None:
        exact_entropy = -(everything.exp() * everything).sum(-1)
        torch.testing.assert_close(entropy.double(), exact_entropy, rtol=1e-5, atol=1e-5)
        assert entropy.requires_grad == with_gradient
        if with_gradient:
            truth, loss = truth + exact_entropy.sum(), loss + entropy.sum()
    truth.backward()
    loss.backward()
    assert exact.grad is not None
    assert logits.grad is not None
    step = 1e-5 if batch.dtype == torch.float32 else 2**-7
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=step, atol=step)


# ---- the switch ---------------------------------------------------------------------------------

NAMES = ("vanilla_gae", "chunked_gae", "chunked_discounted_returns")
OWN = """
def vanilla_gae(rewards, values, gamma, lambd): pass
def chunked_gae(rewards, values, gamma, lambd, chunk_size=128): pass
def chunked_discounted_returns(rewards, discount, chunk_size=128): pass
def calculate_log_probs_and_entropy(logits, tokens, tp_group, with_entropy=False, chunk_size=-1,
        log_prob_keep_mask=None, with_entropy_grad=True):
    return "own", with_entropy, chunk_size, log_prob_keep_mask, with_entropy_grad
"""


@pytest.fixture
def slime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ModuleType]]:
    """Writes a package with slime's names and a version, and loads its functions."""
    for name in [m for m in sys.modules if m.partition(".")[0] == "slime"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)

    def write(source: str = OWN) -> ModuleType:
        utils = tmp_path / "slime" / "utils"
        utils.mkdir(parents=True)
        for folder in (utils.parent, utils):
            (folder / "__init__.py").write_text("")
        (utils / "ppo_utils.py").write_text(source)
        (utils / "loss.py").write_text("from slime.utils.ppo_utils import chunked_gae\n")
        info = tmp_path / "slime.dist-info"
        info.mkdir()
        about = "Metadata-Version: 2.1\nName: slime\nVersion: 0.3.1\n"
        (info / "METADATA").write_text(about)
        importlib.import_module("slime.utils.loss")
        return importlib.import_module("slime.utils.ppo_utils")

    yield write
    adapter.uninstall()
    for name in [m for m in sys.modules if m.partition(".")[0] == "slime"]:
        del sys.modules[name]


def test_megatrons_init_replaces_for_good_and_a_scope_gives_back(slime: Any) -> None:
    module = slime()
    own = {name: getattr(module, name) for name in NAMES}
    with adapter.patched() as report:
        assert all(getattr(module, name) is getattr(adapter, name) for name in NAMES)
        assert "slime.utils.loss.chunked_gae" in report.replaced
    assert {name: getattr(module, name) for name in NAMES} == own
    adapter.megatron_init(None)
    assert sys.modules["slime.utils.loss"].chunked_gae is adapter.chunked_gae
    adapter.uninstall()
    assert {name: getattr(module, name) for name in NAMES} == own


def test_slimes_own_log_probs_run_on_cpus_and_with_a_mask(slime: Any) -> None:
    module, logits = slime(), torch.zeros(2, 3, device="cpu")
    tokens = torch.zeros(2, dtype=torch.long, device="cpu")
    with adapter.patched():
        function = module.calculate_log_probs_and_entropy
        assert function(logits, tokens, None, True, 7) == ("own", True, 7, None, True)
        options = {"log_prob_keep_mask": "mask", "with_entropy_grad": False}
        found = function(logits.to("meta"), tokens, None, **options)
        assert found == ("own", False, -1, "mask", False)


def test_other_arguments_are_refused_and_slime_is_as_it_was(slime: Any) -> None:
    module = slime(OWN.replace("discount, chunk_size=128", "discount, mask, chunk_size=128"))
    own = module.vanilla_gae
    with pytest.raises(EnvironmentFault, match=r"RF7303.*chunked_discounted_returns takes"):
        adapter.install()
    assert module.vanilla_gae is own


@pytest.mark.parametrize(("version", "code"), [("0.0.0", "RF7302"), (None, "RF7301")])
def test_another_package_and_none_are_refused(
    slime: Any, version: str | None, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def installed(package: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return version

    module = slime()
    monkeypatch.setattr(importlib.metadata, "version", installed)
    own = module.vanilla_gae
    with pytest.raises(EnvironmentFault, match=code) as caught:
        adapter.install()
    assert "pip install slime" not in caught.value.remedy
    assert module.vanilla_gae is own
