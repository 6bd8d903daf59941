"""All measurements of reliability in turn, as the README has them.

    python bench/reliability.py

Takes about three quarters of an hour; ends with the first that finds something wrong.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

COMMANDS = (
    ("crash.py", "--points", "200"),
    ("faults.py",),
    ("powerloss.py",),
    ("fuzz.py", "--count", "100000"),
    ("flips.py", "--count", "2000"),
    ("limits.py",),
    ("mutants.py",),
)


def main() -> None:
    """Run every script beside this one."""
    for name, *options in COMMANDS:
        print(f"\n{name} {' '.join(options)}", flush=True)
        script = Path(__file__).with_name(name)
        if subprocess.run([sys.executable, str(script), *options], check=False).returncode:
            sys.exit(f"{name} found something wrong")


if __name__ == "__main__":
    main()
