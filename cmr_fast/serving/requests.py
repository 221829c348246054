"""What a request to search asks for: its JSON, or an image with the settings in the address."""

import binascii
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cmr_fast.errors import InputError
from cmr_fast.modalities import Modality
from cmr_fast.retrieval._checks import packed_codes

MOST_HITS = 1 << 20
"""Queries times k of a request."""


class RefusedError(Exception):
    """A request that is not answered: the status, why, and headers of the response."""

    def __init__(self, status: int, why: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(why)
        self.status, self.headers = status, dict(headers or {})


class Asked(BaseModel):
    """The body of POST /search: one of `codes`, `text` and `row`, or an image as the body itself, and how to search."""

    model_config = ConfigDict(extra="forbid")

    codes: Any = Field(None, description="A packed code, or a list of them: hex, base64 or a list of bytes each.")
    text: str | None = Field(None, description="A caption, which the run encodes.", min_length=1)
    row: int | None = Field(None, ge=0, description="Number of a test query of the run, of `modality`.")
    modality: Modality = Field("image", description="Of `row`.")
    k: int = Field(10, ge=1, description="Hits of a query.")
    radius: int | None = Field(None, ge=0, description="Only hits at this Hamming distance or below.")
    where: list[int] | None = Field(None, description="Search among these ids only.")
    by: Literal["codes", "embeddings"] = Field("codes", description="What is compared; embeddings need a run.")
    attacked: bool = Field(False, description="Attack the query first; needs a run.")


def read_json(body: bytes) -> Asked:
    """What a JSON body asks for. RefusedError 400 where it is no JSON object, 422 where a field is wrong."""
    try:
        return Asked.model_validate_json(body, strict=True)
    except ValidationError as error:
        raise _refused(error) from error


def read_parameters(given: Mapping[str, str]) -> Asked:
    """What the address of an image asks for."""
    try:
        asked = Asked.model_validate(dict(given))
    except ValidationError as error:
        raise _refused(error) from error
    if asked.codes is not None or asked.text is not None or asked.row is not None:
        raise RefusedError(422, "an image is the query: expected no codes, text or row beside it")
    return asked


def _refused(error: ValidationError) -> RefusedError:
    first = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid" or not first["loc"]:
        return RefusedError(400, f'expected a JSON object such as {{"codes": "00ff...", "k": 10}}: {first["msg"]}')
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return RefusedError(422, f"{field}: no such field, expected {', '.join(Asked.model_fields)}")
    return RefusedError(422, f"{field}: {first['msg']}, got {str(first['input'])[:60]!r}")


def queries_of(given: Any, bits: int) -> np.ndarray:
    """Packed codes uint8 (Q, bytes) of a code or a list of them.

    Raises
    ------
    RefusedError
        422 where one is not a code of so many bits.
    """
    several = isinstance(given, list) and not any(isinstance(x, int) for x in given)
    rows = [_code(each, bits, f"codes[{n}]") for n, each in enumerate(given)] if several else [_code(given, bits)]
    if not rows:
        raise RefusedError(422, "codes: expected one at least, got none")
    packed = np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), -1)
    try:
        return packed_codes(packed, "codes", bits)
    except InputError as error:  # bits beyond the length
        raise RefusedError(422, str(error)) from error


def _code(given: Any, bits: int, name: str = "codes") -> bytes:
    nbytes = -(-bits // 8)
    code = b""
    try:
        if isinstance(given, str):  # hex and base64 are of one length for 2 and 4 bytes, where base64 ends in =
            hexed = len(given) == 2 * nbytes and not given.endswith("=")
            code = bytes.fromhex(given) if hexed else binascii.a2b_base64(given, strict_mode=True)
        elif isinstance(given, list) and not any(isinstance(x, bool) for x in given):
            code = bytes(given)
    except (ValueError, TypeError):
        code = b""
    if len(code) != nbytes:
        seen = f"{len(given)} {'characters' if isinstance(given, str) else 'entries'}, " if _sized(given) else ""
        raise RefusedError(
            422,
            f"{name}: expected a packed code of {bits} bits, as {2 * nbytes} hex digits, base64 or a list of {nbytes} "
            f"bytes from 0 to 255, got {seen}{given!r:.40}",
        )
    return code


def _sized(given: Any) -> bool:
    return isinstance(given, str | list)


def check_size(queries: int, k: int) -> None:
    """RefusedError 422 for more hits than a response shall hold."""
    if queries * k > MOST_HITS:
        raise RefusedError(422, f"expected at most {MOST_HITS} hits in a response, got {queries} queries of k = {k}")
