import os
import platform
import subprocess
import sys

import pytest
import torch

from cifarnet.system import hardware

PROGRAM = """
import resource, sys, torch
from cifarnet.system.hardware import keep_freed_memory
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


def test_each_process_has_a_gpu_of_its_own(tmp_path):
    claim = (
        "from cifarnet import hardware; hardware.claim_gpu(); import os; print(os.environ['CUDA_VISIBLE_DEVICES']); "
    )
    claim += "print(len(hardware.gpus()), flush=True); input()"
    settings = {"env": os.environ | {"CUDA_VISIBLE_DEVICES": "3,5", "TMPDIR": str(tmp_path)}, "text": True}
    claimed, processes = [], []
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", claim], stdin=subprocess.PIPE, stdout=subprocess.PIPE, **settings
        )
        claimed.append(process.stdout.readline().strip())
        assert process.stdout.readline().strip() == "1"  # it sees its own alone
        processes.append(process)
    assert claimed == ["3", "5", "3"]  # more processes than GPUs
    for process in processes[1:]:
        process.kill()
        process.communicate()
    again = subprocess.run([sys.executable, "-c", claim], input="\n", stdout=subprocess.PIPE, **settings, check=True)
    assert again.stdout.startswith("5")  # a process that ended, however it did, has none
    processes[0].communicate("\n")


def test_without_a_gpu_there_is_none_to_claim(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    hardware.claim_gpu.cache_clear()
    assert hardware.gpus() == []
    assert hardware.claim_gpu() is None
    hardware.claim_gpu.cache_clear()


def test_cores_are_those_of_this_process():
    program = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); "
    program += "from cifarnet import hardware; print(hardware.cores())"
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("only Linux lets a process choose its cores")
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "1\n"


def test_threads_are_as_many_as_before():
    before = torch.get_num_threads()
    with hardware.same_threads():
        torch.set_num_threads(before + 1)
    assert torch.get_num_threads() == before
