"""``--storage URI``: a study folder and its place there, what is pulled and pushed in which order.

The store holds the truth, and the study is worked on in a local folder. It is pulled when a run
starts and pushed as the run goes on: what an epoch leaves before that epoch is reported, the
study's own files at every trial's start and end. Ray's run folders stay local.

Objects appear whole, the tensors of a checkpoint before the ``state.json`` that holds their
checksums, ``results.json`` last, and deletions come at the end: a push that was cut off is an
earlier state, or a checkpoint that is passed over.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from tune_study.errors import UserError
from tune_study.folder import remote
from tune_study.folder.files import read_json
from tune_study.folder.lock import lease
from tune_study.folder.remote import Remote, RemoteError
from tune_study.folder.results import status_of
from tune_study.folder.schema import FINISHED_STATUSES, GOOD_STATUSES

_WRITTEN_LAST = ("state.json", "results.json", "study.json")
"""In this order: what vouches for other files comes after them."""


class StorageLost(UserError):
    """The store does not answer: the study stops, and can be continued when it does."""

    exit_code = 1


class Store:
    """A study folder and its place behind a URI, as one process knows them."""

    def __init__(self, where: Remote, folder: Path) -> None:
        self.remote, self.folder = where, folder
        self._known: defaultdict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
        """What is there: (size, local modification time in ns) by part and name; zeros of what was
        not seen here. By part, since a trial of very many is to cost what one of few does."""
        self._listed: set[str] = set()

    def push(self, *parts: str) -> None:
        """Makes these folders of the study there what they are here; ``""`` is its own files.

        Raises ``RemoteError`` when the store does not answer for half a minute.
        """
        for part in parts:
            here = self._here(part)
            self._list(part)
            known = self._within(part)
            changed = [name for name in here if known.get(name) != here[name]]
            for name in sorted(changed, key=_order):
                try:
                    content = (self.folder / name).read_bytes()
                except FileNotFoundError:
                    continue  # it was removed meanwhile
                remote.write(self.remote, name, content)
                self._known[_part_of(name)][name] = here[name]
            gone = [name for name in known if name not in here]
            remote.delete(self.remote, gone)
            for name in gone:
                del self._known[_part_of(name)][name]

    def _within(self, part: str) -> dict[str, tuple[int, int]]:
        """What is known of ``part``, by name."""
        if part != _OF_TRIALS:
            return dict(self._known[part])
        parts = [known for name, known in self._known.items() if _is_within(name, part)]
        return {name: stat for known in parts for name, stat in known.items()}

    def _here(self, part: str) -> dict[str, tuple[int, int]]:
        if part:
            found = remote.local_files(self.folder / part)
            return {f"{part}/{name}": stat for name, stat in found.items()}
        with os.scandir(self.folder) as entries:  # which knows folders by their entry alone
            files = [entry for entry in entries if remote.travels(entry.name) and entry.is_file()]
        stats = {entry.name: entry.stat() for entry in files}
        return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}

    def _list(self, part: str) -> None:
        if part in self._listed or (part and "*" in self._listed):
            return
        found = remote.listing(self.remote, part)
        prefix = f"{part}/" if part else ""
        for name in found:
            whole = prefix + name
            if remote.travels(whole) and (part or "/" not in name):
                self._known[_part_of(whole)].setdefault(whole, (0, 0))
        self._listed.add(part)

    def pull(self, part: str) -> None:
        """Makes a folder of the study here what it is there."""
        names = [f"{part}/{name}" for name in remote.listing(self.remote, part)]
        names = [name for name in names if remote.travels(name)]
        remote.empty(self.folder / part)
        self._fetch(names)

    def pull_study(self) -> bool:
        """Makes the local folder what the store holds; ``False`` when no study is there yet.

        Trials whose results.json says here and there that they have ended are not fetched again.
        Raises ``UserError`` when the local folder holds another study.
        """
        there = remote.read(self.remote, "study.json")
        if there is None:
            return False
        _refuse_other_study(self, there)
        names = [name for name in remote.listing(self.remote) if remote.travels(name)]
        ended = {name.partition("/")[0] for name in names if self._has_ended(name)}
        for entry in self.folder.iterdir():
            if remote.travels(entry.name) and entry.name not in ended:
                remote.discard(entry)
        self._fetch([name for name in names if name.partition("/")[0] not in ended])
        for trial_id in ended:
            self._known[trial_id] |= self._here(trial_id)
        self._listed |= {"", "*"}
        return True

    def _has_ended(self, name: str) -> bool:
        path = PurePosixPath(name)
        if len(path.parts) != 2 or path.name != "results.json":
            return False
        if status_of(self.folder, path.parts[0]) not in FINISHED_STATUSES:
            return False
        return remote.read(self.remote, name) == (self.folder / name).read_bytes()

    def _fetch(self, names: Sequence[str]) -> None:
        remote.fetch(self.remote, self.folder, names)
        for name in names:
            if (path := self.folder / name).is_file():
                stat = path.stat()
                self._known[_part_of(name)][name] = (stat.st_size, stat.st_mtime_ns)


def _order(name: str) -> tuple[int, str]:
    last = PurePosixPath(name).name
    return (_WRITTEN_LAST.index(last) + 1 if last in _WRITTEN_LAST else 0, name)


_OF_TRIALS = "tensorboard"
"""The folder of which each trial's own is a part, too."""


def _part_of(name: str) -> str:
    """A trial's folder, its folder in TensorBoard's, ``report``; "" of the study's own files."""
    folder, _, rest = name.partition("/")
    if not rest:
        return ""
    inner, deeper, _ = rest.partition("/")
    return f"{folder}/{inner}" if folder == _OF_TRIALS and deeper else folder


def _is_within(part: str, folder: str) -> bool:
    return part == folder or part.startswith(f"{folder}/")


def _refuse_other_study(store: Store, there: bytes) -> None:
    """Nothing local is thrown away that did not come from this store."""
    here = read_json(store.folder / "study.json")
    try:
        manifest = json.loads(there)
    except ValueError:
        manifest = None
    anything = any(remote.travels(path.name) for path in store.folder.iterdir())
    ours, theirs = (m.get("created") if isinstance(m, dict) else None for m in (here, manifest))
    if anything and (ours is None or ours != theirs):
        raise UserError(
            f"--storage {remote.masked(store.remote.uri)}: {store.folder} holds something "
            "else than the study that lies there; choose another --output-dir or --name"
        )


def place_of(storage: str | None, name: str) -> str | None:
    """The URI of the folder of study ``name``. Raises ``UserError`` for a plain path."""
    if storage is None:
        return None
    if not remote.is_uri(storage):
        raise UserError(
            f"--storage {storage}: write a URI, such as s3://bucket/path or file:///path; a local "
            "folder is --output-dir"
        )
    return remote.join(storage, quote(name))


def open_store(uri: str, folder: Path) -> Store:
    """Raises ``UserError`` for a URI that can't be reached. ``uri`` is of the study's folder."""
    try:
        return Store(remote.open_remote(uri), folder)
    except RemoteError as error:
        raise UserError(f"--storage {error}") from None


@contextmanager
def plainly() -> Iterator[None]:
    """A store that does not answer is one sentence."""
    try:
        yield
    except RemoteError as error:
        raise StorageLost(
            f"--storage {error}; repeat the command when it answers: every pushed epoch is kept"
        ) from None


@contextmanager
def held(
    uri: str | None, folder: Path, say: Callable[[str], None], on_loss: Callable[[], None]
) -> Iterator[Store | None]:
    """The store of this run alone, its study pulled into ``folder``; ``None`` without a URI.

    Raises ``UserError`` for a URI that can't be used, and while another run holds the study.
    ``on_loss`` is called when another run has taken it over (``lease``).
    """
    if uri is None:
        yield None
        return
    store = open_store(uri, folder)
    with plainly(), lease(store.remote, say, on_loss):
        store.pull_study()
        yield store


@contextmanager
def kept(
    store: Store | None, trial_id: str, report: Callable[[dict[str, Any]], None]
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Gives a ``report`` that pushes the trial's folder first; at the end it is pushed again."""
    if store is None:
        yield report
        return

    def push_and_report(row: dict[str, Any]) -> None:
        store.push(trial_id)
        report(row)

    try:
        yield push_and_report
    except RemoteError:
        raise  # there is nothing to push to
    except Exception:
        store.push(trial_id)  # its error.json
        raise
    store.push(trial_id)


def push_all(store: Store, trial_ids: Sequence[str]) -> None:
    """At a run's start, when nothing else writes: trials that were forgotten go there as well."""
    with plainly():
        there = {name.partition("/")[0] for name in remote.listing(store.remote)}
        store.push(*(i for i in trial_ids if i in there or (store.folder / i).is_dir()))
        store.push("report", "tensorboard", "")


def push_end(store: Store, trial_ids: Sequence[str]) -> None:
    """At a run's end: tables, report, and what was said of trials that ended badly."""
    with plainly():
        for trial_id in trial_ids:
            status = status_of(store.folder, trial_id)
            if status in FINISHED_STATUSES and status not in GOOD_STATUSES:
                store.push(trial_id)
        store.push("report", "tensorboard", "")
