"""Write an output in 8 parts at once, each killed at random and run again, and compare with a clean run.

python bench/parts.py --rounds 50
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from interrupted_runs import content  # type: ignore[import-not-found]  # noqa: E402
from parts_runs import all_parts_with_kills  # type: ignore[import-not-found]  # noqa: E402

PARTS = 8


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--first", type=int, default=0, help="number of the first round, its seed")
    options = parser.parse_args()
    kills = 0
    with tempfile.TemporaryDirectory(prefix="streamshard-parts-") as made:
        folder = Path(made)
        make = [sys.executable, str(ROOT / "tools" / "make_checkpoint.py"), "--preset", "tiny"]
        make += ["--layout", "custom", "--max-shard-size", "20KB"]
        make += ["--output", str(folder / "base"), "--adapter", str(folder / "adapter")]
        subprocess.run(make, check=True, capture_output=True)
        command = ["merge-lora", "--base", str(folder / "base")]
        command += ["--adapter", str(folder / "adapter"), "--output"]
        run = [sys.executable, "-m", "streamshard", *command, str(folder / "clean")]
        subprocess.run(run, check=True, capture_output=True)
        expected = content(folder / "clean")
        for number in range(options.first, options.first + options.rounds):
            output = folder / "out" / "merged"
            output.parent.mkdir()
            kills += all_parts_with_kills([*command, str(output)], PARTS, random.Random(number))
            left = [path.name for path in output.parent.iterdir()]
            if left != ["merged"] or content(output) != expected:
                sys.exit(f"round {number}: other bytes than a clean run, or {left}")
            shutil.rmtree(output.parent)
    print(
        f"{options.rounds} rounds, {kills} kills: the bytes of a clean run each time, nothing left"
    )


if __name__ == "__main__":
    main()
