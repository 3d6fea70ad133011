"""The files of a report. Nothing of the user's is removed or overwritten, and no full disk costs an earlier report.

results.json names every file of its report with the SHA-256 of its content ("files"), and those of the report that
stood there before ("earlier_files"): a run that is killed between two renames leaves a mixture, and it is still ours.
"""
import hashlib
import json
import operator
from pathlib import Path

from utils import UserError, pack_json, sha256_of, write_together

RESULTS_FILE = "results.json"
REMEDY = "choose another --output_dir, or move it away"


def read_manifest(folder: Path, results_file: str = RESULTS_FILE) -> dict:
    """{name: SHA-256s of what a report of ours wrote under it} of a folder. Raises UserError.

    A results.json that is not of a report is the user's, so nothing may be written there.
    """
    path = folder / results_file
    if not path.exists():
        return {}
    try:
        results = json.loads(path.read_text())
        listed = [results["files"], results["earlier_files"]]
        return {name: {str(files[name]) for files in listed if name in files}
                for name in {name for files in listed for name in files} if Path(name).name == name}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{path} is not a report that this test.py wrote, and is not overwritten; {REMEDY}") from error


def is_ours(path: Path, manifest: dict) -> bool:
    """Whether a file is still as a report of ours wrote it."""
    return path.name in manifest and path.is_file() and sha256_of(path) in manifest[path.name]


def require_ours(folder, names, results_file: str = RESULTS_FILE):
    """Raise UserError where one of these names in a folder is a file that no report of ours wrote, or that changed."""
    manifest = read_manifest(Path(folder), results_file)
    for name in names:
        path = Path(folder) / name
        if path.exists() and name != results_file and not is_ours(path, manifest):
            how = "was changed since a report wrote it" if name in manifest else "was not written by a report"
            raise UserError(f"{path} {how}, and is not overwritten; {REMEDY}")


def write_report(folder, contents: dict, results: dict, results_file: str = RESULTS_FILE):
    """Write the files of a report, {name: bytes}, and results_file, which names them. All are whole on the disk first.

    This removes a file of an earlier report here that this one does not write, unless it was changed. Raises UserError.
    """
    folder = Path(folder)
    require_ours(folder, contents, results_file)
    manifest = read_manifest(folder, results_file)
    earlier = {name: sha256_of(folder / name) for name in manifest if is_ours(folder / name, manifest)}
    results = pack_json({**results, "files": {name: hashlib.sha256(content).hexdigest()
                                              for name, content in contents.items()}, "earlier_files": earlier})
    write_together({folder / name: operator.methodcaller("write", content)
                    for name, content in {results_file: results, **contents}.items()})
    for name in set(earlier) - set(contents):
        (folder / name).unlink()
