"""The file: where it is, whether it may be trusted, and how it becomes a table.

It is opened in two steps. `open_file` refuses what is not ours and cannot do any harm; whoever has locked the result calls
`open_table`. The lock and the life of this process are on that first description. The mapping has a second one, as a mapping
keeps its description open in a forked child, and with it the locks of a parent that has died.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import sys
import tempfile
from hashlib import blake2b
from pathlib import Path
from time import monotonic_ns
from typing import Final

from ...exceptions import BackendError, PermanentBackendError
from ..base import settings_module
from .layout import MAGIC, PROCESSES, VERSION, Header, Layout
from .locking import any_alive, claim
from .table import VISITOR, Table, wipe

#: Memory that looks like files; every process of a machine sees the same, unless a container has one of its own.
SHARED_MEMORY: Final = "/dev/shm"
#: What the kernel draws anew whenever the machine starts.
BOOT = "/proc/sys/kernel/random/boot_id"
#: The file systems that are mounted, with their kinds.
MOUNTS = "/proc/self/mountinfo"
#: File systems on which other machines could share the file, but neither its locks nor its memory.
NETWORK: Final = frozenset(
    {"9p", "afs", "ceph", "cifs", "coda", "fuse.ceph", "fuse.cephfs", "fuse.glusterfs", "fuse.s3fs", "fuse.sshfs"}
    | {"gfs2", "glusterfs", "lustre", "nfs", "nfs4", "ocfs2", "smb3", "smbfs", "virtiofs"}
)


def default_path(key_prefix: str) -> Path:
    """In shared memory, else in the directory for temporary files; one file per user, settings module and prefix.

    The module's name counts, not its file: a release in a new folder must meet the old one that still runs.
    """
    parts = [part.encode("utf-8", "surrogatepass") for part in (settings_module(), key_prefix)]
    digest = blake2b(b"".join(len(part).to_bytes(4, "little") + part for part in parts), digest_size=6).hexdigest()
    usable = os.path.isdir(SHARED_MEMORY) and os.access(SHARED_MEMORY, os.W_OK | os.X_OK)
    return Path(SHARED_MEMORY if usable else tempfile.gettempdir()) / f"concurrency-{os.geteuid()}-{digest}.v{VERSION}"


def open_file(path: Path) -> int:
    """A descriptor of the file, made if need be, that nobody else may read or write. Raises: BackendError."""
    return _open(path, os.O_CREAT)


def find_file(path: Path) -> int | None:
    """The same, but None where there is none. Raises: BackendError."""
    return _open(path, 0) if os.path.lexists(path) else None


def _open(path: Path, flags: int) -> int:
    try:
        fd = os.open(path, os.O_RDWR | flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY, 0o600)
    except OSError as error:
        raise _classed(error, path) from error
    try:
        _vet(os.fstat(fd), path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def is_at(path: Path, fd: int) -> bool:
    """Is the file that stands there the one that is open here, and ours the descriptor?"""
    try:
        there, here = os.stat(path, follow_symlinks=False), os.fstat(fd)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)


def open_table(fd: int, path: Path, layout: Layout) -> Table:
    """The table in the file that is open and locked as `fd`. Who finds nobody else alive wipes it. Raises: BackendError."""
    try:
        return _open_table(fd, path, layout)
    except OSError as error:
        raise _classed(error, path) from error


def _open_table(fd: int, path: Path, layout: Layout) -> Table:
    found = os.fstat(fd)
    try:
        alone = not any_alive(fd, 0, PROCESSES)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        raise PermanentBackendError(
            f"{path}: this kernel has no locks of open file descriptions", cure="use the store 'memory' or 'redis'"
        ) from error
    if alone:
        start = os.pread(fd, 4096, 0)
        if any(start) and start[:8] != MAGIC.to_bytes(8, sys.byteorder):
            raise _foreign(path)
        # Space now, or an error: without it the first write to a page that finds none left is the process's end. And the
        # file is never cut, as somebody's mapping may still reach as far as it does.
        os.posix_fallocate(fd, 0, layout.size)
    elif found.st_size < layout.size:
        raise _other_layout(path, layout)
    mapped = _map(path, found, layout.size)
    words: memoryview[int] = memoryview(mapped).cast("Q")
    boot = _boot()
    same_layout = (words[Header.MAGIC], words[Header.VERSION], words[Header.CELLS]) == (MAGIC, VERSION, layout.cells)
    # Of a machine that was not started anew meanwhile: by another one's clock nobody knows when a lease ends.
    keeps = alone and same_layout and boot != 0 and words[Header.BOOT] == boot
    if alone and not keeps:
        words[Header.MAGIC], words[Header.VERSION] = MAGIC, VERSION
        wipe(words, mapped, layout)
        words[Header.BOOT] = boot
    elif not same_layout:
        raise _other_layout(path, layout)
    number = claim(fd, PROCESSES)
    if number is None:
        raise BackendError(f"{PROCESSES} processes use {path} already, which is all it has room for")
    table = Table(fd, mapped, layout, number, (found.st_dev, found.st_ino))
    if keeps:
        table.drop_owned(monotonic_ns())
    elif words[Header.DIRTY]:
        table.rebuild()
    table.drop_of(number)
    at = layout.processes_word + 4 * number
    words[at], words[at + 1] = os.getpid(), monotonic_ns()
    return table


def look_into(fd: int, path: Path, layout: Layout) -> Table | None:
    """The table in the file that is open and locked as `fd`, for one who is none of its processes. None where the next one to
    open it would wipe it. Raises: BackendError."""
    found = os.fstat(fd)
    start = os.pread(fd, 8 * (Header.BOOT + 1), 0)
    if not any(start) or found.st_size < len(start):
        return None
    words = memoryview(start).cast("Q")
    if words[Header.MAGIC] != MAGIC:
        raise _foreign(path)
    try:
        alone = not any_alive(fd, 0, PROCESSES)
        if (words[Header.VERSION], words[Header.CELLS]) != (VERSION, layout.cells) or found.st_size < layout.size:
            if alone:
                return None
            raise _other_layout(path, layout)
        if alone and (not words[Header.BOOT] or words[Header.BOOT] != _boot()):
            return None
        return Table(fd, _map(path, found, layout.size), layout, VISITOR, (found.st_dev, found.st_ino))
    except OSError as error:
        raise _classed(error, path) from error


def _boot() -> int:
    """Which run of the machine this is; 0 where that is not known."""
    try:
        with open(BOOT, "rb") as text:
            return int.from_bytes(blake2b(text.read(), digest_size=8).digest(), sys.byteorder)
    except OSError:
        return 0


def _map(path: Path, found: os.stat_result, size: int) -> mmap.mmap:
    other = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        again = os.fstat(other)
        if (again.st_dev, again.st_ino) != (found.st_dev, found.st_ino):
            raise BackendError(f"{path} was replaced while it was opened")
        return mmap.mmap(other, size)
    finally:
        os.close(other)


def _vet(found: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise _unsafe(path, "it is not a regular file")
    if found.st_uid != os.geteuid():
        raise _unsafe(path, f"it belongs to the user {found.st_uid}, and this process is {os.geteuid()}")
    if found.st_mode & 0o077:
        raise _unsafe(path, f"others may use it (mode {stat.S_IMODE(found.st_mode):04o})")
    vet_file_system(path, found)


def vet_file_system(path: Path, found: os.stat_result) -> None:
    """Is what was found, the file or its directory, on this machine? Raises: PermanentBackendError."""
    kind = _file_system(found.st_dev)
    if kind in NETWORK:
        raise PermanentBackendError(
            f"{path} is on a network file system ({kind}): its locks and its memory are not those of one machine",
            cure="name a file on this machine in `path` of its OPTIONS, or use the redis store",
        )


def _file_system(device: int) -> str:
    """Its kind, empty if that is not known."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open(MOUNTS, encoding="utf-8", errors="replace") as mounts:
            for line in mounts:
                words = line.split()
                if len(words) > 6 and words[2] == wanted and "-" in words[6:]:
                    return words[words.index("-", 6) + 1]
    except OSError:
        pass
    return ""


def _unsafe(path: Path, why: str) -> PermanentBackendError:
    return PermanentBackendError(
        f"{path} is not safe to use: {why}", cure=f"remove {path}, or name another file in `path` of its OPTIONS"
    )


def _foreign(path: Path) -> PermanentBackendError:
    return PermanentBackendError(
        f"{path} is a file of something else", cure=f"name another file in `path`, or remove {path}"
    )


def _other_layout(path: Path, layout: Layout) -> PermanentBackendError:
    return PermanentBackendError(
        f"{path} is in use by processes that have another layout than this one, which has {layout.cells} slots",
        cure="give all processes the same `slots` in OPTIONS and restart them all, or name another file in `path`",
    )


def _classed(error: OSError, path: Path) -> BackendError:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return PermanentBackendError(
            f"there is no room for {path}: {reason}",
            cure="make room there (Docker: --shm-size), choose fewer `slots` in OPTIONS, or a `path` elsewhere",
        )
    if error.errno == errno.ELOOP:
        return _unsafe(path, "it is a symbolic link")
    if error.errno == errno.EISDIR:
        return _unsafe(path, "it is a directory")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.ENXIO, errno.EINVAL):
        return PermanentBackendError(
            f"{path} cannot be opened: {reason}",
            cure="see to it that its directory is there and that this user may write there, or name another file in `path`",
        )
    return BackendError(f"{path}: {reason}")
