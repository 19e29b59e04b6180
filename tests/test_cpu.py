import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from cifarnet.cpu import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(20):  # until the heap has settled
    torch.ones(2**24)  # 64 MiB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an allocator setting of glibc")
def test_freed_memory_is_used_again_without_page_faults():
    faults = {}
    for mode in ("keep", "return"):
        command = [sys.executable, "-c", PROGRAM, mode]
        faults[mode] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert faults["keep"] < 100
    assert faults["return"] > 10 * max(faults["keep"], 10)
