"""A base and an adapter that fits it."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path


def heed_interrupts() -> None:
    """In a new process: SIGINT counts, also if these tests run in the background of a shell."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass(frozen=True)
class Outcome:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Pair:
    """A base and an adapter that fits it, in a folder of their own."""

    root: Path
    base: Path
    adapter: Path

    @property
    def output(self) -> Path:
        """Where a merge of the two shall go; nothing is there yet, but the folder around it is."""
        return self.root / "out" / "merged"

    @property
    def command(self) -> list[str]:
        """The arguments that merge the two."""
        paths = {"--base": self.base, "--adapter": self.adapter, "--output": self.output}
        return ["merge-lora", *(str(part) for item in paths.items() for part in item)]


def record_of(*names: str) -> bytes:
    """The record of an output that has these files."""
    from streamshard.checkpoint.json_files import json_pieces
    from streamshard.checkpoint.record import sealed

    return b"".join(sealed(json_pieces({"digests": {"files": {name: {} for name in names}}})))


LAYER = "language_model.model.layers.0.self_attn"


def new_pair(root: Path) -> Pair:
    """The like in any folder."""
    import reference

    (root / "out").mkdir()
    base = reference.save_checkpoint(
        root / "base",
        {
            f"{LAYER}.q_proj.weight": reference.normal((96, 40), 0.02, seed=1, dtype="BF16"),
            "vision_model.embeddings.class_embedding": reference.normal((1, 1, 8), 1, seed=2),
        },
        {
            f"{LAYER}.k_proj.weight": reference.normal((130, 40), 0.02, seed=3, dtype="BF16"),
            "language_model.model.norm.weight": reference.normal((40,), 1, seed=4, dtype="BF16"),
        },
    )
    (base / "tokenizer_config.json").write_text('{"model_max_length": 8}')
    adapter = reference.save_adapter(
        root / "adapter",
        {
            f"base_model.model.{LAYER}.q_proj.lora_A.weight": reference.normal((4, 40), 1, seed=5),
            f"base_model.model.{LAYER}.q_proj.lora_B.weight": reference.normal(
                (96, 4), 0.02, seed=6
            ),
            f"base_model.model.{LAYER}.k_proj.lora_A.weight": reference.normal((4, 40), 1, seed=7),
            f"base_model.model.{LAYER}.k_proj.lora_B.weight": reference.normal(
                (130, 4), 0.02, seed=8
            ),
        },
        r=4,
        lora_alpha=8,
    )
    return Pair(root, base, adapter)


def wrap_as_the_trainer(folder: Path) -> None:
    """Make a checkpoint one whose language model InternVL's trainer had wrapped by LoRA."""
    import json

    import reference
    from safetensors.torch import save_file

    prefix = "language_model.base_model.model."
    tensors = {}
    for name, tensor in reference.read(folder).items():
        inner = name.replace("language_model.", prefix, 1)
        if name.endswith("q_proj.weight"):
            stem = inner.removesuffix(".weight")
            inner = f"{stem}.base_layer.weight"
            A, B = (2, tensor.shape[1]), (tensor.shape[0], 2)
            tensors[f"{stem}.lora_A.default.weight"] = reference.normal(A, 1, seed=1)
            tensors[f"{stem}.lora_B.default.weight"] = reference.normal(B, 1, seed=2)
        elif name.endswith("q_proj.bias"):
            inner = inner.replace(".bias", ".base_layer.bias")
        tensors[inner] = tensor
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        file.unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"use_llm_lora": 2}
    (folder / "config.json").write_text(json.dumps(config))
