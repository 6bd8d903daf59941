"""InternVL's two layouts: names, dimensions, configs. No files, no LoRA arithmetic.

May import: `tensors`, `errors`, `tensor_names`.
Begin with `families` (the tables, and nothing else): a new family is a new table there. `layouts`
carries a mapping to the other layout, `detection` tells what a checkpoint is, `model_config` and
`config_edits` read and change config.json, `shapes` says which shape each tensor must have.
"""
