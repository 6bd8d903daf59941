"""PEFT's LoRA: what an adapter means for the weights of a base. No files, no InternVL.

May import: `tensors`, `errors`, `tensor_names`.
Begin with `merge` ((mapping, adapters) to what changes, and to the new mapping); `settings` reads
adapter_config.json, `keys` sorts names, `adapter_plan` makes them fit or refuses, `updates` and
`replacements` say what changes. A new kind of adapter begins in `settings` and `keys`.
"""
