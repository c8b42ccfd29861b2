"""Where a model is when it is not here, and the jobs that were sent there."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from nnsight.schema.config import CONFIG

from spectral_sinks.errors import InputError

To = Literal[False, True, "local"] | str
"""Where traces run: False in this process, True at the server that nnsight is configured for, "local" in a
rehearsal of it, or the address of another server."""


@dataclass(frozen=True)
class Sent:
    """A job that was sent: what is needed to ask for it, and what it cost."""

    id: str
    host: str
    payload: int
    """Bytes sent."""
    submitted: float
    """Seconds since 1970."""
    seconds: float | None = None
    """Until its result was here; None for one that was not waited for."""
    received: int | None = None
    """Bytes of its result."""


@dataclass
class Remote:
    """Where a model's traces run, what was found out about it, and the jobs so far."""

    to: To
    commit: str | None = None
    """The commit of the checkpoint that the configuration was read from."""
    factors: torch.dtype | None = None
    """Dtype in which bases travel; that of the model where None."""
    dtype: torch.dtype | None = None
    """Dtype that was asked for; the server's own where None."""
    examined: dict[str, Any] | None = None
    """What a pass of one token showed; None before it."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the far end said of itself with its last result."""
    jobs: list[Sent] = field(default_factory=list)
    looks: tuple[Callable[..., Any], ...] = ()
    """What acts on attention there (`attending`), the outermost first."""

    @contextmanager
    def under(self, *looks: Callable[..., Any]) -> Iterator[None]:
        """Inside the block every job goes with these looks beside those around them."""
        before = self.looks
        self.looks = (*before, *looks)
        try:
            yield
        finally:
            self.looks = before

    @property
    def host(self) -> str:
        if self.to == "local":
            return "local rehearsal"
        return self.to if isinstance(self.to, str) else CONFIG.API.HOST

    def record(self) -> dict[str, Any]:
        """For manifests and results: where it ran, versions and settings there, and the jobs."""
        return {
            "host": self.host,
            "commit": self.commit,
            "server": {**(self.examined or {}), **self.facts},
            "jobs": [job.id for job in self.jobs],
            "bytes_sent": sum(job.payload for job in self.jobs),
            "bytes_received": sum(job.received or 0 for job in self.jobs),
        }


def remote_state(to: To, commit: str | None, factors: str | None, dtype: Any = "auto") -> Remote | None:
    """What `load(remote=...)` says. Raises InputError for what is no place, and for an unknown dtype."""
    if to is False:
        return None
    if to is not True and to != "local" and not str(to).startswith(("http://", "https://")):
        raise InputError(f"remote={to!r}: expected True for NDIF, 'local' for its rehearsal, or an address")
    kind = None if factors is None else getattr(torch, factors, None)
    if factors is not None and not (isinstance(kind, torch.dtype) and kind.is_floating_point):
        raise InputError(f"factors {factors!r}: expected a dtype such as float32 or bfloat16")
    asked = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    return Remote(to, commit, kind, None if asked == "auto" else asked)
