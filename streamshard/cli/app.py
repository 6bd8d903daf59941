"""The commands that write: parsed, given to one public function, its report printed.

Results go to stdout, progress and messages to stderr; `--json` prints one JSON document.
"""

from __future__ import annotations

from typing import Any

import click

from streamshard.cli import texts
from streamshard.cli.command import CONTEXT, INPUTS, MEANING, OUTPUT, Group, argument, option
from streamshard.cli.options import (
    ADAPTER_NAME,
    ALLOW_MISSING,
    ALLOW_UNEXPECTED,
    ALPHA,
    BASE,
    CARD,
    CONVERSION,
    DRAWING,
    REFERENCE,
    SPLITTING,
    TOKENIZER_FROM,
    WRITING,
    output,
)
from streamshard.cli.screen import write
from streamshard.version import __version__

__all__ = ["cli"]


@click.group(cls=Group, context_settings=CONTEXT)
@click.version_option(__version__, "-V", "--version", prog_name="streamshard")
def cli() -> None:
    """Merge LoRA adapters into InternVL checkpoints and convert them, tensor by tensor.

    Works on a CPU-only machine in some tens of MB of memory, whatever the model's size, and
    refuses what it cannot do exactly.

    \b
    Examples:
      streamshard merge-lora --adapter ./my-lora --base ./InternVL3-8B \\
          --output ./merged
      streamshard hf2custom --hf-path ./tuned-hf --custom-path ./InternVL3-8B \\
          --save-path ./tuned
      streamshard inspect ./merged
      streamshard verify ./merged
    """


@cli.command("merge-lora", short_help="Fold LoRA adapters into a base checkpoint.")
@argument(
    "checkpoint",
    metavar="[CHECKPOINT]",
    required=False,
    help="Instead of --adapter and --base: a training checkpoint with the pairs inside.",
)
@option(
    INPUTS,
    "--adapter",
    "adapters",
    multiple=True,
    metavar="FOLDER",
    help="PEFT adapter folder. Give it again to sum several adapters.",
)
@BASE(help="What the adapter was trained on: checkpoint folder or weight file.")
@REFERENCE(
    help="With --layout: the original model in that layout, for config, code and tokenizer. With "
    "CHECKPOINT: the original model, for what the trainer did not save: config, code, tokenizer."
)
@output("New, or empty, folder to write.  [default: ./<base name>-merged]")
@option(
    OUTPUT,
    "--layout",
    type=click.Choice(["keep", "custom", "hf"]),
    metavar="keep|custom|hf",
    default="keep",
    show_default=True,
    help="Convert in the same pass; needs --reference.",
)
@TOKENIZER_FROM(
    help="With --layout: whose tokenizer belongs to the weights, if the vocabularies differ."
)
@option(
    MEANING,
    "--weight",
    "weights",
    multiple=True,
    type=float,
    metavar="FACTOR",
    help="Factor on an adapter's update, once per --adapter.  [default: 1]",
)
@ALPHA(help="With CHECKPOINT: alpha of its pairs.  [default: 2 r, as InternVL's trainer has it]")
@ADAPTER_NAME
@option(
    MEANING,
    "--base-is-residual",
    is_flag=True,
    help="The base is the residual one that PiSSA, OLoRA, LoftQ, ... left behind.",
)
@option(
    MEANING,
    "--expert-order",
    type=click.Choice(["peft", "unsloth"]),
    metavar="peft|unsloth",
    default="peft",
    show_default=True,
    help="How the trainer ordered the factors of fused experts.",
)
@option(
    MEANING,
    "--allow-merged-base",
    is_flag=True,
    help="Merge although the base seems to hold the adapter already.",
)
@ALLOW_MISSING
@ALLOW_UNEXPECTED(
    help="With --layout: write although the source has tensors with no place; report them."
)
@CARD
@DRAWING
@SPLITTING()
@WRITING
def merge_lora(adapters: tuple[str, ...], weights: tuple[float, ...], **options: Any) -> None:
    """Fold LoRA adapters into a base checkpoint.

    Either PEFT adapters into a base (--adapter, --base), or the pairs inside a LoRA-wrapped training
    checkpoint of InternVL (CHECKPOINT: use_llm_lora, use_backbone_lora) into itself.

    The output is a complete folder: merged weights, config, tokenizer and every other file of
    the base. A merged element is the exact W + s*B*A, rounded once; everything else is
    copied byte for byte. Each tensor of the adapter must find its weight, or nothing is written.
    Adapter and base may be in different layouts.

    \b
    Examples:
      streamshard merge-lora --adapter ./my-lora --base ./InternVL3-8B \\
          --output ./merged
      streamshard merge-lora --adapter ./my-lora --base ./InternVL3-8B --dry-run
      streamshard merge-lora --adapter ./a --weight 0.7 \\
          --adapter ./b --weight 0.3 --base ./InternVL3-8B \\
          --output ./merged --max-shard-size 2GB
      streamshard merge-lora --adapter ./hf-lora --base ./InternVL3-8B-hf \\
          --output ./merged --layout custom --reference ./InternVL3-8B
      streamshard merge-lora ./work_dirs/my-lora-run --output ./merged \\
          --reference ./InternVL3-8B
    """
    adapter, weight = list(adapters) or None, list(weights)
    write("merge_lora", "merging", texts.merge_text, adapter=adapter, weight=weight, **options)


@cli.command("hf2custom", short_help="Convert HF weights to the custom layout.")
@option(INPUTS, "--hf-path", required=True, metavar="CHECKPOINT", help="Checkpoint to convert.")
@option(
    INPUTS,
    "--custom-path",
    required=True,
    metavar="FOLDER",
    help="Original model in the custom layout: config, code, tokenizer; weights to compare with.",
)
@CONVERSION
def hf2custom(**options: Any) -> None:
    """Convert HF weights (InternVLForConditionalGeneration) to the custom layout (InternVLChatModel).

    Weights come from --hf-path, in any spelling that transformers ever wrote; everything else from
    --custom-path, which may have no weights. If it has some, the L2 distance from them is
    printed. Missing and unexpected tensors are errors.

    \b
    Example:
      streamshard hf2custom --hf-path ./my-finetune-hf \\
          --custom-path ./InternVL3-8B --save-path ./my-finetune
    """
    write("hf_to_custom", "converting", texts.conversion_text, **options)


@cli.command("custom2hf", short_help="Convert custom weights to the HF layout.")
@option(INPUTS, "--custom-path", required=True, metavar="CHECKPOINT", help="Checkpoint to convert.")
@option(
    INPUTS,
    "--hf-path",
    required=True,
    metavar="FOLDER",
    help="Original model in the HF layout: config, tokenizer, processor; weights to compare with.",
)
@CONVERSION
def custom2hf(**options: Any) -> None:
    """Convert custom weights (InternVLChatModel) to the HF layout (InternVLForConditionalGeneration).

    The inverse of hf2custom. Names are those that every version of transformers reads.

    \b
    Example:
      streamshard custom2hf --custom-path ./my-finetune \\
          --hf-path ./InternVL3-8B-hf --save-path ./my-finetune-hf
    """
    write("custom_to_hf", "converting", texts.conversion_text, **options)


@cli.command("wrap-lora", short_help="Put fresh LoRA pairs into a checkpoint.")
@BASE(required=True, help="Checkpoint folder or weight file (.safetensors, .bin).")
@output("New, or empty, folder to write.")
@option(
    OUTPUT,
    "--format",
    type=click.Choice(["wrapped", "peft"]),
    metavar="wrapped|peft",
    default="wrapped",
    show_default=True,
    help="A whole checkpoint for InternVL's trainer, or a PEFT adapter folder.",
)
@option(MEANING, "--llm-r", type=int, metavar="RANK", help="Rank in the language model.")
@option(MEANING, "--llm-alpha", type=float, metavar="ALPHA", help="Its alpha.  [default: 2 RANK]")
@option(MEANING, "--backbone-r", type=int, metavar="RANK", help="Rank in the vision encoder.")
@option(
    MEANING, "--backbone-alpha", type=float, metavar="ALPHA", help="Its alpha.  [default: 2 RANK]"
)
@option(
    MEANING,
    "--dropout",
    type=float,
    metavar="PROBABILITY",
    help="For the adapter's config.  [default: 0.05]",
)
@option(
    MEANING,
    "--seed",
    type=int,
    metavar="NUMBER",
    default=0,
    show_default=True,
    help="As of torch.manual_seed before wrapping.",
)
@SPLITTING()
@WRITING
def wrap_lora(**options: Any) -> None:
    """Put fresh LoRA pairs into a checkpoint, as wrap_llm_lora and wrap_backbone_lora do.

    lora_A gets the values that PEFT draws after torch.manual_seed(SEED), lora_B is zero; everything
    else is copied byte for byte. A wrapped checkpoint stores neither alpha nor dropout: upstream's
    model takes 2 RANK and 0.05.

    \b
    Examples:
      streamshard wrap-lora --base ./InternVL3-8B --output ./wrapped --llm-r 16
      streamshard wrap-lora --base ./InternVL3-8B --output ./lora \\
          --llm-r 16 --llm-alpha 16 --backbone-r 8 --format peft
    """
    write("wrap_lora", "wrapping", texts.wrap_text, **options)


@cli.command("extract-lora", short_help="Take the LoRA pairs out of a training checkpoint.")
@argument(
    "checkpoint",
    metavar="CHECKPOINT",
    help="Training checkpoint of InternVL with LoRA pairs inside.",
)
@BASE(help="The model that the training started from: what else was trained is kept too.")
@output("New, or empty, folder to write the adapter to.")
@ALPHA()
@ADAPTER_NAME
@SPLITTING(hidden=True)  # an adapter is one file, as is told where it is given
@WRITING
def extract_lora(**options: Any) -> None:
    """Take the LoRA pairs out of a training checkpoint of InternVL, as a PEFT adapter folder.

    With --base, whatever else differs from it (the projector, usually) is stored in the adapter as
    modules_to_save; without, it is left out with a warning.

    \b
    Example:
      streamshard extract-lora ./work_dirs/my-lora-run \\
          --base ./InternVL3-8B --output ./adapter
    """
    write("extract_lora", "extracting", texts.extract_text, **options)
