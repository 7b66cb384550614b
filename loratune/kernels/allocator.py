"""How the C library hands out memory."""

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt(3)


def keep_pages() -> None:
    """Have memory that was given back stay with the process, where the C library is glibc.

    By default each large tensor is fresh from the kernel, and every page of it a fault: 0.35 s of system time per GB.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_MAX, 0)
        library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
