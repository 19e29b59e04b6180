"""What makes a processor faster than PyTorch's defaults."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # <malloc.h>


def keep_freed_memory() -> bool:
    """Tell glibc's allocator to keep freed memory, instead of giving it back to the kernel.

    Every training step frees and allocates the same large tensors. By default glibc maps each of them anew, and the
    kernel clears its pages at the first touch, which can cost a third of the time. The process's memory then stays
    at its peak, which a training run reaches at its first step.

    Returns:
        Whether it was done: only where the C library is glibc.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False  # musl, for one
    return bool(libc.mallopt(M_MMAP_MAX, 0)) and bool(libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
