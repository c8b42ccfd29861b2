"""Numbers inside a page: rounded to 8 or 16 bits, compressed, and written as text."""

import base64
import gzip
import json
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Bits = Literal[8, 16]


@dataclass(frozen=True)
class Coded:
    """An array of numbers as text: its values are `low + step * code`, and the largest code stands for NaN.

    With `log`, the values are the exponentials of these.
    """

    data: str
    """The codes, compressed by gzip, in base64."""
    bits: Bits
    shape: tuple[int, ...]
    low: float
    step: float
    log: bool

    def json(self) -> dict[str, Any]:
        """Return the fields as a dictionary that JSON can hold."""
        return {**vars(self), "shape": list(self.shape)}


def as_codes(
    values: NDArray[Any], bits: Bits, *, within: tuple[float, float] | None = None, log: bool = False
) -> Coded:
    """Round an array to equal steps and compress it.

    Args:
        values: the numbers; those that are not finite become NaN.
        bits: 8 or 16 bits for each number.
        within: the range that the steps divide; by default that of the values.
        log: whether the steps divide the logarithm of the values, which are positive then.

    """
    numbers = np.asarray(values, dtype=np.float64)
    if log:
        with np.errstate(divide="ignore", invalid="ignore"):
            numbers = np.log(numbers)
    finite = np.isfinite(numbers)
    missing = 2**bits - 1
    some = bool(finite.any())
    low, high = within or ((numbers[finite].min(), numbers[finite].max()) if some else (0.0, 0.0))
    step = (float(high) - float(low)) / (missing - 1)
    scaled = (numbers - low) / step if step > 0 else np.zeros_like(numbers)
    codes = np.where(finite, np.clip(np.rint(np.where(finite, scaled, 0)), 0, missing - 1), missing)
    stored = codes.astype(f"<u{bits // 8}").tobytes()
    # without the time, so that one model and text always give one page
    data = base64.b64encode(gzip.compress(stored, 6, mtime=0)).decode()
    return Coded(data, bits, tuple(numbers.shape), float(low), step, log)


def from_codes(coded: Coded) -> NDArray[np.float64]:
    """Return the numbers of a coded array, as a page reads them."""
    codes = np.frombuffer(gzip.decompress(base64.b64decode(coded.data)), f"<u{coded.bits // 8}")
    values = coded.low + coded.step * codes.astype(np.float64)
    values = np.exp(values) if coded.log else values
    return np.where(codes == 2**coded.bits - 1, np.nan, values).reshape(coded.shape)


def inside_script(value: Any) -> str:
    """Return JSON that may stand in a script element: no text in it can end the element or open a comment.

    Numbers that are not finite become null.
    """
    text = json.dumps(_finite(value), separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _finite(value: Any) -> Any:
    if isinstance(value, Coded):
        return value.json()
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, np.ndarray):
        return _finite(value.tolist())
    if isinstance(value, np.generic):
        return _finite(value.item())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
