"""The dimensions of a model: counts, sizes and switches, from its config or from its names."""

from __future__ import annotations

from streamshard.values import frozen

__all__ = ["Dims"]


@frozen
class Dims:
    """What the tables need to know of a model; None where nothing says it.

    Counts that are None are taken from the tensors' names, and so are switches: the tensors of
    one switch are in all layers or in none. `tied` says whether a checkpoint without a head means
    the embedding.
    """

    family: str
    blocks: int | None = None
    """Layers of the vision encoder."""
    layers: int | None = None
    """Layers of the language model."""
    experts: int | None = None
    vision_hidden: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    qkv_bias: bool | None = None
    """Biases of the vision encoder's q, k and v."""
    qk_norm: bool | None = None
    norm_bias: bool | None = None
    attention_bias: bool | None = None
    """Biases of the language model's attention, for families that may have them."""
    mlp_bias: bool | None = None
    position_table: bool = True
    """Whether the vision encoder adds trained positions: all do, unless an HF config denies it."""
    dense_layers: frozenset[int] | None = None
    """Layers of a mixture of experts that have none."""
    tied: bool | None = None
    vision_inner: int | None = None
    """Rows of the vision encoder's `fc1`."""
    positions: int | None = None
    channels: int | None = None
    patch_height: int | None = None
    patch_width: int | None = None
    shuffled: int | None = None
    """Columns that the projector takes: those of several pixels beside each other."""
    hidden: int | None = None
    inner: int | None = None
    """Rows of the language model's `up_proj`."""
    expert_inner: int | None = None

    def size(self, word: str) -> int | None:
        """What a word of the tables' shapes stands for; None where nothing says it.

        >>> Dims("qwen2", heads=4, head_dim=16, inner=96).size("q")
        64
        """
        if word.isdecimal():
            return int(word)
        if word in ("q", "kv"):
            heads = self.heads if word == "q" else self.kv_heads
            return None if heads is None or self.head_dim is None else heads * self.head_dim
        found: int | None = getattr(self, {"vision": "vision_hidden"}.get(word, word), None)
        return found
