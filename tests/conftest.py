"""What several test files share: weights by the reference's rule, simulated arrays, and a way to run the scripts."""
import contextlib
import importlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))
import utils  # noqa: E402

torch.set_num_threads(1)


@dataclass
class Finished:
    """What a script left: its exit status and what it printed."""
    returncode: int
    stdout: str
    stderr: str

    @property
    def refusal(self):
        """The sentence of a script that refused: the last on stderr, with exit code 2 and without a traceback."""
        *_, sentence = self.stderr.replace("\r", "\n").strip().splitlines()
        assert self.returncode == 2 and sentence.startswith("error: ") and "Traceback" not in self.stderr, self.stderr
        return sentence


def run_script(script, *arguments, cwd=None):
    """Run a script ("train.py", "tools/synthetic.py") in this process as a user would; returns a Finished.

    A process of its own costs three CPU seconds; a test that needs one (signals, kills, torchrun) starts it itself.
    """
    name = script.removesuffix(".py").replace("/", ".")
    out, err, handler = io.StringIO(), io.StringIO(), signal.getsignal(signal.SIGTERM)
    before, threads = Path.cwd(), torch.get_num_threads()
    status = 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        try:
            if cwd:
                os.chdir(cwd)
            utils.run(importlib.import_module(name).main)
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        finally:
            os.chdir(before)
            signal.signal(signal.SIGTERM, handler)
            torch.set_num_threads(threads)
    return Finished(status, out.getvalue(), err.getvalue())


def reset_signals():
    """Before a script starts in a process of its own: undo what nohup, or a shell's background job, ignores."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def full_disk(size):
    """The system refuses to write files of more bytes, also to root, as a full disk does."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def seeded_weights(shapes):
    """Weights in the published key names from names and shapes alone, by the rule of the reference measurements."""
    state = {}
    for name in sorted(shapes):
        shape, rng = tuple(shapes[name]), np.random.RandomState(zlib.crc32(name.encode()))
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(0)
            continue
        if name.endswith("running_var"):
            value = 0.5 + rng.rand(*shape)
        elif name.endswith(("running_mean", "bias", "b_2")):
            value = 0.1 * rng.randn(*shape)
        elif len(shape) == 1:
            value = 1 + 0.1 * rng.randn(*shape)
        else:
            value = rng.randn(*shape) / np.sqrt(np.prod(shape[1:]))
        state[name] = torch.from_numpy(value.astype(np.float32))
    return state


def published_shapes():
    """Names and shapes of a published checkpoint, written out here so that the tests stand without the reference."""
    shapes = {}

    def batch_norm(prefix, width):
        shapes.update({f"{prefix}.{part}": [width] for part in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{prefix}.num_batches_tracked"] = []

    for branch in ("global", "local", "trend"):
        widths = [12, 32, 64, 128, 256, 512]
        for layer, (inputs, outputs) in enumerate(zip(widths, widths[1:])):
            shapes[f"{branch}_encoder.main.{max(0, 3 * layer - 1)}.weight"] = [outputs, inputs, 4]
            if layer:
                batch_norm(f"{branch}_encoder.main.{3 * layer}", outputs)
        shapes[f"{branch}_encoder.main.14.weight"] = [50, 512, 15]
        widths = [512, 256, 128, 64, 32, 12 if branch == "trend" else 13]
        shapes[f"{branch}_decoder.main.0.weight"] = [100 if branch == "trend" else 50, 512, 15]
        for layer, (inputs, outputs) in enumerate(zip(widths, widths[1:])):
            batch_norm(f"{branch}_decoder.main.{3 * layer + 1}", inputs)
            shapes[f"{branch}_decoder.main.{3 * layer + 3}.weight"] = [inputs, outputs, 4]
    for name, inside, outside in (("global", 548, 136), ("local", 274, 1)):
        shapes.update({f"{name}_mlp.0.weight": [inside, 137], f"{name}_mlp.0.bias": [inside],
                       f"{name}_mlp.2.weight": [outside, inside], f"{name}_mlp.2.bias": [outside]})
    for name in (*(f"attn.linear_layers.{part}" for part in range(3)), "attn.output_linear"):
        shapes.update({f"{name}.weight": [50, 50], f"{name}.bias": [50]})
    return {**shapes, "layer_norm.a_2": [50], "layer_norm.b_2": [50]}


@pytest.fixture(scope="session")
def published_state():
    """A published-format state dict."""
    return seeded_weights(published_shapes())


@pytest.fixture(scope="session")
def model(published_state):
    """The network with those weights, in eval mode."""
    from model import MCF, translate_published
    network = MCF()
    network.load_state_dict(translate_published(published_state))
    return network.eval()


@pytest.fixture(scope="session")
def simulated(tmp_path_factory):
    """A folder of arrays made from 60 simulated records by synthetic.py and preprocess.py."""
    folder = tmp_path_factory.mktemp("simulated")
    for script, arguments in (
            ("tools/synthetic.py", ("--out", folder / "ptb-xl", "--records", 60)),
            ("preprocess.py", ("--ptbxl_path", folder / "ptb-xl", "--data_path", folder / "data", "--benchmark_truth",
                               folder / "ptb-xl" / "localization_truth.npz", "--workers", 2))):
        finished = run_script(script, *arguments)
        assert finished.returncode == 0, finished.stderr
    return folder / "data"


@pytest.fixture(scope="session")
def reference():
    """The measured values of the published method and the eight records they belong to; skips where they are not."""
    if not (SHARED / "reference").is_dir():
        pytest.skip("no ../shared/reference here: the same checks run against the plain reference of these tests")
    return SHARED / "reference"


@pytest.fixture(scope="session")
def reference_records(reference, tmp_path_factory):
    """The reference's records at 500 Hz as read_record gives them: {ecg_id: (5000, 12) mV}."""
    from ecg.wfdb_files import read_record
    folder = tmp_path_factory.mktemp("recordings")
    subprocess.run([sys.executable, SHARED / "data" / "unpack.py", folder, "ptbxl500"], check=True, capture_output=True)
    ecg_ids = json.loads((reference / "r_peaks.json").read_text())
    return {int(ecg_id): read_record(folder / "ptb-xl" / "records500" / "00000" / f"{int(ecg_id):05d}_hr", 500)
            for ecg_id in ecg_ids}
