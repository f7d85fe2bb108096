"""HTTP replies of the local web server: JSON, JSON followed by binary arrays, or a file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from werkzeug.wrappers import Response

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Download", "Numbers", "build_response"]


@dataclass(frozen=True)
class Numbers:
    """A reply that contains a JSON object and numeric arrays.

    The arrays are sent as 64-bit floats, because JSON would be slow for a curve of 100,000 steps.
    """

    header: Mapping[str, Any]
    arrays: Sequence[NDArray[np.float64]] = field(default_factory=list)


@dataclass(frozen=True)
class Download:
    """A file for the user to save."""

    name: str
    media_type: str
    data: bytes


def build_response(reply: Mapping[str, Any] | Numbers | Download) -> Response:
    """Convert a reply to an HTTP response."""
    if isinstance(reply, Download):
        response = Response(reply.data, mimetype=reply.media_type)
        response.headers.set("Content-Disposition", "attachment", filename=reply.name)
        return response
    if isinstance(reply, Numbers):
        return Response(_encode(reply), mimetype="application/octet-stream")
    return Response(_format_json(reply), mimetype="application/json")


def _encode(reply: Numbers) -> bytes:
    """Encode a reply as bytes: the length of the JSON text, the text, and the numbers.

    The text is padded so that the offset of the numbers is a multiple of 8 bytes.
    """
    lengths = [len(array) for array in reply.arrays]
    text = _format_json({**reply.header, "lengths": lengths}).encode()
    text += b" " * (-(len(text) + 4) % 8)
    numbers = b"".join(array.astype("<f8").tobytes() for array in reply.arrays)
    return len(text).to_bytes(4, "little") + text + numbers


def _format_json(value: Any) -> str:
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(_replace_nonfinite(value), allow_nan=False)


def _replace_nonfinite(value: Any) -> Any:
    """Replace NaN and infinity, which are not valid JSON, with None."""
    if isinstance(value, Mapping):
        return {key: _replace_nonfinite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_nonfinite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
