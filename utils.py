"""What every script shares and no stage owns: user errors, atomic files, provenance, devices and processes."""
import contextlib
import csv
import datetime
import functools
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "pandas", "wfdb", "heartpy")
# Which process this is and of how many, as torchrun starts them, one for each GPU; without torchrun number 0 of 1.
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class UserError(Exception):
    """Something the user can mend. The message is one sentence that names the file or flag, and the remedy."""


def run(main, alone: bool = True):
    """Call a script's main(); a UserError becomes its sentence and exit code 2, Ctrl-C and SIGTERM exit code 130.

    alone: it is refused where torchrun starts several processes.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if alone and PROCESSES > 1:
            raise UserError(f"{Path(sys.argv[0]).name} runs in one process; start it without torchrun, which train.py "
                            "and test.py alone know")
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def scale_minmax(x, low, high):
    """Min-max to [-1, 1] of x between low and high, numpy or torch; 0 where both are equal, instead of 0 / 0.

    The one home of the paper's normalisation: records, beats and the trend differ in what low and high are taken over.
    """
    flat = high == low
    return (2 * (x - low) / (high - low + flat) - 1) * ~flat


def undo_minmax(x, low, high):
    """What scale_minmax made x of."""
    return (x + 1) / 2 * (high - low) + low


def unwritable(path, error: OSError) -> UserError:
    """The sentence for a file or folder that cannot be written."""
    reason = error.strerror or str(error)           # numpy raises OSError without an error number on a full disk
    return UserError(f"{path} could not be written ({reason}); free some space or choose another folder")


def require_writable(path, is_folder=True):
    """Raise UserError where files could not be written to path, a folder or one file, before hours of work.

    It need not exist yet.
    """
    folder = Path(path).resolve() if is_folder else Path(path).resolve().parent
    if not is_folder and Path(path).is_dir():
        raise UserError(f"{path} is a folder, and shall be a file; name a file in it, or choose another name")
    while not folder.exists():
        folder = folder.parent
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise unwritable(path, error) from error


def write_atomically(path, write):
    """Let write(binary file) fill a temporary file beside path, flush it to disk, and rename it to path.

    Whatever goes wrong, also a power cut, path holds either what it held before or the whole new content.
    Raises UserError where the folder cannot be written or the disk is full.
    """
    write_together({path: write})


def write_together(files: dict):
    """Write several files as write_atomically does one. files: {path: write}; they are renamed in this order.

    No path changes before all files are whole on the disk, so a full one leaves all that was there. Raises UserError.
    """
    temporary = {Path(path): Path(path).with_name(f"{Path(path).name}.{os.getpid()}.tmp") for path in files}
    path = None
    try:
        for path, write in zip(temporary, files.values()):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary[path], "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
        for path in temporary:
            os.replace(temporary[path], path)
        for folder in {path.parent for path in temporary}:
            sync_folder(folder)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        for unfinished in temporary.values():
            with contextlib.suppress(OSError):
                unfinished.unlink()


def sync_folder(folder):
    """Put the names of a folder's files on the disk, where the system can: a rename is else lost in a power cut."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def pack_json(content: dict) -> bytes:
    """A dict as readable JSON. NaN is refused: no reader of JSON has to expect it."""
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def pack_csv(header, rows) -> bytes:
    """A CSV file; numbers in full precision."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue().encode()


def save_json(path, content: dict):
    """Write a dict as readable JSON, atomically."""
    text = pack_json(content)
    write_atomically(path, lambda file: file.write(text))


def sha256_of(path) -> str:
    """The SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def git_commit() -> str:
    """The commit this code is at, with "-dirty" where tracked files differ from it; "unknown" outside a checkout.

    Scripts call it first when they start: a commit during a long run is not the code that runs.
    """
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"],
                                 capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("-dirty" if changed else "")


def versions() -> dict:
    """Python's and the packages' versions, None for a package that is not installed."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            installed[package] = None
    return installed


def usable_cores() -> int:
    """The CPU cores that this process may use: by its affinity, and by its container's quota (cgroup v2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):                           # no such file, or no quota ("max")
        return cores


def cpu_computes_bfloat16() -> bool:
    """Whether the processor has instructions for bfloat16 (x86 and ARM under Linux; assumed elsewhere)."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return True
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))


def choose_device(name: str, amp: str = "off"):
    """The torch.device for --device auto, cpu, cuda or mps, made ready for --amp off or bf16.

    Of several processes (torchrun) each gets its own GPU, or its share of the cores. Raises UserError where the device
    is not there, or where bfloat16 would be many times slower than float32.
    """
    import torch
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available[name]:
        raise UserError(f"--device {name} is not available on this machine; use --device auto")
    if name == "cpu" and amp == "bf16" and not cpu_computes_bfloat16():
        raise UserError("--amp bf16 is many times slower than float32 on this processor, which has no instructions for "
                        "bfloat16; use --amp off")
    torch.backends.cudnn.allow_tf32 = False         # float32 means float32; convolutions would use TF32 by default
    local_rank, local_processes = (int(os.environ.get(key, least)) for key, least in
                                   (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    if name == "mps" and local_processes > 1:
        raise UserError("--device mps is one device, which several processes cannot share; run without torchrun")
    if name == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"torchrun asks for {local_rank + 1} GPUs or more, but there are "
                            f"{torch.cuda.device_count()}; lower --nproc_per_node")
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    # More threads than cores wait for each other all the time. torchrun sets OMP_NUM_THREADS to 1 where it is not set.
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads is None or (threads == "1" and local_processes > 1):
        torch.set_num_threads(max(1, usable_cores() // local_processes))
    return torch.device(name)


def start_processes(device):
    """Join the other processes, if there are any. Only process 0 goes on printing its progress; errors all print."""
    import torch.distributed as dist
    if PROCESSES > 1 and not dist.is_initialized():
        # the others wait for hours where process 0 has to find R peaks first; torchrun notices if it dies
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=12))
        if RANK:
            sys.stdout = open(os.devnull, "w")
            signal.signal(signal.SIGTERM, signal.SIG_DFL)           # they have nothing to save


def stop_processes():
    """Leave the other processes."""
    import torch.distributed as dist
    if dist.is_initialized():
        dist.destroy_process_group()


def add_up(values):
    """The sum of a tensor over all processes, in each of them. What each leaves 0 for the others is so put together."""
    if PROCESSES > 1:
        import torch.distributed as dist
        dist.all_reduce(values)
    return values


def wait_for_all():
    """Go on when every process has come here."""
    if PROCESSES > 1:
        import torch.distributed as dist
        dist.barrier()


@contextlib.contextmanager
def one_after_the_first():
    """Let process 0 do what stands inside before the others do, who then find its files."""
    if RANK:
        wait_for_all()
    yield
    if not RANK:
        wait_for_all()


def add_published_flags(parser, *chosen: str):
    """Add the flags that the published train.py and test.py share, or the chosen ones of them; returns their group."""
    group = parser.add_argument_group("published flags")
    for name, kind, default, what in (
            ("data_path", str, "./data/", "folder of the arrays"), ("dims", int, 12, "leads"),
            ("hidden", int, 50, "channels of a token, even"), ("mask_ratio", int, 30, "percent masked; 0: nothing"),
            ("seed", int, 0, "of all that is random"), ("epochs", int, 50, "of training"),
            ("batch_size", int, 32, "records a training step"), ("lr", float, 1e-4, "initial learning rate")):
        if not chosen or name in chosen:
            group.add_argument(f"--{name}", type=kind, default=default, help=f"{what} (default %(default)s)")
    return group


def check_published_flags(arguments):
    """Raise UserError for a value that no run can use, of the flags that there are."""
    for name, least, most in (("dims", 1, 1000), ("hidden", 2, 10_000), ("mask_ratio", 0, 100), ("seed", 0, 2**31),
                              ("epochs", 1, 10**6), ("batch_size", 1, 10**6), ("lr", 1e-12, 1e6)):
        value = getattr(arguments, name, least)
        if not least <= value <= most:                      # false for NaN too
            raise UserError(f"--{name} {value} is out of range; choose {least} to {most}")
    if getattr(arguments, "hidden", 2) % 2:
        raise UserError(f"--hidden {arguments.hidden} is odd, but two attention heads share it; choose an even number")
