"""The private parts of torch that guardrail uses: all in one module, and all still there."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.modules import batchnorm
from torch.optim import SGD, AdamW

import guardrail
from guardrail.torch.state import foreach

ROOM = Path(guardrail.__file__).parent / "torch"
HOME = ROOM / "state" / "foreach.py"

# (what has it, attribute): each private part of torch that guardrail uses.
PRIVATE = [
    (torch, "_foreach_copy_"),
    (torch, "_foreach_sub_"),
    (torch, "_foreach_mul_"),
    (torch, "_foreach_norm"),
    (torch.ones(1), "_version"),
    (batchnorm, "_NormBase"),
    (nn.Linear(1, 1), "_parameters"),
    (nn.BatchNorm1d(1), "_buffers"),
    (nn.BatchNorm1d(1), "_non_persistent_buffers_set"),
    (DTensor, "_local_tensor"),
    (DTensor, "__create_chunk_list__"),
    (SGD([nn.Parameter(torch.ones(1))]), "_optimizer_step_pre_hooks"),
    (SGD([nn.Parameter(torch.ones(1))]), "_optimizer_step_post_hooks"),
    (AdamW([nn.Parameter(torch.ones(1))], fused=True), "_step_supports_amp_scaling"),
]


@pytest.mark.parametrize(("owner", "name"), PRIVATE, ids=[name for _, name in PRIVATE])
def test_torch_still_has_it(owner: object, name: str) -> None:
    if owner is DTensor and name == "_local_tensor":  # a slot that only instances fill
        assert name in DTensor.__slots__ or name in DTensor.__annotations__
    else:
        assert hasattr(owner, name)


def test_a_loss_scaler_still_counts_its_updates() -> None:
    assert foreach.GROWTH_TRACKER in torch.amp.GradScaler("cpu").state_dict()


def private_attributes(path: Path) -> set[str]:
    """Attributes that begin with one underscore, of anything but `self`, and not of this file."""
    tree = ast.parse(path.read_text())
    of_this_file: set[str] = set()
    used: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            of_this_file.add(node.name)
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                of_this_file.add(node.attr)
            elif node.attr not in (
                "__name__",
                "__module__",
                "__mro__",
                "__dict__",
                "__new__",
                "__version__",
            ):
                used.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            used |= {alias.name for alias in node.names if alias.name.startswith("_")}
    return used - of_this_file


def test_no_other_module_uses_a_private_part() -> None:
    found = {
        str(path.relative_to(ROOM)): names
        for path in sorted(ROOM.rglob("*.py"))
        if path != HOME and (names := private_attributes(path))
    }
    assert found == {}


def test_the_list_is_complete() -> None:
    assert private_attributes(HOME) <= {name for _, name in PRIVATE}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_module_is_found() -> None:
    inner = nn.Linear(1, 1)
    compiled = torch.compile(inner, backend="eager")
    assert foreach.compiled_module(compiled) is inner
    assert foreach.compiled_module(inner) is None
    assert all(foreach.COMPILE_PREFIX in name for name, _ in compiled.named_parameters())


def test_a_change_is_counted() -> None:
    tensor = torch.ones(2)
    before = foreach.change_count(tensor)
    tensor.add_(1)
    assert foreach.change_count(tensor) == before + 1


def test_kernels_work_in_place() -> None:
    targets = [torch.ones(2), torch.ones(3)]
    foreach.copy_tensors(targets, [torch.full((2,), 3.0), torch.full((3,), 4.0)])
    foreach.subtract_tensors(targets, [torch.ones(2), torch.ones(3)])
    foreach.multiply_tensors(targets, 2.0)
    assert [t.tolist() for t in targets] == [[4.0, 4.0], [6.0, 6.0, 6.0]]
    assert [float(norm) for norm in foreach.l2_norms([torch.tensor([3.0, 4.0])])] == [5.0]
