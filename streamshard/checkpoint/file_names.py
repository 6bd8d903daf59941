"""Names of files in checkpoints, adapters and outputs; which are a tokenizer's, which are not carried."""

from __future__ import annotations

import re

__all__ = [
    "CONFIG_NAME",
    "INDEX_NAME",
    "NOT_CARRIED",
    "NOT_ENTERED",
    "REPORT_NAME",
    "SINGLE_NAME",
    "TOKENIZER",
    "WEIGHTS_NAME",
]


INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

# What a training run or another tool leaves beside the weights and a loadable folder must not have.
NOT_CARRIED = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|gguf|msgpack|h5|onnx)|.*\.index\.json|adapter_config\.json"
    r"|trainer_state\.json|zero_to_fp32\.py|latest|streamshard\.(json|journal)",
    re.IGNORECASE | re.DOTALL,
)
TOKENIZER = re.compile(
    r"tokenizer.*|vocab\.(?:json|txt)|merges\.txt|added_tokens\.json|special_tokens_map\.json"
    r"|tokenization_.*\.py|spiece\.model|sentencepiece.*",
    re.DOTALL,
)
NOT_ENTERED = re.compile(r"\..*|__pycache__|global_step\d+|checkpoint-\d+|runs|wandb", re.DOTALL)

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

REPORT_NAME = "streamshard.json"
