"""Private names of other packages that cifarnet uses. These tests fail if a package renames or changes one."""

import argparse
import ast
import inspect

import optuna
import pytest
import torch
from hydra._internal.utils import _run_hydra, get_args_parser
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from cifarnet.config import PACKAGE

FOREACH = {
    *("_foreach_add", "_foreach_add_", "_foreach_copy_", "_foreach_lerp_", "_foreach_mul", "_foreach_mul_"),
    "_foreach_norm",
}
TESTED = {  # by the tests below, except for the public ones
    *("_run_hydra", "hydra._internal.utils", "_get_root", "torch._inductor.exc", "_trial_id"),
    "_last_global_step_saved",
    "_scaled_dot_product_flash_attention_for_cpu",
    *("_is_avx512_bf16_supported", "_is_amx_tile_supported", *FOREACH),
}
PUBLIC = {"_replace", "_exit", "_target_"}  # of a NamedTuple, of `os`, and in Hydra's configs


def names(tree: ast.AST):
    """Yield the names of imports, of their modules, and of attributes, except for those of `self` and `cls`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            is_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            yield from [] if is_own else [node.attr]
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def test_these_are_all_private_names():
    found = {name for file in PACKAGE.rglob("*.py") for name in names(ast.parse(file.read_text("utf-8")))}
    assert set(filter(is_private, found)) - PUBLIC == TESTED


def test_run_hydra():
    """Called by `sweeps.task` with arguments that it has parsed, in place of `sys.argv`."""
    assert list(inspect.signature(_run_hydra).parameters)[:5] == [
        *("args", "args_parser", "task_function", "config_path", "config_name")
    ]
    parser = get_args_parser()
    assert isinstance(parser, argparse.ArgumentParser)
    parsed = parser.parse_args(["--multirun", "a=1", "b=2"])
    assert (parsed.multirun, parsed.overrides) == (True, ["a=1", "b=2"])


def test_last_global_step_saved():
    """Saved and restored by `callbacks.training_state`; Lightning does not save it."""
    callback = ModelCheckpoint()
    assert callback._last_global_step_saved == 0
    assert "_last_global_step_saved" not in callback.state_dict()


def test_get_root():
    """Used by `cli` to suggest a setting that exists."""
    config = OmegaConf.create({"a": {"b": 1}})
    OmegaConf.set_struct(config, True)
    with pytest.raises(ConfigKeyError) as error:
        config["a"]["c"]
    assert error.value.parent_node._get_root() is config
    assert error.value.full_key == "a.c"


def test_compiler_errors():
    """Recognized by `callbacks.compilation`, which is tested with a missing compiler, too."""
    assert issubclass(CppCompileError, Exception)
    assert issubclass(InvalidCxxCompiler, Exception)


def test_trial_id():
    """Used by `sweeps.storage` as the key of a trial."""
    study = optuna.create_study()
    trial = study.ask()
    assert trial._trial_id == study.trials[0]._trial_id == 0


def test_precisions_of_the_cpu():
    """Used by `system.hardware`."""
    assert isinstance(torch.cpu._is_avx512_bf16_supported(), bool)
    assert isinstance(torch.cpu._is_amx_tile_supported(), bool)


def test_foreach_functions():
    """Used by recipes and Muon."""

    def tensors():
        return [torch.tensor([3.0, 4.0]), torch.tensor([1.0])]

    def values(result):
        return [tensor.tolist() for tensor in result]

    assert values(torch._foreach_add(tensors(), tensors(), alpha=2)) == [[9, 12], [3]]
    assert values(torch._foreach_mul(tensors(), 2)) == [[6, 8], [2]]
    assert values(torch._foreach_norm(tensors())) == [5, 1]
    for name, arguments, expected in [
        ("_foreach_add_", (tensors(),), [[6, 8], [2]]),
        ("_foreach_copy_", ([torch.tensor([7.0, 8.0]), torch.tensor([9.0])],), [[7, 8], [9]]),
        ("_foreach_lerp_", ([torch.zeros(2), torch.zeros(1)], 0.5), [[1.5, 2], [0.5]]),
        ("_foreach_mul_", ([torch.tensor(2.0), torch.tensor(3.0)],), [[6, 8], [3]]),
    ]:
        changed = tensors()
        getattr(torch, name)(changed, *arguments)
        assert values(changed) == expected


def test_step_supports_amp_scaling():
    """Read by `classifier`: a fused optimizer that scales gradients itself cannot be clipped."""
    weights = [torch.nn.Parameter(torch.zeros(1))]
    assert torch.optim.SGD(weights, lr=0.1, fused=True)._step_supports_amp_scaling
    assert not getattr(torch.optim.SGD(weights, lr=0.1, fused=False), "_step_supports_amp_scaling", False)


def test_attention_on_the_cpu():
    """Counted by `inspection.layers`, because torch counts attention on GPUs only."""
    operation = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    called = []
    query = torch.rand(1, 2, 3, 4)

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(function.overloadpacket)
            return function(*args, **(kwargs or {}))

    with Calls():
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert operation in called
    assert operation not in flop_registry
