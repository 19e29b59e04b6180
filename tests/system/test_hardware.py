import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from cifarnet.system import hardware

PROGRAM = """
import resource, sys, torch
from cifarnet.system.hardware import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(20):  # until the size of the heap is stable
    torch.ones(2**24)  # 64 MiB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an allocator setting of glibc")
def test_freed_memory_is_reused_without_page_faults():
    faults = {}
    for mode in ("keep", "return"):
        command = [sys.executable, "-c", PROGRAM, mode]
        faults[mode] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert faults["keep"] < 100
    assert faults["return"] > 10 * max(faults["keep"], 10)


CLAIM = """
import os
from cifarnet.system import hardware
hardware.claim_gpu()
hardware.claim_gpu()  # once is enough
print(os.environ["CUDA_VISIBLE_DEVICES"], hardware.gpus(), flush=True)
input()
"""


def test_processes_claim_gpus_evenly(tmp_path):
    settings = {"env": os.environ | {"CUDA_VISIBLE_DEVICES": "3,5", "TMPDIR": str(tmp_path)}, "text": True}
    command = [sys.executable, "-c", CLAIM]
    claimed, processes = [], []
    for _ in range(3):
        processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **settings))
        claimed.append(processes[-1].stdout.readline().strip())
    assert claimed == ["3 ['3']", "5 ['5']", "3 ['3']"]  # more processes than GPUs
    for process in processes[1:]:
        process.kill()
        process.communicate()
    again = subprocess.run(command, input="\n", stdout=subprocess.PIPE, **settings, check=True)
    assert again.stdout.startswith("5")  # the claim of the process that was killed has ended
    processes[0].communicate("\n")


def test_without_gpus_none_is_claimed(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    hardware.claim_gpu()
    assert hardware.gpus() == []
    assert hardware.CLAIMED not in os.environ


def test_cores_are_those_that_this_process_may_use():
    program = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); "
    program += "from cifarnet.system import hardware; print(hardware.cores())"
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("only Linux lets a process choose its cores")
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "1\n"


def test_the_number_of_threads_is_restored():
    before = torch.get_num_threads()
    config = OmegaConf.create({"threads": before + 1, "keep_freed_memory": False})
    with hardware.prepared_process(config):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("variables", "threads"),
    [
        ({}, None),
        ({"LOCAL_WORLD_SIZE": "3"}, 2),  # torchrun
        ({"SLURM_CPUS_PER_TASK": "4"}, 4),
        ({"SLURM_CPUS_ON_NODE": "6", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2"}, 3),
        ({"SLURM_CPUS_PER_TASK": "4", "LOCAL_WORLD_SIZE": "2"}, 2),
    ],
    ids=str,
)
def test_threads_of_several_processes_share_the_cores(monkeypatch, variables, threads):
    for name in list(os.environ):
        if name.startswith(("SLURM", "LOCAL_WORLD")):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(6), raising=False)
    assert hardware.default_threads() == threads


def test_the_commit_of_a_checkout_is_recorded():
    checkout = Path(__file__).parents[2]
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        pytest.skip("not a git checkout")
    commit = hardware.git_commit()
    assert commit is not None
    assert commit.removesuffix("-dirty") == result.stdout.strip()


WAITING = """
import os, time
from cifarnet.system.hardware import waiting_seconds
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
competitor = os.fork()
while competitor == 0:
    pass
before = waiting_seconds(), time.perf_counter(), time.process_time()
while time.perf_counter() < before[1] + 1:
    pass
after = waiting_seconds(), time.perf_counter(), time.process_time()
os.kill(competitor, 9)
waited, wall, cpu = (now - then for now, then in zip(after, before))
print(waited, wall - cpu)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="a file of Linux")
def test_a_thread_waits_while_it_has_no_processor_time():
    """Two processes share a core: each waits for as long as the other one runs."""
    result = subprocess.run([sys.executable, "-c", WAITING], capture_output=True, text=True, check=True)
    waited, expected = map(float, result.stdout.split())
    assert expected > 0.25
    assert waited == pytest.approx(expected, abs=0.1)
