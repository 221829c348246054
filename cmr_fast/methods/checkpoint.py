"""Tensors and JSON in one safetensors file that is whole, of the right kind and unchanged, or refused."""

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cmr_fast._files import write_aside
from cmr_fast.data import formats
from cmr_fast.errors import InputError

_FORMAT, _KEY = "cmr_fast/1", "cmr_fast"


def save(path: str | os.PathLike[str], kind: str, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write `tensors` and `meta` (anything JSON holds) as one safetensors file; a kill leaves the previous file.

    Equal contents give equal bytes: the header is JSON under one key, with the format,
    the `kind`, `meta` as JSON, and a digest
    over all of them and the tensors.
    """
    whole = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    text = json.dumps(meta)
    header = {"format": _FORMAT, "kind": kind, "meta": text, "digest": _digest(kind, text, whole)}
    with write_aside(path) as aside:
        try:  # one key: safetensors writes several in any order
            save_file(whole, aside, metadata={_KEY: json.dumps(header)})
        except SafetensorError as error:
            raise OSError(errno.EIO, f"could not be written ({error})", str(path)) from error


def load(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save` wrote: (tensors on the CPU, meta).

    Raises InputError for a file that is missing, truncated, changed, of another program or of another kind.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{file}: no such file, expected a {kind} file")
    head = formats.first_bytes(file)
    if not (head[8:9] == b"{") and (what := formats.other_than_one_array(file, head)):
        raise InputError(f"{file}: expected a {kind} file; it {what.partition(';')[0]}")
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            header = opened.metadata() or {}
            header = json.loads(header[_KEY]) if _KEY in header else header  # files of before had four keys
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"{file}: half-written or not a safetensors file ({error})") from error
    if header.get("format") != _FORMAT:
        raise InputError(f"{file}: not written by cmr_fast (format {header.get('format')!r}, expected {_FORMAT!r})")
    if header.get("digest") != _digest(header.get("kind", ""), header.get("meta", ""), tensors):
        raise InputError(f"{file}: damaged, its contents do not match the digest in its header")
    if header["kind"] != kind:
        raise InputError(f"{file}: expected a {kind} file, this is a {header['kind']} file")
    return tensors, json.loads(header["meta"])


def _digest(kind: str, text: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.blake2b(f"{_FORMAT}\n{kind}\n{text}".encode(), digest_size=16)
    for name, value in sorted(tensors.items()):
        digest.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def flatten_optimizer(prefix: str, state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state_dict as named tensors and the JSON rest."""
    tensors: dict[str, Tensor] = {}
    rest: dict[str, dict[str, Any]] = {}
    for index, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{prefix}.{index}.{key}"] = value
            else:
                rest.setdefault(str(index), {})[key] = value
    return tensors, {"rest": rest, "param_groups": state["param_groups"]}


def unflatten_optimizer(prefix: str, tensors: dict[str, Tensor], meta: dict[str, Any]) -> dict[str, Any]:
    """The state_dict that `flatten_optimizer` took apart."""
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in meta["rest"].items()}
    for name, value in tensors.items():
        if name.startswith(f"{prefix}."):
            index, key = name.removeprefix(f"{prefix}.").split(".", 1)
            state.setdefault(int(index), {})[key] = value
    return {"state": state, "param_groups": meta["param_groups"]}
