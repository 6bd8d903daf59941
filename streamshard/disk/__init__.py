"""The disk: every call to the operating system, and nothing else.

May import: `errors`. Everybody above may import it, except `lora` and `internvl`, which know no files.
Begin with `system` (one method a call, which tests replace), then `files` (what is read and
written through it). A new kind of source or a faster way to read goes here.
"""
