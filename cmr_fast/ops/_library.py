"""Registration of the ops with torch.library, so that torch.compile, opcheck and export see them."""

from collections.abc import Callable

import torch

LIBRARY = torch.library.Library("cmr_fast", "DEF")


def register(schema: str, implementation: Callable, fake: Callable) -> None:
    """Define cmr_fast::<schema>, run `implementation` on every device, and describe its outputs by `fake`."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"cmr_fast::{name}", fake, lib=LIBRARY)
