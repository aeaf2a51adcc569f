"""Whole models as safetensors, at an fsspec URL: a folder, or an object store by name.

The tensors carry the model's own names, so that a snapshot is a model file that any tool opens. What the strategy had gathered
but not merged rides along under names that no model uses.
"""

import hashlib
import json
import os
import re
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import fsspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from aggregator.merging.fold import Buffer, State
from broker_fl.database import storage_errors
from broker_fl.errors import ConfigurationError, DamagedError
from broker_fl.parameters import Vector, flatten, unflatten
from schemas.manifest import Manifest

_OURS = re.compile(r"model-[0-9a-f]{8}-v\d{8,}-s\d{8,}-e(\d{4,})-[0-9a-f]{8}\.safetensors(?:\.part)?")
_BUFFER = "broker_fl.buffer"
_BASE = "broker_fl.base."


@dataclass(frozen=True, slots=True)
class Stored:
    file: str
    sha256: str


class Snapshots:
    """`root` is a folder or an fsspec URL."""

    def __init__(self, root: str, manifest: Manifest) -> None:
        self._root = root.rstrip("/")
        self._manifest = manifest

    def write(self, state: State, *, seq: int, ledger: str, epoch: int) -> Stored:
        """Durable when it returns, under a name that nobody else writes. The `epoch` of who leads tells a later leader whether
        somebody may still name it in the ledger. Raises StorageFullError, StorageError.
        """
        tensors: dict[str, NDArray[np.float32]] = unflatten(state.model, self._manifest)
        facts = {"version": str(state.version), "seq": str(seq), "format": "pt"}
        if state.buffer is not None:
            tensors = {**tensors, _BUFFER: state.buffer.total}
            facts["buffer"] = json.dumps({"weight": state.buffer.weight.hex(), "parties": state.buffer.parties})
        bases = {f"{_BASE}{version}": base for version, base in state.bases.items()}
        tensors = {**tensors, **bases}
        data = save(tensors, metadata=facts)
        file = f"{_prefix(ledger)}v{state.version:08d}-s{seq:08d}-e{epoch:04d}-{uuid.uuid4().hex[:8]}.safetensors"
        with storage_errors(f"{self._root}/{file}"):
            self._write_whole(file, data)
        return Stored(file, hashlib.sha256(data).hexdigest())

    def read(self, stored: Stored) -> State:
        """Raises DamagedError naming the file if it is not, to the last bit, what was written, and StorageError."""
        path = f"{self._root}/{stored.file}"
        with storage_errors(path):
            try:
                with fsspec.open(path, "rb") as source:
                    data: bytes = source.read()
            except FileNotFoundError as exc:
                raise DamagedError(f"snapshot {path} is missing: restore it from a backup") from exc
        if hashlib.sha256(data).hexdigest() != stored.sha256:
            raise DamagedError(f"snapshot {path} is damaged (its digest differs): restore it from a backup")
        try:
            tensors = load(data)
            facts = _metadata(data)
        except (SafetensorError, ValueError) as exc:
            raise DamagedError(f"snapshot {path} is not a safetensors file: {exc}") from exc
        total = tensors.pop(_BUFFER, None)
        named = {spec.name: tensors[spec.name] for spec in self._manifest.tensors}
        return State(
            version=int(facts["version"]),
            model=flatten(named, self._manifest),
            bases={int(name.removeprefix(_BASE)): base for name, base in tensors.items() if name.startswith(_BASE)},
            buffer=None if total is None else _buffer(total, facts["buffer"]),
        )

    def files(self, ledger: str) -> list[str]:
        """The names of all that was ever written for this ledger and is there, also of what was not finished."""
        with storage_errors(self._root):
            filesystem, folder = fsspec.core.url_to_fs(self._root)
            found = filesystem.ls(folder, detail=False) if filesystem.exists(folder) else []
        names = sorted(str(path).rstrip("/").rpartition("/")[2] for path in found)
        # What somebody put beside them, as a copy under another name, is not ours.
        return [name for name in names if name.startswith(_prefix(ledger)) and _OURS.fullmatch(name)]

    def remove(self, file: str) -> None:
        """Raises StorageError; that it is not there is no error."""
        path = f"{self._root}/{file}"
        with storage_errors(path):
            filesystem, name = fsspec.core.url_to_fs(path)
            with suppress(FileNotFoundError):
                filesystem.rm_file(name)

    def _write_whole(self, file: str, data: bytes) -> None:
        if "://" in self._root:
            with fsspec.open(f"{self._root}/{file}", "wb") as sink:
                sink.write(data)
            return
        folder = Path(self._root)
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{file}.part"
        with part.open("wb") as sink:
            sink.write(data)
            sink.flush()
            os.fsync(sink.fileno())
        part.replace(folder / file)
        # The new name is an entry of the folder, which has to reach the disk too.
        entry = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(entry)
        finally:
            os.close(entry)


def write_model(model: Vector, file: Path, *, manifest: Manifest, facts: Mapping[str, str]) -> None:
    """The model alone, under its own names. Raises ConfigurationError rather than write over a file, StorageError."""
    data = save(unflatten(model, manifest), metadata={"format": "pt", **facts})
    with storage_errors(str(file)):
        try:
            with file.open("xb") as sink:
                try:
                    sink.write(data)
                except OSError:
                    file.unlink()
                    raise
        except FileExistsError as exc:
            raise ConfigurationError(f"{file} exists already: move it away first") from exc


def _prefix(ledger: str) -> str:
    """Several ledgers may share one store."""
    return f"model-{ledger[:8]}-"


def epoch_of(file: str) -> int:
    """Of a name that `files` gave."""
    found = _OURS.fullmatch(file)
    if found is None:
        raise ValueError(f"{file!r} is no snapshot's name")
    return int(found[1])


def _metadata(data: bytes) -> dict[str, str]:
    length = int.from_bytes(data[:8], "little")
    metadata: dict[str, str] = json.loads(data[8 : 8 + length])["__metadata__"]
    return metadata


def _buffer(total: NDArray[np.float32], text: str) -> Buffer:
    facts = json.loads(text)
    return Buffer(total, float.fromhex(facts["weight"]), tuple(facts["parties"]))
