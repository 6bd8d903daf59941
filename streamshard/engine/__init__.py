"""From a job to a finished folder, or nothing. No LoRA, no InternVL.

May import: `checkpoint`, `tensors`, `disk`, `errors`, `tensor_names`, `version`.
Begin with `job` (what is to be written), `plan` and `run`. `shard_task` is the unit of work and `do_task`
does it, anywhere; `writer` gives tasks to threads, `staging` lets an output appear complete or not at
all, `journal`, `fingerprint` and `resume` continue an interrupted run.
"""
