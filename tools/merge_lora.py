"""Drop-in for InternVL's script of this name: the same arguments, streamshard's engine.

python tools/merge_lora.py INPUT_PATH OUTPUT_PATH
"""

from streamshard.cli import run_upstream_merge

if __name__ == "__main__":
    run_upstream_merge(__doc__)
