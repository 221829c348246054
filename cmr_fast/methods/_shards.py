"""Towers sharded over ranks by torch's FSDP2: a rank keeps its rows of weights, gradients and optimizer state.

The blocks of a tower are gathered one after the other as a batch goes through, forward and backward, and every rank
takes the mean of the ranks' gradients at its rows; so all ranks must go through a tower equally often. What lies
outside the towers, the heads and the temperature, stays a replica on each rank, averaged by `Ranks.average`. On disk
tensors are whole, as those of one process.
"""

import warnings
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from cmr_fast.methods._ranks import Ranks

M = TypeVar("M", bound=nn.Module)


def shard(towers: list[nn.Module], ranks: Ranks) -> None:
    """Shard each tower, and in it each block, over the ranks; call it before optimizers take the parameters.

    towers: modules that are called as such, whose lists of blocks are too; the same on all ranks.
    """
    from torch.distributed.device_mesh import init_device_mesh  # a second, which other trainings are spared
    from torch.distributed.fsdp import fully_shard

    # it warns of writing into what a tower returns, which nothing here does
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(next(towers[0].parameters()).device.type, (ranks.world,))
    for tower in towers:
        tower.to(memory_format=torch.contiguous_format)  # FSDP2 takes no other  # type: ignore[call-overload]
        for module in (*_blocks(tower), tower):
            fully_shard(module, mesh=mesh, reshard_after_forward=True)


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The members of the outermost lists of modules, those with parameters."""
    children = [child for child in module.children() if next(child.parameters(), None) is not None]
    if isinstance(module, nn.ModuleList | nn.Sequential):
        return children
    return [block for child in children for block in _blocks(child)]


def is_cut(value: Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(value, "full_tensor")


def is_sharded(model: nn.Module) -> bool:
    """Whether a part of it is."""
    return any(map(is_cut, model.parameters()))


def whole(value: Tensor) -> Tensor:
    """The tensor, gathered where it is sharded: then all ranks must ask for it."""
    return cast(Any, value).full_tensor() if is_cut(value) else value


def gathered(tensors: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """All of them whole, on rank 0; none on the others, which must ask for it too."""
    kept = {}
    for name, value in tensors.items():
        value = whole(value).cpu() if is_cut(value) else value
        if ranks.rank == 0:
            kept[name] = value
    return kept


def like(held: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors by name, those cut that are sharded in `held`; every rank has them and takes its rows."""
    return {name: _cut(value, held.get(name)) for name, value in tensors.items()}


def state_like(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state_dict of whole tensors, those of sharded parameters cut like these."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    cut = {i: {k: _cut(v, held[i]) for k, v in values.items()} for i, values in state["state"].items()}
    return state | {"state": cut}


def _cut(value: Any, held: Tensor | None) -> Any:
    if held is None or not is_cut(held) or not isinstance(value, Tensor) or value.shape != held.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    cut = cast(Any, held)
    return distribute_tensor(value.to(cut.device), cut.device_mesh, cut.placements, src_data_rank=None)


def unsharded(model: M, fresh: M) -> M:
    """`fresh`, a model of the same kind, with the whole weights of a sharded one; on all ranks at once."""
    weight = next(model.parameters())
    fresh.to(weight.device, weight.dtype)
    fresh.load_state_dict({name: whole(value) for name, value in model.state_dict().items()})
    return fresh.train(model.training)
