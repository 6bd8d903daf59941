"""Names of files in checkpoints, adapters and outputs, and what a name says of a file.

Which are a tokenizer's, which are not carried into an output, and which do harm where they are put
beside a checkpoint.
"""

from __future__ import annotations

import re
from typing import NamedTuple

__all__ = [
    "ADAPTER_CONFIG_NAME",
    "ADAPTER_NAME",
    "ADAPTER_NAMES",
    "CARD_NAME",
    "CHECKPOINT_NAMES",
    "CODE",
    "CONFIGS",
    "INDEX_NAME",
    "JOURNAL_NAME",
    "MODEL_CONFIG_NAME",
    "NOT_CARRIED",
    "NOT_ENTERED",
    "OTHER_ARRAYS",
    "PICKLED",
    "PICKLED_ADAPTER_NAME",
    "REPORT_NAME",
    "SINGLE_NAME",
    "SUFFIX",
    "TEMPLATE",
    "TEMPLATES",
    "TENSORS",
    "TOKENIZER",
    "TRAINING_STATE",
    "WEIGHTS",
    "Names",
    "numbered",
    "written_name",
]


SUFFIX = ".safetensors"
PICKLED = (".bin", ".pt", ".pth")
"""How files of torch end; only the first occurs in an index."""


class Names(NamedTuple):
    """What the index of several weight files is called, and what one file alone."""

    index_name: str
    single: str


# A checkpoint.
MODEL_CONFIG_NAME = "config.json"
CARD_NAME = "README.md"  # the model card, as hubs show it
SINGLE_NAME = f"model{SUFFIX}"
INDEX_NAME = f"{SINGLE_NAME}.index.json"

# A PEFT adapter.
ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_NAME = f"adapter_model{SUFFIX}"
PICKLED_ADAPTER_NAME = "adapter_model.bin"

# The names of weights, in the order in which loaders look for them.
CHECKPOINT_NAMES = (
    Names(INDEX_NAME, SINGLE_NAME),
    Names("pytorch_model.bin.index.json", "pytorch_model.bin"),
)
ADAPTER_NAMES = (
    Names(f"{ADAPTER_NAME}.index.json", ADAPTER_NAME),
    Names(f"{PICKLED_ADAPTER_NAME}.index.json", PICKLED_ADAPTER_NAME),
)

# Ours: what an output is recorded in, and what a run that is not finished is.
REPORT_NAME = "streamshard.json"
JOURNAL_NAME = "streamshard.journal"


def numbered(number: int, count: int) -> str:
    """The name of one of `count` weight files, counted from 1.

    >>> numbered(1, 4)
    'model-00001-of-00004.safetensors'
    """
    return f"model-{number:05d}-of-{count:05d}{SUFFIX}"


def written_name(name: str) -> str:
    """What the file is called that is written for a weight file of this name.

    >>> written_name("pytorch_model-00001-of-00004.bin")
    'model-00001-of-00004.safetensors'
    """
    stem, dot, end = name.rpartition(".")
    return f"{stem.removeprefix('pytorch_')}{SUFFIX}" if f"{dot}{end}" in PICKLED else name


# What a trainer needs to go on, and no part of a model; heads of reward models are used in training only.
TRAINING_STATE = re.compile(
    r"(?:optimizer|optim|scheduler|lr_scheduler|(?:grad_)?scaler|sampler|rng(?:_states?)?"
    r"|random_states?|train(?:ing|er)?_(?:args|state)|dataloader|dl_state_dict|custom_checkpoint"
    r"|value_head|v_head|vhead)(?:[-_.].*)?\.(?:safetensors|bin|pt|pth|ckpt|npz|npy|pkl|pickle)"
    r"|.*_(?:optim|model)_states\.pt",
    re.IGNORECASE | re.DOTALL,
)

# Files in which a trainer may save weights: those that are looked into, and those that are not read.
TENSORS = re.compile(r".*\.(?:safetensors|bin|pt|pth|ckpt)", re.IGNORECASE | re.DOTALL)
OTHER_ARRAYS = re.compile(r".*\.(?:npz|npy|pkl|pickle|h5|hdf5|msgpack)", re.IGNORECASE | re.DOTALL)

# Names may have line ends too, which only DOTALL passes over.
_KNOWN_WEIGHTS = "safetensors|bin|pt|pth|ckpt|gguf|msgpack|h5|onnx"

# What a training run or another tool leaves beside the weights and a loadable folder must not have.
NOT_CARRIED = re.compile(
    rf".*\.({_KNOWN_WEIGHTS})|.*\.index\.json|{re.escape(ADAPTER_CONFIG_NAME)}"
    r"|trainer_state\.json|zero_to_fp32\.py|latest"
    r"|training_log\.txt|trainer_log\.jsonl|(?:all|train|eval|test|predict)_results\.json"
    rf"|{re.escape(REPORT_NAME)}|{re.escape(JOURNAL_NAME)}",
    re.IGNORECASE | re.DOTALL,
)
# A folder with the name of a file is DeepSpeed's, and has nothing but weights.
NOT_ENTERED = re.compile(
    r"\..*|__pycache__|global_step\d+|checkpoint-\d+|runs|wandb|pytorch_model\.bin|model\.safetensors",
    re.DOTALL,
)
TOKENIZER = re.compile(
    r"tokenizer.*|vocab\.(?:json|txt|bpe)|merges\.txt|added_tokens\.json|special_tokens_map\.json"
    r"|tokenization_.*\.py|spiece\.model|sentencepiece.*|tekken\.json|[^/]*tiktoken[^/]*",
    re.DOTALL,
)
TEMPLATES = "additional_chat_templates"
TEMPLATE = re.compile(rf"chat_template\.(?:jinja|json)|{TEMPLATES}/[^/]*\.jinja", re.DOTALL)

# What loaders choose by name, in lower case: code, weights, and whatever else changes what is loaded.
CODE = re.compile(
    r".*\.(?:py[cdowxi]?|so(?:\.[\d.]+)?|dll|dylib|exe|sh|bash|zsh|bat|cmd|ps1|jar|egg|whl|pyz)",
    re.DOTALL,
)
WEIGHTS = re.compile(
    rf".*\.(?:{_KNOWN_WEIGHTS}|ggml|hdf5|keras|npy|npz|pkl|pickle|joblib"
    r"|torch|tflite|pb|mlmodel|nemo|engine|plan|dduf|distcp)"
    r"|.*\.index(?:\.[^/]*)?\.json",
    re.DOTALL,
)
CONFIGS = re.compile(
    r".*config.*\.(?:json|ya?ml)|model_index\.json|modules\.json|params\.json"
    r"|(?:.*processor|feature_extractor|tokenizer|vocab|merges|added_tokens|special_tokens|spiece"
    r"|sentencepiece|chat_template|adapter_).*\.(?:json|txt|model|ya?ml|vocab|bpe)"
    r"|.*\.(?:jinja2?|tiktoken|model|spm)|modelfile",
    re.DOTALL,
)
