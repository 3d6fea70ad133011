"""PTB-XL, LUDB and MIT-BIH from PhysioNet or a mirror: the files that preprocess.py reads, each checked by its SHA-256.

The files are small (0.1 MB) and many: each is fetched whole, several at a time, and stands under its own name only when
it is what SHA256SUMS.txt says. So an interrupted run is completed by the next one. That list is the one file that
nothing checks, so every run fetches it anew.
"""
import hashlib
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
from urllib3.util import Retry

from ecg.arrays import SIMULATED_MARKER
from utils import UserError, sha256_of, unwritable, write_atomically

CHECKSUMS = "SHA256SUMS.txt"
LICENCE = "LICENSE.txt"
TIMEOUT = (10, 30)              # s without a connection, s without a byte
PASSING = (408, 429, *range(500, 600))      # answers after which the same request may well succeed
RETRIES = 6                     # of a request without an answer; a minute in all
LONGEST_WAIT = 60               # s between two of them
LONGEST_RETRY_AFTER = 300       # s; a server that asks for more is asked again after these
TRIES = 4                       # of a file that was cut off, or whose checksum is wrong
MOST_FAULTS = 20                # missing or wrong files after which the rest is not worth asking for


@dataclass(frozen=True)
class DataSet:
    """Where a data set is, and which of its files preprocess.py reads."""
    name: str
    place: str                  # below --base_url
    path_flag: str              # the flag that names its folder
    files: tuple
    recordings: tuple           # starts of the recordings' names


DATA_SETS = {"download": DataSet("PTB-XL 1.0.3", "ptb-xl/1.0.3/", "ptbxl_path",
                                 ("ptbxl_database.csv", "scp_statements.csv"), ("records{rate}/",)),
             "download_ludb": DataSet("LUDB 1.0.1", "ludb/1.0.1/", "ludb_path", ("RECORDS", "ludb.csv"), ("data/",)),
             "download_mitdb": DataSet("the MIT-BIH arrhythmia database 1.0.0", "mitdb/1.0.0/", "mitdb_path",
                                       ("RECORDS",), ("1", "2"))}


def add_flags(parser):
    """Add the flags of downloading to preprocess.py's."""
    group = parser.add_argument_group("download, before anything else; what is whole is not fetched again")
    group.add_argument("--download", metavar="DIR", help="fetch PTB-XL 1.0.3, the files of --sampling_rate, to DIR "
                       "(0.5 GB at 100 Hz, 2.6 GB at 500), all of them whatever --limit says, and go on with DIR as "
                       "--ptbxl_path, where that flag is absent")
    group.add_argument("--download_ludb", metavar="DIR", help="fetch LUDB 1.0.1 to DIR, and go on with DIR as "
                       "--ludb_path, where that flag is absent")
    group.add_argument("--download_mitdb", metavar="DIR", help="fetch the MIT-BIH arrhythmia database 1.0.0 to DIR, "
                       "and go on with DIR as --mitdb_path, where that flag is absent")
    group.add_argument("--connections", type=int, default=8, help="files fetched at a time (default %(default)s)")
    group.add_argument("--base_url", default="https://physionet.org/files/",
                       help="a mirror of PhysioNet, with ptb-xl/1.0.3/, ludb/1.0.1/ and mitdb/1.0.0/ below it (default "
                       "%(default)s)")


def fetch(flag: str, folder: Path, rate: int, base_url: str, connections: int):
    """Complete the folder of a data set. flag: of DATA_SETS; rate: Hz, which of PTB-XL's files.

    Raises UserError: no network or server, a file that is missing there or wrong again and again, a full disk.
    """
    data_set = DATA_SETS[flag]
    if not base_url.startswith(("https://", "http://")):
        raise UserError(f"--base_url {base_url} is no web address; start it with https:// or http://")
    if (folder / SIMULATED_MARKER).exists():
        raise UserError(f"{folder} given as --{flag} holds simulated ECGs; name another folder")
    url = f"{base_url.rstrip('/')}/{data_set.place}"
    print(f"{data_set.name} from {url} to {folder}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        checksums = choose(fetch_checksums(url, folder), data_set, rate, url + CHECKSUMS)
        lacking = find_lacking(folder, checksums, connections)
        print(f"{len(checksums) - len(lacking)} of {len(checksums)} files are there already, their checksums are right")
        faults = fetch_files(lacking, folder, url, connections)
    except OSError as error:
        raise unwritable(f"{folder} given as --{flag}", error) from error
    if faults:
        first = ", ".join(f"{name}: {fault}" for name, fault in list(faults.items())[:3])
        raise UserError(f"{len(faults)} of the files below {url} cannot be had ({first}); try again later or name "
                        f"another --base_url, or go on without them by --{data_set.path_flag} {folder} --allow_missing")


def fetch_checksums(url: str, folder: Path) -> dict:
    """Fetch the list of checksums below url into folder: SHA-256 in hex by file name. Raises UserError."""
    content, fault = receive(open_session(connect_retries=1), url + CHECKSUMS)
    if fault:
        raise UserError(f"{url + CHECKSUMS} cannot be had ({fault}); check --base_url")
    checksums = parse_checksums(content.decode(errors="replace"), url + CHECKSUMS)
    write_atomically(folder / CHECKSUMS, lambda file: file.write(content))
    return checksums


def parse_checksums(text: str, url: str) -> dict:
    """What sha256sum writes -> SHA-256 in hex by file name. Raises UserError, for a name that leads elsewhere too."""
    checksums = {}
    for line in text.splitlines():
        match = re.fullmatch(r"([0-9a-fA-F]{64}) [ *]?(\S.*)", line)
        if not match:
            raise UserError(f"{url} is no list of SHA-256 checksums (it says {line[:40]!r}); check --base_url and "
                            "whether the network wants a login")
        digest, name = match.groups()
        if re.search(r"[\\:]", name) or not name.isprintable() or {"", ".", ".."} & set(name.split("/")):
            raise UserError(f"{url} lists {name!r}, which is not a file inside the data set; name another --base_url")
        checksums[name] = digest.lower()
    return checksums


def choose(checksums: dict, data_set: DataSet, rate: int, url: str) -> dict:
    """Those of the listed files that preprocess.py reads at this rate. Raises UserError where the list lacks some."""
    recordings = tuple(start.format(rate=rate) for start in data_set.recordings)
    chosen = {name: digest for name, digest in checksums.items()
              if name in (*data_set.files, LICENCE) or name.startswith(recordings)}
    absent = [start for start in (*data_set.files, *recordings) if not any(name.startswith(start) for name in chosen)]
    if absent:
        raise UserError(f"{url} does not list {' and '.join(absent)} of {data_set.name}; name another --base_url")
    return chosen


def find_lacking(folder: Path, checksums: dict, connections: int) -> dict:
    """Those of the files that are not there as their checksums say."""
    def is_whole(item):
        name, digest = item
        try:
            return sha256_of(folder / name) == digest
        except OSError:                     # not there, or not readable: fetched again
            return False
    with ThreadPool(connections) as pool:
        whole = list(tqdm(pool.imap(is_whole, checksums.items(), chunksize=16), total=len(checksums), desc="checksums",
                          unit="file", leave=False))
    return {name: digest for (name, digest), there in zip(checksums.items(), whole, strict=True) if not there}


def fetch_files(lacking: dict, folder: Path, url: str, connections: int) -> dict:
    """Fetch files into folder, several at a time; returns what is wrong with those that cannot be had, by name.

    Raises UserError where the server cannot be reached any more or the folder cannot be written.
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
    """Fetch one file; returns the bytes received and what is wrong ("": it is there)."""
    total = 0
    for _ in range(TRIES):
        content, fault = receive(session, url)
        total += len(content)
        if fault:
            return total, fault
        if hashlib.sha256(content).hexdigest() == digest:
            write_atomically(path, lambda file, content=content: file.write(content))
            return total, ""
    return total, f"not what {CHECKSUMS} says, {TRIES} times"


def receive(session: requests.Session, url: str) -> tuple:
    """(the content of url, "" or the server's answer where that is not the file, such as "404 Not Found").

    A transfer that is cut off or stalls is begun again. Raises UserError where the server cannot be reached.
    """
    for attempt in range(TRIES):
        try:
            answer = session.get(url, timeout=TIMEOUT)
            break
        except (requests.exceptions.ChunkedEncodingError, requests.exceptions.ConnectionError) as error:
            # a connection that was never made is the session's to retry, and comes here as its MaxRetryError
            if attempt == TRIES - 1 or hasattr(error.args[0] if error.args else None, "reason"):
                raise unreachable(url, error) from error
        except requests.RequestException as error:
            raise unreachable(url, error) from error
        time.sleep(min(LONGEST_WAIT, 2 ** attempt) * random.uniform(0.5, 1))
    if answer.status_code in PASSING:
        raise unreachable(url, f"it answers {answer.status_code} {answer.reason}")
    return (answer.content, "") if answer.ok else (b"", f"{answer.status_code} {answer.reason}")


def open_session(connect_retries: int = RETRIES) -> requests.Session:
    """A session that keeps its connection and asks again, at growing intervals, where no answer or a 5xx or 429 comes.

    Fewer connect_retries say soon that there is no network at all.
    """
    session = requests.Session()
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
