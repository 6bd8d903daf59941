"""Checkpoints and adapters as folders and files: headers, JSON, shards, digests.

May import: `tensors`, `disk`, `errors`, `tensor_names`. Knows neither LoRA nor InternVL.
Begin with `folder` (a folder becomes names and lazy tensors) and `header` (safetensors); `shards`
says which tensor goes into which file of an output. A new format of files goes here.
"""
