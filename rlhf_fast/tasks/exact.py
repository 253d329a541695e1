"""The microscope: a task so small that everything about KL-regularised RL is known exactly.

Responses are 3 tokens over a vocabulary of 6, so there are 216 of them and every expectation is a
sum. With reference policy `ref`, rewards `r` and KL coefficient `beta`, the objective

    J(pi) = E_pi[r] - beta * KL(pi || ref)

has the maximiser and maximum (Ziegler et al. 2019; Rafailov et al. 2023, appendix A.1)

    pi*(y) = ref(y) exp(r(y) / beta) / Z      J* = beta log Z      Z = sum_y ref(y) exp(r(y) / beta)

A policy trained by PPO with the same beta and gamma = 1 must come close to J*. A sign or off-by-one
error in advantages, KL, masks or log-probs moves it visibly away, which curves of a large run hide.

The prompt is the single token `BOS`, which is also an ordinary response token: a model over exactly
6 ids cannot leave the 216 sequences. No token ends a response; all of them have 3 tokens.

A policy is given as its log-probabilities over `sequences()`, a tensor [216] in fp64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf_fast.errors import DataError, NumericalError

VOCAB = 6
LENGTH = 3
COUNT = VOCAB**LENGTH
BOS = 0

_PLACES = (VOCAB**2, VOCAB, 1)


def sequences() -> Tensor:
    """All responses [216, 3] int64 in lexicographic order: row i is i in base 6."""
    index = torch.arange(COUNT)
    return torch.stack([index // place % VOCAB for place in _PLACES], dim=1)


def sequence_index(responses: Tensor) -> Tensor:
    """Rows of `sequences()` that equal `responses` [S, 3]; result [S] int64.

    Raises:
        DataError: RF2911, another width than 3 or ids outside 0 to 5.
    """
    legal = responses.dim() == 2 and responses.shape[1] == LENGTH
    if not legal or bool(((responses < 0) | (responses >= VOCAB)).any()):
        raise DataError(
            "RF2911",
            "these are not responses of the exact task",
            where=f"tensor of shape {list(responses.shape)}",
            expected=f"[S, {LENGTH}] with ids 0 to {VOCAB - 1}",
        )
    places = torch.tensor(_PLACES, device=responses.device)
    return (responses.long() * places).sum(dim=1)


@dataclass(frozen=True)
class Summary:
    """Exact figures of a policy at one `beta`; rewards and objective in reward units, KL in nats.

    `gain` is the fraction of the achievable gain, (J - J(ref)) / (J* - J(ref)): 1 at the optimum, 0
    at the reference, negative for a policy worse than the reference.
    """

    reward: float
    kl: float
    objective: float
    optimal_objective: float
    gain: float


@dataclass(frozen=True)
class ExactTask:
    """A reward for each of the 216 responses.

    Attributes:
        rewards: [216] fp64 in the order of `sequences()`.
    """

    rewards: Tensor

    @classmethod
    def from_seed(cls, seed: int) -> ExactTask:
        """Independent standard normal rewards drawn with `seed`."""
        generator = torch.Generator().manual_seed(seed)
        return cls(torch.randn(COUNT, generator=generator, dtype=torch.float64))

    def score(self, responses: Tensor) -> Tensor:
        """Rewards [S] fp32 of `responses` [S, 3], on their device."""
        index = sequence_index(responses)
        return self.rewards.to(device=responses.device, dtype=torch.float32)[index]

    def expected_reward(self, logprobs: Tensor) -> float:
        """E_pi[r]."""
        return float(_expectation(_normalised(logprobs), self.rewards))

    def objective(self, logprobs: Tensor, ref_logprobs: Tensor, beta: float) -> float:
        """J(pi) = E_pi[r] - beta * KL(pi || ref)."""
        return self.expected_reward(logprobs) - beta * kl_divergence(logprobs, ref_logprobs)

    def optimal_logprobs(self, ref_logprobs: Tensor, beta: float) -> Tensor:
        """log pi* [216]: the maximiser of J for `beta` > 0."""
        tilted = _normalised(ref_logprobs) + self.rewards / _positive(beta)
        return tilted - tilted.logsumexp(dim=0)

    def optimal_objective(self, ref_logprobs: Tensor, beta: float) -> float:
        """J* = beta log sum ref exp(r / beta), for `beta` > 0."""
        tilted = _normalised(ref_logprobs) + self.rewards / _positive(beta)
        return beta * float(tilted.logsumexp(dim=0))

    def best_of_n(self, ref_logprobs: Tensor, n: int) -> Tensor:
        """Log-probabilities [216] of the best by reward of `n` independent responses of `ref`.

        With F(r) the chance that one response has reward at most r, the chance that the best one
        has reward r is F(r)^n - F(r-)^n; responses of equal reward share it in proportion to `ref`.
        The KL of this policy is at most log n - (n - 1) / n.

        Raises:
            DataError: RF2912, `n` below 1.
        """
        if n < 1:
            raise DataError("RF2912", f"best of {n} is not defined", where="n", expected="n >= 1")
        ref = _normalised(ref_logprobs).exp()
        levels, level = self.rewards.unique(sorted=True, return_inverse=True)
        mass = torch.zeros_like(levels).index_add_(0, level, ref)
        upper = mass.cumsum(0).clamp(max=1.0)
        lower = torch.cat([upper.new_zeros(1), upper[:-1]])
        # F^n - G^n = F^n (1 - (G/F)^n), without cancellation where F and G are close.
        log_ratio = torch.log(lower / upper)
        log_mass = n * torch.log(upper) + torch.log(-torch.expm1(n * log_ratio))
        return (log_mass - torch.log(mass))[level] + torch.log(ref)

    def summary(self, logprobs: Tensor, ref_logprobs: Tensor, beta: float) -> Summary:
        """All exact figures of a policy [216] against the reference [216] at `beta` > 0."""
        objective = self.objective(logprobs, ref_logprobs, beta)
        start = self.expected_reward(ref_logprobs)
        best = self.optimal_objective(ref_logprobs, beta)
        return Summary(
            reward=self.expected_reward(logprobs),
            kl=kl_divergence(logprobs, ref_logprobs),
            objective=objective,
            optimal_objective=best,
            gain=(objective - start) / (best - start),
        )


def kl_divergence(logprobs: Tensor, ref_logprobs: Tensor) -> float:
    """KL(pi || ref) in nats of two policies [216]; 0 log 0 counts as 0."""
    log_p, log_q = _normalised(logprobs), _normalised(ref_logprobs)
    terms = torch.where(log_p > -math.inf, log_p - log_q, 0.0)
    return float(_expectation(log_p, terms))


def build_policy(seed: int) -> GPT2LMHeadModel:
    """A randomly initialised GPT-2 over the 6 tokens (50 k parameters), fp32 on the CPU.

    Learned positions are what matters here. With rotary ones a position only enters the attention
    weights, and over equal tokens every weighted average is the same: after BOS = 0 the contexts
    "0", "0 0" and "0 0 0" would share one next-token distribution, and the optimum would be out of
    reach whatever the trainer does.

    Args:
        seed: the weights are a function of it; the global random state is left as it was.
    """
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=1 + LENGTH,
        n_embd=64,
        n_layer=1,
        n_head=8,
        n_inner=256,
        activation_function="gelu_pytorch_tanh",  # GPT-2's GELU in one kernel instead of eight
        initializer_range=0.05,
        tie_word_embeddings=False,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=BOS,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)


@torch.no_grad()
def policy_logprobs(model: nn.Module) -> Tensor:
    """Log-probabilities [216] fp64 of a Hugging Face causal LM over the 6 ids, at temperature 1.

    One forward over all 216 sequences; the softmax is taken in fp64 on the CPU. Dropout must be
    off.

    Raises:
        NumericalError: RF6911, the model's logits are not finite.
    """
    device = next(model.parameters()).device
    responses = sequences().to(device)
    prompt = torch.full((COUNT, 1), BOS, device=device)
    logits = model(input_ids=torch.cat([prompt, responses[:, :-1]], dim=1)).logits
    if not bool(torch.isfinite(logits).all()):
        raise NumericalError("RF6911", "the policy's logits are not finite", where="logits")
    logprobs = logits.cpu().double().log_softmax(dim=-1)
    return logprobs.gather(-1, responses.cpu().unsqueeze(-1)).squeeze(-1).sum(dim=1)


def _expectation(logprobs: Tensor, values: Tensor) -> Tensor:
    return (logprobs.exp() * values).sum()


def _normalised(logprobs: Tensor) -> Tensor:
    """Check that [216] log-probabilities sum to 1 and return them in fp64.

    A sum that is off is never repaired: it means the caller's policy is not the one it sampled.
    """
    values = logprobs.detach().cpu().double()
    if values.shape != (COUNT,):
        raise DataError(
            "RF2913",
            "a policy of the exact task has one log-probability per response",
            where=f"tensor of shape {list(values.shape)}",
            expected=f"[{COUNT}]",
        )
    total = float(values.exp().sum())
    if not abs(total - 1.0) < 1e-4:
        raise NumericalError(
            "RF6912",
            f"probabilities of all responses sum to {total:.6g}",
            where="logprobs",
            expected="1 within 1e-4",
            remedy="check temperature, masking and the position each log-prob is read at",
        )
    return values


def _positive(beta: float) -> float:
    if not beta > 0.0:
        raise DataError(
            "RF2914", f"the optimum is not defined for beta {beta}", where="beta", expected="> 0"
        )
    return beta
