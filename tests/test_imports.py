"""The architecture as import statements say it, and what a run imports in the end."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import streamshard

PACKAGE = Path(streamshard.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))

# Who imports whom from the package, at the top or within a function; what only type checkers see
# does not count.
ALLOWED = {
    "__init__": {"limits"},
    "__main__": {"cli"},
    "adapter_checks": {
        "adapter_keys",
        "adapter_plan",
        "arithmetic",
        "errors",
        "experts",
        "matching",
        "tensors",
    },
    "adapter_keys": {"errors"},
    "adapter_plan": {
        "adapter_keys",
        "arithmetic",
        "errors",
        "matching",
        "peft_config",
        "tensors",
    },
    "adding": {
        "adapter_keys",
        "adapter_plan",
        "errors",
        "experts",
        "products",
        "replacing",
        "tensors",
        "updates",
    },
    "arithmetic": set(),
    "carrying": {
        "checkpoint",
        "errors",
        "families",
        "layouts",
        "matching",
        "spelling",
    },
    "checkpoint": {
        "errors",
        "files",
        "format",
        "paths",
        "pickled",
        "strict_json",
        "tensors",
    },
    "claims": {
        "errors",
        "files",
        "ours",
        "record",
        "report",
    },
    "cli": {"console", "errors", "limits", "texts"},
    "commands": {
        "checkpoint",
        "conversion",
        "inputs",
        "limits",
        "lora",
        "paths",
        "report",
        "run",
    },
    "comparison": {
        "arithmetic",
        "digests",
        "errors",
        "files",
        "format",
        "listing",
        "opened",
        "report",
        "tensors",
        "threads",
    },
    "console": {"errors"},
    "conversion": {
        "checkpoint",
        "errors",
        "families",
        "layouts",
        "tables",
        "tensors",
    },
    "detection": {"errors", "families", "spelling", "tables"},
    "digests": {"files", "tensors"},
    "distance": {"arithmetic", "tensors"},
    "drawn": {"arithmetic", "tensors"},
    "errors": set(),
    "experts": {"adapter_keys", "errors", "products", "tensors"},
    "extraction": {
        "arithmetic",
        "checkpoint",
        "detection",
        "errors",
        "files",
        "inputs",
        "limits",
        "paths",
        "peft_adapter",
        "report",
        "resources",
        "run",
        "spelling",
        "tensors",
        "unwrapping",
        "wrapped",
    },
    "extras": set(),
    "families": {"errors"},
    "files": {"errors", "held", "inputs"},
    "format": {"errors", "files", "strict_json", "tensors"},
    "hazards": {
        "adapter_plan",
        "errors",
        "products",
        "tensors",
        "updates",
    },
    "held": set(),
    "identity": {
        "digests",
        "errors",
        "files",
        "products",
        "tensors",
        "updates",
    },
    "injection": {
        "arithmetic",
        "drawn",
        "errors",
        "families",
        "inventory",
        "tables",
        "tensors",
        "wrapped",
    },
    "inputs": {"errors"},
    "inspection": {
        "checkpoint",
        "conversion",
        "detection",
        "distance",
        "errors",
        "families",
        "files",
        "format",
        "inputs",
        "layouts",
        "limits",
        "paths",
        "report",
        "resources",
        "spelling",
        "tensors",
    },
    "inventory": {"families", "tables"},
    "journal": {"arithmetic", "digests", "files", "ours"},
    "layouts": {
        "detection",
        "errors",
        "families",
        "inventory",
        "rows",
        "spelling",
        "tables",
        "tensors",
    },
    "leftovers": {
        "claims",
        "errors",
        "held",
        "journal",
        "locks",
        "ours",
        "report",
    },
    "limits": {"errors"},
    "listing": {
        "checkpoint",
        "digests",
        "errors",
        "record",
        "report",
    },
    "live": {"errors", "families", "injection"},
    "locks": {"errors", "files", "held", "ours"},
    "lora": {
        "adapter_checks",
        "adapter_keys",
        "adapter_plan",
        "adding",
        "errors",
        "matching",
        "replacing",
        "tensors",
    },
    "matching": {"errors", "spelling", "tensors"},
    "merging": {
        "adapter_plan",
        "carrying",
        "checkpoint",
        "commands",
        "conversion",
        "detection",
        "digests",
        "errors",
        "experts",
        "families",
        "files",
        "hazards",
        "inputs",
        "layouts",
        "limits",
        "lora",
        "paths",
        "peft_config",
        "provenance",
        "report",
        "run",
        "tensors",
        "ties",
        "unwrapping",
    },
    "names": {"digests"},
    "opened": {
        "checkpoint",
        "errors",
        "files",
        "format",
        "listing",
        "tensors",
    },
    "ours": {"errors", "files"},
    "paths": {"errors"},
    "patterns": set(),
    "peft_adapter": {"spelling", "wrapped"},
    "peft_config": {"errors", "patterns"},
    "pickled": {"errors", "files", "limits", "tensors"},
    "places": {
        "claims",
        "errors",
        "files",
        "paths",
        "staging",
    },
    "products": {"arithmetic", "tensors"},
    "provenance": {"checkpoint", "errors", "files", "report"},
    "record": {"digests", "errors", "files", "strict_json"},
    "replacing": {
        "adapter_plan",
        "arithmetic",
        "errors",
        "matching",
        "tensors",
        "updates",
    },
    "report": {"detection", "format", "resources", "tensors"},
    "resources": {"errors", "limits", "workspace"},
    "resuming": {
        "digests",
        "errors",
        "files",
        "journal",
        "staging",
        "tensors",
        "threads",
        "writer",
    },
    "rows": {"errors", "families", "tensors"},
    "run": {
        "arithmetic",
        "checkpoint",
        "digests",
        "distance",
        "errors",
        "families",
        "files",
        "format",
        "identity",
        "inputs",
        "journal",
        "listing",
        "names",
        "places",
        "record",
        "report",
        "resources",
        "resuming",
        "staging",
        "tensors",
        "updates",
        "writer",
    },
    "spelling": {"errors"},
    "staging": {
        "claims",
        "errors",
        "files",
        "held",
        "identity",
        "journal",
        "leftovers",
        "locks",
        "names",
        "ours",
        "swapping",
    },
    "state_dicts": {
        "detection",
        "errors",
        "families",
        "layouts",
        "rows",
    },
    "strict_json": {"errors"},
    "swapping": {
        "claims",
        "errors",
        "files",
        "held",
        "locks",
        "report",
    },
    "tables": {"errors", "families", "spelling"},
    "tensors": {"arithmetic", "files", "workspace"},
    "texts": {"errors"},
    "threads": {"files", "limits", "tensors"},
    "ties": {
        "adapter_plan",
        "detection",
        "errors",
        "families",
        "spelling",
        "tensors",
    },
    "unwrapping": {
        "adapter_plan",
        "checkpoint",
        "errors",
        "paths",
        "peft_config",
        "wrapped",
    },
    "updates": {"arithmetic", "errors", "products", "tensors"},
    "verification": {
        "comparison",
        "errors",
        "extras",
        "files",
        "inputs",
        "limits",
        "opened",
        "paths",
        "report",
        "resources",
        "threads",
    },
    "workspace": {"arithmetic", "files"},
    "wrapped": {"errors", "spelling"},
    "wrapping": {
        "checkpoint",
        "detection",
        "drawn",
        "errors",
        "families",
        "injection",
        "inputs",
        "limits",
        "lora",
        "paths",
        "peft_adapter",
        "report",
        "run",
        "spelling",
        "tensors",
    },
    "writer": {
        "arithmetic",
        "digests",
        "distance",
        "errors",
        "files",
        "format",
        "inputs",
        "journal",
        "names",
        "products",
        "staging",
        "tensors",
        "threads",
    },
}
# The mathematics and the names know nothing of files and commands.
NAMES = {
    "families",
    "spelling",
    "tables",
    "detection",
    "rows",
    "inventory",
    "layouts",
    "wrapped",
}
ADAPTERS = {"adapter_checks", "adapter_keys", "adapter_plan", "adding", "experts", "hazards", "lora",
            "matching", "peft_config", "replacing", "ties"}  # fmt: skip
PURE = {
    *ADAPTERS,
    "drawn",
    "injection",
    "peft_adapter",
    "distance",
    "arithmetic",
    "tensors",
    "updates",
    *NAMES,
}
NOT_IN_PURE = {"os", "pathlib", "shutil", "io", "format", "checkpoint", "writer", "commands", "cli"}
HEAVY = {"torch", "transformers", "peft", "huggingface_hub", "safetensors"}
LOW = {
    "errors",
    "inputs",
    "files",
    "arithmetic",
    "tensors",
    "updates",
    "format",
    "lora",
    "patterns",
    "peft_config",
    "strict_json",
    *NAMES,
}


def imports(module: str, *, top: bool = False) -> set[str]:
    """First segments of all modules that a module imports; those of the package by their own name.

    `top` leaves out what functions import when they are called, and what only type checkers see.
    """
    found: set[str] = set()

    def walk(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if top and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                if not top:
                    for statement in child.orelse:
                        walk(statement)
                continue
            if isinstance(child, ast.Import):
                found.update(own(alias.name) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{module} has a relative import"
                if child.module == "streamshard":
                    found.update(alias.name for alias in child.names)
                else:
                    found.add(own(child.module or ""))
            walk(child)

    walk(ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8")))
    return found


def own(name: str) -> str:
    first, _, rest = name.partition(".")
    return rest.partition(".")[0] if first == "streamshard" and rest else first


def test_every_module_has_its_arrows():
    assert ALLOWED.keys() == {*MODULES}


@pytest.mark.parametrize("module", ALLOWED)
def test_arrows(module):
    of_package = imports(module) & {*MODULES, "_kernels"}
    assert of_package - {"_kernels"} == ALLOWED[module]
    assert "_kernels" not in of_package or module == "arithmetic"


def test_the_reader_of_imports_sees_them():
    assert {"lora", "checkpoint", "pathlib"} <= imports("merging")
    assert "pickled" in imports("checkpoint")
    assert "pickled" not in imports("checkpoint", top=True)
    assert "torch" in imports("pickled")
    assert "limits" in imports("__init__")  # within a function


@pytest.mark.parametrize("module", sorted(PURE & {*MODULES}))
def test_the_mathematics_knows_no_files_and_no_commands(module):
    assert not imports(module) & NOT_IN_PURE
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert not {"open", "print"} & set(calls)


@pytest.mark.parametrize("module", MODULES)
def test_nothing_heavy_at_the_top(module):
    assert not imports(module, top=True) & (HEAVY - {"safetensors"})
    if module in {"__init__", "__main__", "cli", "errors"}:
        assert "numpy" not in imports(module, top=True)


@pytest.mark.parametrize("module", sorted(LOW))
def test_nothing_below_imports_what_is_above(module):
    assert not imports(module) & {"commands", "cli", "writer", "checkpoint"}


@pytest.mark.parametrize("module", [m for m in MODULES if m not in {"cli", "__main__", "console"}])
def test_only_the_command_line_prints(module):
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not {call for call in calls if call in {"print", "click.echo"} or "stdout" in call}
    assert "click" not in imports(module)


def test_no_cycles():
    arrows = {m: imports(m, top=True) & {*MODULES} for m in MODULES if m != "__init__"}
    while arrows:
        leaves = {m for m, targets in arrows.items() if not targets & set(arrows)}
        assert leaves, f"imports in a circle: {sorted(arrows)}"
        arrows = {m: targets for m, targets in arrows.items() if m not in leaves}


# --- what is loaded in the end --------------------------------------------------------------------

LOADED = "import json, sys; print(json.dumps(sorted({n.partition('.')[0] for n in sys.modules})))"


def loaded_after(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"{code}\n{LOADED}"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_package_alone_is_light():
    loaded = loaded_after("import streamshard; streamshard.__version__; dir(streamshard)")
    assert not loaded & {*HEAVY, "numpy", "click", "tqdm", "psutil"}


def test_the_public_names_are_there():
    loaded = loaded_after(
        "from streamshard import *; import streamshard as s; [getattr(s, n) for n in s.__all__]"
    )
    assert not loaded & {"torch", "transformers", "peft"}


@pytest.mark.parametrize("arguments", [["--help"], ["merge-lora", "--help"], ["diff", "--help"]])
def test_help_imports_nothing_heavy(arguments):
    code = f"""
import sys
sys.argv = ["streamshard", *{arguments}]
from streamshard.cli import main
try:
    main()
except SystemExit as error:
    assert not error.code
"""
    loaded = loaded_after(code)
    assert not loaded & {*HEAVY, "numpy", "tqdm", "psutil", "threadpoolctl"}


def test_a_run_without_a_terminal_imports_no_progress_bar_and_no_hashlib(pair):
    """Both cost megabytes."""
    code = f"""
import sys
sys.argv = ["streamshard", "merge-lora", "--adapter", {str(pair.adapter)!r}, "--base",
            {str(pair.base)!r}, "--output", {str(pair.output)!r}]
from streamshard.cli import main
try:
    main()
except SystemExit as error:
    assert not error.code
"""
    loaded = loaded_after(code)
    assert (pair.output / "streamshard.json").exists()
    assert not loaded & {"tqdm", "hashlib"}


@pytest.mark.parametrize("more", [{}, {"max_shard_size": "5KB"}, {"dtype": "fp32"}], ids=str)
def test_a_merge_of_safetensors_imports_no_torch(more, pair):
    code = f"""
import streamshard
report = streamshard.merge_lora(
    base={str(pair.base)!r}, adapter={str(pair.adapter)!r}, output={str(pair.output)!r}, **{more}
)
assert report["merged"] == 2
"""
    loaded = loaded_after(code)
    assert not loaded & {"torch", "transformers", "peft"}
    assert {"numpy", "safetensors"} <= loaded
    assert (pair.output / "streamshard.json").exists()


def test_a_pickled_adapter_does_import_torch(pair):
    """So that the test above can fail."""
    import reference

    content = reference.load_file(pair.adapter / "adapter_model.safetensors")
    reference.torch.save(content, pair.adapter / "adapter_model.bin")
    (pair.adapter / "adapter_model.safetensors").unlink()
    code = f"""
import streamshard
streamshard.merge_lora(
    base={str(pair.base)!r}, adapter={str(pair.adapter)!r}, output={str(pair.output)!r}
)
"""
    assert "torch" in loaded_after(code)
