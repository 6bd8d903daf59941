"""The command line, the only room that prints.

May import: the package's public functions, `errors`, `version`.
Begin with `app` (the commands and their help), then `main` (signals and exit codes) and `endings`
(errors). `texts` turns a report into text, `progress` says how far a run is, by lines of `bar`.
"""

from streamshard.cli.main import main
from streamshard.cli.upstream import run_upstream, run_upstream_merge

__all__ = ["main", "run_upstream", "run_upstream_merge"]
