"""What PPO refuses about its roles before anything is generated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import peft
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from rlhf_fast.errors import ConfigError, ModelError
from rlhf_fast.models.attention_mode import attention_configs
from rlhf_fast.models.checks import check_context, check_same_tokenizer, check_vocabulary
from rlhf_fast.models.forward import ComputeDtype
from rlhf_fast.models.loading import adopt_module, load_tokenizer
from rlhf_fast.models.rewards import judges_of
from rlhf_fast.models.roles import TrunkCritic
from rlhf_fast.ppo.roles import Roles


def check_tokenizers(tokenizer: Any, **directories: str) -> None:
    """Refuse roles with another tokenizer than the actor's: ids are handed over as they are.

    Args:
        tokenizer: the actor's.
        directories: role -> its directory, empty if it comes from elsewhere.

    Raises:
        ModelError: RF3023.
    """
    for role, directory in directories.items():
        if directory:
            check_same_tokenizer(tokenizer, load_tokenizer(directory), names=f"actor, {role}")


def role_modules(roles: Roles) -> list[tuple[str, nn.Module]]:
    """The modules with a trunk of their own, each with its role."""
    modules = [("actor", roles.actor.module), ("reference", roles.reference.module)]
    if roles.critic is not None and not isinstance(roles.critic, TrunkCritic):
        modules.append(("critic", roles.critic.module))
    modules += [("reward model", judge.module) for judge in judges_of(roles.reward)]
    return modules


def check_roles(roles: Roles, tokenizer: Any, prompt: int, response: int) -> None:
    """Refuse a role that cannot read the longest sequence, before anything is generated.

    Args:
        roles: the roles as built.
        tokenizer: the actor's.
        prompt: tokens of the longest prompt.
        response: tokens of the longest response.

    Raises:
        ModelError: ids without an embedding (RF3021), or too few positions (RF3022).
    """
    for role, module in role_modules(roles):
        check_vocabulary(tokenizer, module, role=role)
        check_context(module, prompt, response, role=role)


def adopt_modules(dtype: ComputeDtype, modules: Mapping[str, nn.Module | None]) -> None:
    """Bring modules made elsewhere, by role, to what the loaders return: fp32 masters and so on.

    Raises:
        ConfigError: RF1041, a trained role shares weights with another.
        ModelError: a weight is NaN or Inf (RF3020); adapters of peft (RF3065).
    """
    owners: dict[nn.Parameter, str] = {}
    for role, module in modules.items():
        if module is None:
            continue
        _refuse_adapters(module, role)
        for parameter in module.parameters():
            owner = owners.setdefault(parameter, role)
            if owner != role and {owner, role} & {"model", "critic"}:
                raise ConfigError(
                    "RF1041",
                    f"{owner} and {role} are the same weights",
                    where=f"{owner}, {role}",
                    expected="models of their own: one of the two is trained",
                    remedy=f"leave out {role}, which makes a copy, or pass copy.deepcopy of it"
                    if role in ("reference", "critic")
                    else f"pass copy.deepcopy of {role}",
                )
        adopt_module(module, dtype=dtype, role=role)


def _refuse_adapters(module: nn.Module, role: str) -> None:
    """A wrapper of peft has no trunk that could be called, and adapters in a trained model would be
    exported as layers that no model has. A frozen model may have some within.
    """
    trained = role in ("model", "critic")
    within = trained and any(isinstance(part, BaseTunerLayer) for part in module.modules())
    if within or isinstance(module, peft.PeftModel):
        raise ModelError(
            "RF3065",
            "the model has adapters already",
            where=f"{role} ({type(module).__name__})",
            expected="a base model",
            remedy="merge them (merge_and_unload of peft), or pass the base model, lora.rank and "
            "the adapter's directory as lora.actor_adapter",
        )


def share_nothing(modules: Iterable[nn.Module]) -> bool:
    """Whether the modules may compute at the same time: no tensor or config is in two of them.

    A config counts because a forward switches the attention that it names.
    """
    seen: set[int] = set()
    for module in modules:
        parts = {id(part) for part in (*module.parameters(), *module.buffers())}
        parts |= {id(config) for config in attention_configs(module)}
        if parts & seen:
            return False
        seen |= parts
    return True
