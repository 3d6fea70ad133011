"""The house: what stands at the top level, and that imports run one way."""
import ast
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = {"preprocess", "train", "test", "model", "dataloader", "utils"}
# Who stands above whom: a module imports only from a lower rank, or from its own folder.
RANKS = {"utils": 0, "model": 1, "ecg": 1, "dataloader": 2, "scoring": 3, "evaluation": 4, "train": 5, "test": 5,
         "preprocess": 5, "diagnosis": 6, "tools": 6}
FILES = [path for path in sorted(ROOT.glob("*.py")) + sorted(ROOT.glob("*/*.py")) if path.parent.name != "tests"]


def module_of(path):
    return path.stem if path.parent == ROOT else path.parent.name


def imports_of(path):
    """The modules and folders of this repository that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = ([alias.name for alias in node.names] if isinstance(node, ast.Import) else
                 [node.module or ""] if isinstance(node, ast.ImportFrom) else [])
        yield from (name.split(".")[0] for name in names if name.split(".")[0] in RANKS)


def test_the_top_level_holds_the_six_scripts_alone():
    assert {path.stem for path in ROOT.glob("*.py")} == SCRIPTS


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    own = module_of(path)
    upward = {name for name in imports_of(path) if name != own and RANKS[name] >= RANKS[own]}
    assert not upward, f"{path.name} imports {', '.join(upward)}"
    if own == "preprocess":
        assert set(imports_of(path)) <= {"ecg", "utils"}


def test_a_file_is_read_at_one_sitting():
    """At most 350 lines a file, 60 a function and 120 characters a line; the tests too."""
    for path in (*FILES, *ROOT.glob("tests/*.py")):
        text = path.read_text()
        functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
        assert len(text.splitlines()) <= 350 and max(map(len, text.splitlines()), default=0) <= 120, path.name
        assert all(node.end_lineno - node.lineno < 60 for node in functions), path.name


def test_machines_with_torch_alone():
    """On prepared arrays both scripts run without pandas, wfdb, heartpy and a window system: none is imported."""
    code = ("import sys\nsys.modules |= dict.fromkeys(('pandas', 'wfdb', 'heartpy'))\nimport test, train, ecg.ludb\n"
            "print('matplotlib.pyplot' in sys.modules)")
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert finished.stdout.strip() == "False", finished.stderr
