"""Drop-in for InternVL's script of this name: the same arguments, streamshard's engine.

python tools/merge_lora.py INPUT_PATH OUTPUT_PATH
"""

try:
    from streamshard.cli import run_upstream_merge
except ModuleNotFoundError as error:
    if error.name != "streamshard":
        raise
    raise SystemExit(
        "error: streamshard is not installed: pip install PATH_TO_ITS_REPOSITORY"
    ) from None


def main() -> None:
    """Run it, and exit with the code of what happened."""
    run_upstream_merge(__doc__)


if __name__ == "__main__":
    main()
