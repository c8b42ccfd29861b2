"""The state of a remote model: its server, what is known about it, and the jobs sent so far."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from nnsight.schema.config import CONFIG

from spectral_sinks.errors import InputError

To = Literal[False, True, "local"] | str
"""Where traces run: False for this process, True for the server that nnsight is configured for, "local" for a
rehearsal of it, or the URL of another server.
"""


@dataclass(frozen=True)
class Sent:
    """A job that was sent: its identification and its cost."""

    id: str
    host: str
    payload: int
    """Number of bytes sent."""
    submitted: float
    """Time of submission, in seconds since 1970."""
    seconds: float | None = None
    """Seconds until its result arrived; None for a job that was not waited for."""
    received: int | None = None
    """Number of bytes of its result."""


@dataclass
class Remote:
    """Where a model's traces run, what is known about it there, and the jobs so far."""

    to: To
    commit: str | None = None
    """The commit of the checkpoint from which the configuration was read."""
    factors: torch.dtype | None = None
    """Dtype in which bases are sent; None for the model's dtype."""
    dtype: torch.dtype | None = None
    """The dtype that was asked for; None for the server's own."""
    examined: dict[str, Any] | None = None
    """What a pass of one token showed about the server's model; None before that pass."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the server reported about itself with its last result."""
    jobs: list[Sent] = field(default_factory=list)
    hooks: tuple[Callable[..., Any], ...] = ()
    """The attention hooks (`attending`) that run on the server, the outermost first."""

    @contextmanager
    def under(self, *hooks: Callable[..., Any]) -> Iterator[None]:
        """Send these attention hooks with every job inside the block, after the hooks of enclosing blocks."""
        before = self.hooks
        self.hooks = (*before, *hooks)
        try:
            yield
        finally:
            self.hooks = before

    @property
    def host(self) -> str:
        if self.to == "local":
            return "local rehearsal"
        return self.to if isinstance(self.to, str) else CONFIG.API.HOST

    def record(self) -> dict[str, Any]:
        """Return a record for manifests and results: host, versions and settings there, and jobs."""
        return {
            "host": self.host,
            "commit": self.commit,
            "server": {**(self.examined or {}), **self.facts},
            "jobs": [job.id for job in self.jobs],
            "bytes_sent": sum(job.payload for job in self.jobs),
            "bytes_received": sum(job.received or 0 for job in self.jobs),
        }


def remote_state(to: To, commit: str | None, factors: str | None, dtype: Any = "auto") -> Remote | None:
    """Return the state for the argument `remote` of `load`; None for this process.

    Raises InputError for a value of `to` that names no location, and for an unknown dtype of the bases.
    """
    if to is False:
        return None
    if to is not True and to != "local" and not str(to).startswith(("http://", "https://")):
        raise InputError(f"remote={to!r}: expected True for NDIF, 'local' for its rehearsal, or an address")
    kind = None if factors is None else getattr(torch, factors, None)
    if factors is not None and not (isinstance(kind, torch.dtype) and kind.is_floating_point):
        raise InputError(f"factors {factors!r}: expected a dtype such as float32 or bfloat16")
    asked = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    return Remote(to, commit, kind, None if asked == "auto" else asked)
