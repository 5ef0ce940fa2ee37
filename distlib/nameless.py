"""A file without a name: nothing of it is left when the process ends, however it ends.

Room for it is taken before it is used, so that a full disk is an error here, not a signal or a lost write later.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import weakref
from pathlib import Path


class NamelessFile:
    """A file on the disk of `folder`, to read and write, with room for `nbytes` zeros. It goes with the object.

    Raises OSError: the folder cannot be written to, or there is no room; then `strerror` tells the bytes free there.
    """

    def __init__(self, folder: Path, nbytes: int = 0) -> None:
        self.folder = folder
        self.nbytes = 0
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)
        weakref.finalize(self, self._file.close)
        self.grow(nbytes)

    def fileno(self) -> int:
        """The descriptor, for os.pread and its like; the position of the file is never used."""
        return self._file.fileno()

    @property
    def path(self) -> str:
        """Where this process can open the file once more, for a mapping that outlives this object."""
        return f"/proc/self/fd/{self.fileno()}"

    def grow(self, nbytes: int) -> None:
        """Room for `nbytes` more, at the end. Raises OSError as the constructor does; the file is then as before."""
        if not nbytes:
            return
        free = shutil.disk_usage(self.fileno()).free  # of the file: the folder may be gone
        if free < nbytes:  # asking the system would fill the disk for a moment, for others too
            raise self._no_room(errno.ENOSPC, free)
        try:
            os.posix_fallocate(self.fileno(), self.nbytes, nbytes)
        except OSError as error:
            os.ftruncate(self.fileno(), self.nbytes)
            raise self._no_room(error.errno or errno.ENOSPC, free) from error
        self.nbytes += nbytes

    def _no_room(self, code: int, free: int) -> OSError:
        return OSError(code, f"{os.strerror(code)}, {free:,} bytes are free there", str(self.folder))
