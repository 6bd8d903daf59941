"""Drop-in for InternVL's script of this name: the same options and facts, streamshard's engine.

python tools/internvl_custom2hf.py --custom_path C --hf_path H --save_path S
"""

try:
    from streamshard.cli import run_upstream
except ModuleNotFoundError as error:
    if error.name != "streamshard":
        raise
    raise SystemExit(
        "error: streamshard is not installed: pip install PATH_TO_ITS_REPOSITORY"
    ) from None


def main() -> None:
    """Run it, and exit with the code of what happened."""
    run_upstream("custom_to_hf", __doc__)


if __name__ == "__main__":
    main()
