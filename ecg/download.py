"""PTB-XL and LUDB from PhysioNet or a mirror: the files that preprocess.py reads, each checked by its SHA-256.

A file stands under its own name only when it is what SHA256SUMS.txt says; until then it is NAME.part, which a later
run completes. That list is the one file that nothing checks, so every run fetches it anew.
"""
import os
import random
import re
import threading
import time
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool     # its threads are daemons: none keeps an interrupted process alive
from pathlib import Path
from urllib.parse import quote

import requests
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3.exceptions import HTTPError
from urllib3.util import Retry

from ecg.arrays import SIMULATED_MARKER
from utils import UserError, sha256_of, unwritable

CHECKSUMS = "SHA256SUMS.txt"
LICENCE = "LICENSE.txt"
TIMEOUT = (10, 30)              # s without a connection, s without a byte
PASSING = (408, 429, *range(500, 600))      # answers after which the same request may well succeed
RETRIES = 6                     # of a request, and of a broken transfer without any progress; a minute in all
LONGEST_WAIT = 60               # s between two of them
LONGEST_RETRY_AFTER = 300       # s; a server that asks for more is asked again after these
TRIES = 3                       # of a file whose checksum is wrong
MOST_FAULTS = 20                # missing or wrong files after which the rest is not worth asking for
CHUNK = 1 << 16                 # bytes


@dataclass(frozen=True)
class DataSet:
    """Where a data set is, and which of its files preprocess.py reads."""
    name: str
    place: str                  # below --base_url
    path_flag: str              # the flag that names its folder
    files: tuple
    recordings: str             # start of the recordings' names


DATA_SETS = {"download": DataSet("PTB-XL 1.0.3", "ptb-xl/1.0.3/", "ptbxl_path",
                                 ("ptbxl_database.csv", "scp_statements.csv"), "records{rate}/"),
             "download_ludb": DataSet("LUDB 1.0.1", "ludb/1.0.1/", "ludb_path", ("RECORDS", "ludb.csv"), "data/")}


def add_flags(parser):
    """Add the flags of downloading to preprocess.py's."""
    group = parser.add_argument_group("download, before anything else; what is whole is not fetched again")
    group.add_argument("--download", metavar="DIR", help="fetch PTB-XL 1.0.3, the files of --sampling_rate, to DIR "
                       "(0.5 GB at 100 Hz, 2.6 GB at 500), all of them whatever --limit says, and go on with DIR as "
                       "--ptbxl_path, where that flag is absent")
    group.add_argument("--download_ludb", metavar="DIR", help="fetch LUDB 1.0.1 to DIR, and go on with DIR as "
                       "--ludb_path, where that flag is absent")
    group.add_argument("--connections", type=int, default=8, help="files fetched at a time (default %(default)s)")
    group.add_argument("--base_url", default="https://physionet.org/files/",
                       help="a mirror of PhysioNet, with ptb-xl/1.0.3/ and ludb/1.0.1/ below it (default %(default)s)")


def name_paths(arguments):
    """Let a data set that is downloaded be read from its folder, unless a flag says otherwise; returns arguments."""
    for flag, data_set in DATA_SETS.items():
        if getattr(arguments, flag) and not getattr(arguments, data_set.path_flag):
            setattr(arguments, data_set.path_flag, getattr(arguments, flag))
    return arguments


def fetch(arguments):
    """Complete the folders of --download and --download_ludb; nothing where neither is given.

    Raises UserError: no network or server, a file that is missing there or wrong again and again, a full disk.
    """
    for flag, data_set in DATA_SETS.items():
        if not getattr(arguments, flag):
            continue
        if not arguments.base_url.startswith(("https://", "http://")):
            raise UserError(f"--base_url {arguments.base_url} is no web address; start it with https:// or http://")
        folder, url = Path(getattr(arguments, flag)), f"{arguments.base_url.rstrip('/')}/{data_set.place}"
        if (folder / SIMULATED_MARKER).exists():
            raise UserError(f"{folder} given as --{flag} holds simulated ECGs; name another folder")
        try:
            complete(data_set, folder, url, arguments.sampling_rate, arguments.connections)
        except OSError as error:
            raise unwritable(f"{folder} given as --{flag}", error) from error


def complete(data_set: DataSet, folder: Path, url: str, rate: int, connections: int):
    """Fetch what folder lacks of a data set. Raises UserError, or OSError where folder cannot be written."""
    print(f"{data_set.name} from {url} to {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    wanted = choose(fetch_checksums(url, folder), data_set, rate, url + CHECKSUMS)
    lacking = find_lacking(folder, wanted, connections)
    print(f"{len(wanted) - len(lacking)} of {len(wanted)} files are there already, their checksums are right")
    for parent in {(folder / name).parent for name in lacking}:
        parent.mkdir(parents=True, exist_ok=True)
    faults = fetch_files(lacking, folder, url, connections)
    if faults:
        first = ", ".join(f"{name}: {fault}" for name, fault in list(faults.items())[:3])
        raise UserError(f"{len(faults)} of the files below {url} cannot be had ({first}); try again later or name "
                        f"another --base_url, or go on without them by --{data_set.path_flag} {folder} --allow_missing")


def fetch_checksums(url: str, folder: Path) -> dict:
    """Fetch the list of checksums below url into folder: SHA-256 in hex by file name. Raises UserError."""
    path = folder / CHECKSUMS
    part = part_of(path)
    part.unlink(missing_ok=True)            # nothing could tell a part of an older list
    _, fault = receive(open_session(connect_retries=1), url + CHECKSUMS, part)
    if fault:
        raise UserError(f"{url + CHECKSUMS} cannot be had ({fault}); check --base_url")
    checksums = parse_checksums(part.read_text(encoding="utf-8", errors="replace"), url + CHECKSUMS)
    os.replace(part, path)
    return checksums


def parse_checksums(text: str, url: str) -> dict:
    """What sha256sum writes -> SHA-256 in hex by file name. Raises UserError, for a name that leads elsewhere too."""
    checksums = {}
    for line in text.splitlines():
        found = re.fullmatch(r"([0-9a-fA-F]{64}) [ *]?(\S.*)", line)
        if not found:
            raise UserError(f"{url} is no list of SHA-256 checksums (it says {line[:40]!r}); check --base_url and "
                            "whether the network wants a login")
        digest, name = found.groups()
        if re.search(r"[\\:]", name) or not name.isprintable() or {"", ".", ".."} & set(name.split("/")):
            raise UserError(f"{url} lists {name!r}, which is not a file inside the data set; name another --base_url")
        checksums[name] = digest.lower()
    return checksums


def choose(checksums: dict, data_set: DataSet, rate: int, url: str) -> dict:
    """Those of the listed files that preprocess.py reads at this rate. Raises UserError where the list lacks some."""
    recordings = data_set.recordings.format(rate=rate)
    chosen = {name: digest for name, digest in checksums.items()
              if name in (*data_set.files, LICENCE) or name.startswith(recordings)}
    absent = [wanted for wanted in (*data_set.files, recordings) if not any(name.startswith(wanted) for name in chosen)]
    if absent:
        raise UserError(f"{url} does not list {' and '.join(absent)} of {data_set.name}; name another --base_url")
    return chosen


def find_lacking(folder: Path, wanted: dict, connections: int) -> dict:
    """Those of the wanted files that are not there as their checksums say."""
    def is_whole(item):
        name, digest = item
        try:
            return sha256_of(folder / name) == digest
        except OSError:                     # not there, or not readable: fetched again
            return False
    with ThreadPool(connections) as pool:
        whole = list(tqdm(pool.imap(is_whole, wanted.items(), chunksize=16), total=len(wanted), desc="checksums",
                          unit="file", leave=False))
    return {name: digest for (name, digest), there in zip(wanted.items(), whole, strict=True) if not there}


def fetch_files(lacking: dict, folder: Path, url: str, connections: int) -> dict:
    """Fetch files into folder, several at a time; returns what is wrong with those that cannot be had, by name.

    Raises UserError where the server cannot be reached any more, OSError where folder cannot be written.
    """
    thread = threading.local()

    def open_own_session():
        thread.session = open_session()

    def fetch_one(item):
        name, digest = item
        return name, *fetch_file(thread.session, url + quote(name), folder / name, digest)

    received, faults, start = 0, {}, time.monotonic()
    with (ThreadPool(connections, open_own_session) as pool,
          tqdm(total=len(lacking), desc="download", unit="file", disable=not lacking) as progress):
        for name, count, fault in pool.imap_unordered(fetch_one, lacking.items()):
            received += count
            speed = received / 1e6 / max(time.monotonic() - start, 1e-3)
            progress.set_postfix_str(f"{received / 1e6:.1f} MB, {speed:.1f} MB/s", refresh=False)
            progress.update()
            if fault:
                faults[name] = fault
            if len(faults) == MOST_FAULTS:
                break
    return faults


def fetch_file(session: requests.Session, url: str, path: Path, digest: str) -> tuple:
    """Fetch one file, from where its part ends; returns the bytes received and what is wrong ("": it is there)."""
    part, total = part_of(path), 0
    for _ in range(TRIES):
        received, fault = receive(session, url, part)
        total += received
        if fault:
            return total, fault
        if sha256_of(part) == digest:
            os.replace(part, path)
            return total, ""
        part.unlink()
    return total, f"not what {CHECKSUMS} says, {TRIES} times"


def receive(session: requests.Session, url: str, part: Path) -> tuple:
    """Complete part with what it lacks of url, over as many broken transfers as bring it on.

    Returns the bytes received and the server's answer where that is not the file ("404 Not Found"). Raises UserError
    where the server cannot be reached.
    """
    total = furthest = breaks = 0
    while True:
        held = part.stat().st_size if part.exists() else 0
        furthest = max(furthest, held)
        with ask(session, url, held) as answer:
            if answer.status_code == requests.codes.requested_range_not_satisfiable:
                return total, ""                # nothing is lacking; the checksum will tell
            if answer.status_code not in (requests.codes.ok, requests.codes.partial_content):
                return total, f"{answer.status_code} {answer.reason}"
            start = held if answer.status_code == requests.codes.partial_content else 0
            try:
                write(answer, part, start)
                return total + part.stat().st_size - start, ""
            except HTTPError as error:          # urllib3's: cut off or silent in mid-file
                reached = part.stat().st_size
                total += reached - start
                breaks = 1 if reached > furthest else breaks + 1
                if breaks > RETRIES:
                    raise unreachable(url, error) from error
        time.sleep(min(LONGEST_WAIT, 2 ** breaks) * random.uniform(0.5, 1))


def ask(session: requests.Session, url: str, held: int) -> requests.Response:
    """The answer to a request for all of url but its first held bytes. Raises UserError where there is none."""
    try:
        answer = session.get(url, headers={"Range": f"bytes={held}-"} if held else {}, stream=True, timeout=TIMEOUT)
    except requests.RequestException as error:
        raise unreachable(url, error) from error
    if answer.status_code in PASSING:
        raise unreachable(url, f"it answers {answer.status_code} {answer.reason}")
    return answer


def write(answer: requests.Response, part: Path, start: int):
    """Write an answer's body to part from byte start on, each piece as it comes. Raises HTTPError or OSError."""
    with open(part, "r+b" if start else "wb") as file:
        file.seek(start)
        while chunk := answer.raw.read1(CHUNK, decode_content=False):
            file.write(chunk)
            file.flush()                        # an interrupted process keeps what came


def open_session(connect_retries: int = RETRIES) -> requests.Session:
    """A session that keeps its connection and asks again, at growing intervals, where no answer or a 5xx or 429 comes.

    Fewer connect_retries say soon that there is no network at all.
    """
    session = requests.Session()
    session.headers["Accept-Encoding"] = "identity"     # a range of a compressed file is no range of the file
    retry = Retry(RETRIES, connect=connect_retries, status_forcelist=PASSING, backoff_factor=1, backoff_jitter=1,
                  backoff_max=LONGEST_WAIT, retry_after_max=LONGEST_RETRY_AFTER, raise_on_status=False)
    for scheme in ("https://", "http://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry, pool_maxsize=1))
    return session


def unreachable(url: str, reason) -> UserError:
    """The sentence for a server that cannot be reached. reason: text, or an error that may wrap the actual one."""
    while isinstance(reason, Exception):
        inner = [each for each in (getattr(reason, "reason", None), *reason.args) if isinstance(each, Exception)]
        reason = inner[0] if inner else str(reason) or type(reason).__name__
    return UserError(f"{url} cannot be reached ({' '.join(reason.split())[:150]}); check the network or name a mirror "
                     "with --base_url, then give the same command again: it goes on with what has come")


def part_of(path: Path) -> Path:
    """Where a file is until it is whole."""
    return path.with_name(path.name + ".part")
