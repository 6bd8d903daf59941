"""The commands of the Python API, one public function a file; here LoRA, InternVL and files meet.

May import: every room but `cli`.
Begin with `merge_lora`, or with the file that has the command's name. A new command is a new file
here, a name in the package's `__init__`, and a few lines in `cli`.
"""
