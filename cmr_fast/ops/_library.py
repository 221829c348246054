"""Registration of the ops with torch.library, so that torch.compile, opcheck and export see them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from cmr_fast.errors import InputError


class _Library(torch.library.Library):
    """Every derivative that is registered is a reverse one: tensors with a forward-mode derivative are refused.

    torch would drop it without a word. It is seen at autograd's place in the dispatcher, no longer behind it.
    """

    def impl(self, op_name: Any, fn: Any, dispatch_key: str = "", **kwargs: Any) -> Any:
        """As torch.library.Library's."""
        if dispatch_key != "Autograd":
            return super().impl(op_name, fn, dispatch_key, **kwargs)

        name = str(op_name).rpartition("::")[2]

        @functools.wraps(fn)
        def reverse_only(keyset: Any, *args: Any, **kwargs: Any) -> Any:
            if forward_ad._current_level >= 0:
                refuse_forward_mode(name, *args, *kwargs.values())
            if name in _FUNCTIONS and transformed() and torch._C._any_requires_grad(*args):
                raise InputError(f"torch.func has no gradient of torch.ops.cmr_fast.{name}: expected cmr_fast.ops'")
            return fn(keyset, *args, **kwargs)

        return super().impl(op_name, reverse_only, dispatch_key, **kwargs)


_OPS: dict[str, Any] = {}  # by op: its only overload, looked up once
_FUNCTIONS: dict[str, Any] = {}  # by op: its derivative in the form that torch.func takes
LIBRARY = _Library("cmr_fast", "DEF")


def register_derivative(name: str, backward: Callable[..., Any], remember: Callable[..., None] | None = None) -> None:
    """Register cmr_fast::<name>'s derivative: `remember` is what torch calls setup_context."""
    _OPS[name] = getattr(torch.ops.cmr_fast, name).default
    parts = {
        "forward": _OPS[name],
        "setup_context": remember or _nothing,
        "backward": backward,
        "jvp": functools.partial(refuse_tangent, name),
    }
    methods = {part: staticmethod(f) for part, f in parts.items()}
    _FUNCTIONS[name] = type(name, (torch.autograd.Function,), {**methods, "generate_vmap_rule": True})
    torch.library.register_autograd(f"cmr_fast::{name}", backward, setup_context=remember, lib=LIBRARY)


def call(name: str, *args: Any) -> Any:
    """torch.ops.cmr_fast.<name>(*args), which inside of torch.func's transforms has its derivative in their form."""
    if transformed():
        return _FUNCTIONS[name].apply(*args)
    return _OPS[name](*args)


def transformed() -> bool:
    """Whether torch.func.grad, vmap and their like are at work."""
    return not torch.compiler.is_compiling() and bool(torch._C._are_functorch_transforms_active())


def _nothing(ctx: Any, inputs: Any, output: Any) -> None:
    """What an op remembers that has no derivative."""


def derivative_wanted(*leaves: Tensor) -> bool:
    """Whether gradients may be asked for of these; inside torch.func's transforms tensors do not always say so."""
    if not torch.is_grad_enabled():
        return False
    return any(x.requires_grad for x in leaves) or transformed()


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define cmr_fast::<schema>, run `implementation` on every device, and describe its outputs by `fake`.

    Returns the implementation as it is run: outside of autocast, whose 16-bit products would take the digits that the
    op promises. Arguments that the schema marks as changed count their versions, and are refused where autograd would
    have to know how.
    """
    name = schema.split("(", 1)[0]
    guarded = _outside_autocast(implementation)
    LIBRARY.define(schema)
    LIBRARY.impl(name, guarded, "CompositeExplicitAutograd")
    torch.library.register_fake(f"cmr_fast::{name}", fake, lib=LIBRARY)
    op = getattr(torch.ops.cmr_fast, name).default
    changed = [
        (i, x.name) for i, x in enumerate(op._schema.arguments) if x.alias_info is not None and x.alias_info.is_write
    ]
    if changed:
        _count_versions(op, name, changed)
    return guarded


def _outside_autocast(implementation: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(implementation)
    def guarded(*args: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():  # one call for all devices; there is no public name
            return implementation(*args)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return implementation(*args)

    return guarded


def register_loss(
    schema: str, implementation: Callable[..., Any], fake: Callable[..., Any], differentiable: Sequence[int]
) -> None:
    """Register an op that returns (loss, *gradients), and <its name>_backward, which scales the gradients.

    They are made in the forward pass, those of the arguments at the positions `differentiable`, in that order; one
    that was not asked for is empty.
    """
    name = schema.split("(", 1)[0]
    register(schema, implementation, fake)
    register(
        f"{name}_backward(Tensor upstream, {', '.join(f'Tensor gradient{i}' for i in differentiable)}) "
        f"-> ({', '.join('Tensor' for _ in differentiable)})",
        lambda upstream, *gradients: tuple([x * upstream if x.numel() else torch.empty_like(x) for x in gradients]),
        lambda upstream, *gradients: tuple(torch.empty_like(x) for x in gradients),
    )
    inputs = len(getattr(torch.ops.cmr_fast, name).default._schema.arguments)
    backward_op = f"{name}_backward"

    def remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*output[1:])
        ctx.shapes = [inputs[i].shape if isinstance(inputs[i], Tensor) else None for i in differentiable]

    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        result: list[Tensor | None] = [None] * inputs
        gradients = call(backward_op, upstream, *ctx.saved_tensors)
        for i, shape, gradient in zip(differentiable, ctx.shapes, gradients, strict=True):
            if ctx.needs_input_grad[i]:
                if gradient.shape != shape:
                    raise RuntimeError(f"cmr_fast::{name} was called without asking for this gradient")
                result[i] = gradient
        return tuple(result)

    register_derivative(name, backward, remember)
    register_derivative(f"{name}_backward", refuse_twice)


def refuse_forward_mode(name: str, *args: Any) -> None:
    """Raise InputError where an argument carries a forward-mode derivative, as in torch.func.jvp."""
    for x in args:
        if isinstance(x, Tensor) and x.is_floating_point() and forward_ad.unpack_dual(x).tangent is not None:
            refuse_tangent(name)


def refuse_tangent(name: str, *_: Any) -> NoReturn:
    """Raise InputError: forward mode has come to what has a reverse derivative alone."""
    raise InputError(
        f"{name} has no forward-mode derivative, got a tensor with a tangent (torch.func.jvp, forward_ad): "
        "expected reverse mode, torch.autograd.grad, torch.func.grad or .backward()"
    )


def refuse_transforms(name: str) -> None:
    """Raise InputError inside of torch.func.grad, vmap and their like, of what talks to other processes."""
    if transformed():
        raise InputError(f"{name} must be called outside of torch.func's transforms (grad, vmap, jvp)")


def refuse_twice(ctx: Any, *_: Any, hint: str = "") -> NoReturn:
    """The backward of a backward op."""
    raise InputError(f"this loss can be differentiated once, got a second derivative{hint}")


def _count_versions(op: Any, name: str, changed: list[tuple[int, str]]) -> None:
    """What in-place operators of torch do: see torch/_library/custom_ops.py, which does it for custom_op alone."""

    def check(keyset: Any, *args: Any) -> Any:
        for i, argument in changed:
            if isinstance(args[i], Tensor) and args[i].requires_grad and torch.is_grad_enabled():
                raise InputError(
                    f"{name} changes {argument} in place and has no derivative: expected a tensor that requires no "
                    f"grad ({argument}.detach(), or torch.no_grad()), got one that does"
                )
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def count(keyset: Any, *args: Any) -> Any:
        for i, _ in changed:
            if isinstance(args[i], Tensor):
                torch.autograd.graph.increment_version(args[i])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    LIBRARY.impl(name, check, "Autograd", with_keyset=True)
    LIBRARY.impl(name, count, "ADInplaceOrView", with_keyset=True)
