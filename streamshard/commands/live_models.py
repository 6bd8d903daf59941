"""LoRA in live models, as the methods of `InternVLChatModel` of the same names put it there.

Needs peft, and only when it is called.
"""

from __future__ import annotations

from typing import Any

from streamshard.errors import InputError, UsageError, listed, printable
from streamshard.extras import needed_for
from streamshard.internvl.families import FAMILIES, Family
from streamshard.internvl.lora_targets import (
    UPSTREAM_DROPOUT,
    UPSTREAM_R,
    target_ends,
    upstream_alpha,
)

__all__ = ["wrap_backbone_lora", "wrap_llm_lora"]

_ALPHA = upstream_alpha(UPSTREAM_R)


def wrap_llm_lora(
    model: Any,
    r: int = UPSTREAM_R,
    lora_alpha: float = _ALPHA,
    lora_dropout: float = UPSTREAM_DROPOUT,
) -> None:
    """Wrap `model.language_model` by peft, in place, and print its trainable parameters.

    Target modules are chosen by the language model's architecture (`llm_arch_name` of the model, else
    `config.architectures`, else the name of the class): those of upstream, and for Qwen3, mixtures
    of experts, InternLM3 and GPT-OSS, where upstream raises, those of `streamshard wrap-lora`. Of
    experts that the class packs into one parameter only the attention around them gets LoRA.
    As upstream's, this leaves `model.config.use_llm_lora` to the caller, who must set it to `r`
    before saving.

    Raises `UsageError` for a model without such a part or peft, `InputError` for an architecture
    that is not known.
    """
    llm = _part(model, "language_model")
    family = _family(llm, getattr(model, "llm_arch_name", None))
    ends = target_ends(family.name, "custom", "language_model")
    if any(name.endswith(".experts.gate_up_proj") for name, _ in llm.named_parameters()):
        # Names of an expert's layers, which peft would take for the packed parameters.
        ends = [end for end in ends if "." in end]
    model.language_model = _wrapped(llm, ends, r, lora_alpha, lora_dropout, task_type="CAUSAL_LM")
    model.language_model.enable_input_require_grads()
    model.language_model.print_trainable_parameters()


def wrap_backbone_lora(
    model: Any,
    r: int = UPSTREAM_R,
    lora_alpha: float = _ALPHA,
    lora_dropout: float = UPSTREAM_DROPOUT,
) -> None:
    """Wrap `model.vision_model` by peft, in place, and print its trainable parameters.

    Raises `UsageError` for a model without such a part or peft.
    """
    vision = _part(model, "vision_model")
    ends = target_ends("llama", "custom", "vision_model")
    model.vision_model = _wrapped(vision, ends, r, lora_alpha, lora_dropout)
    model.vision_model.print_trainable_parameters()


def _part(model: Any, name: str) -> Any:
    part = getattr(model, name, None)
    if part is None:
        raise UsageError(
            f"the {type(model).__name__} has no {name}; an InternVLChatModel, or another model with "
            "parts of its names, was expected. Of HF models wrap the whole model with peft."
        )
    if hasattr(part, "peft_config"):
        raise UsageError(
            f"{name} is wrapped by peft already: wrapping it again would begin its adapter anew. Train "
            "it as it is."
        )
    return part


def _family(llm: Any, stated: str | None) -> Family:
    """The family of a language model, by what the whole model, the config or the class says."""
    config = getattr(llm, "config", None)
    names = [stated, *(getattr(config, "architectures", None) or []), type(llm).__name__]
    name = next(name for name in names if name)
    for family in FAMILIES.values():
        if family.architecture == name:
            return family
    known = listed([family.architecture for family in FAMILIES.values()], len(FAMILIES))
    raise InputError(f"the language model is a {printable(name)}; {known} are supported.")


def _wrapped(
    part: Any, ends: list[str], r: int, lora_alpha: float, lora_dropout: float, **more: Any
) -> Any:
    with needed_for("wrapping a live model"):
        from peft import LoraConfig, get_peft_model
    config = LoraConfig(
        r=r, target_modules=ends, lora_alpha=lora_alpha, lora_dropout=lora_dropout, **more
    )
    return get_peft_model(part, config)
