"""A file system of its own for each machine of the campaign, which can be full from one moment to the next."""

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_ROOM_MB = 4096
_CLONE_NEWNS = 0x00020000


@dataclass(frozen=True, slots=True)
class Disk:
    folder: Path
    can_be_full: bool
    """Where no file system may be mounted, it is a folder like any other."""

    def fill(self) -> None:
        """To the last byte that is in use now."""
        used_kb = shutil.disk_usage(self.folder).used // 1024
        self._resize(f"{max(used_kb, 1)}k")

    def make_room(self) -> None:
        self._resize(f"{_ROOM_MB}m")

    def _resize(self, size: str) -> None:
        if self.can_be_full:
            subprocess.run(["mount", "-o", f"remount,size={size}", str(self.folder)], check=True)


def own_mounts() -> None:
    """What this process and its children mount from now on is seen by them alone, and goes with the last of them, however they
    end.
    """
    if ctypes.CDLL(None).unshare(_CLONE_NEWNS) == 0:
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)


@contextmanager
def disk(folder: Path) -> Iterator[Disk]:
    """In memory: it takes what is in it, and goes with it."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_ROOM_MB}m", "tmpfs", str(folder)]
    is_mounted = shutil.which("mount") is not None and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield Disk(folder, is_mounted)
    finally:
        if is_mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)
