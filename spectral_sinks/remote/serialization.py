"""Jobs as bytes: a function of this package and its arguments are sent, its result and the server's facts
return.

Jobs are kept small. Classes and functions of the package are sent by name, since its sources are sent too. A
user's own functions are sent as source. The model is sent as a reference to the server's. A tensor is sent
without the storage that it is a view of. A subspace is sent as the columns of its spectrum that it stores,
each column once for all subspaces of the job, or as the seed from which it was drawn.
"""

import hashlib
import importlib
import inspect
import io
import json
import pickle
import platform
import re
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, is_dataclass
from functools import cache
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, TypeVar

import lazy_loader
import torch
from nnsight.intervention.serialization import CustomCloudPickler
from torch import Tensor

from spectral_sinks.errors import InputError
from spectral_sinks.models.attention_capture import AttentionHook, attending
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.models.layout import Layout
from spectral_sinks.spectra.filters import Mean
from spectral_sinks.spectra.spectrum import Spectrum
from spectral_sinks.spectra.subspace import Subspace, random_subspace

T = TypeVar("T")

PACKAGE = Path(__file__).parents[1]
ROOMS = (
    "__init__.py",
    "errors.py",
    "files.py",
    "stats.py",
    "spectra",
    "models",
    "data",
    "remote",
    "interventions",
    "measure",
)
"""What a measurement may need at the server."""


SENT = "_spectral_sinks_sent"
"""Attribute of a function that is called where the model is. It is itself, so that no wrapper inherits it."""

RENAMED = {
    ("spectral_sinks.measure.replay", "Measured"): ("spectral_sinks.measure.nll.replay", "BatchResult"),
}
"""Old names of classes, for jobs that were sent under them and still wait at a server."""

DRAWN = re.compile(r"random (\d+) (\d+) (\d+)")
"""The `source` of a random subspace: width, rank, seed."""


@cache
def sources() -> tuple[bytes, str]:
    """Return the package's sources, as compressed JSON by module name, and their digest."""
    files = [
        file
        for room in ROOMS
        for file in ([PACKAGE / room] if room.endswith(".py") else sorted((PACKAGE / room).rglob("*.py")))
    ]
    names = [".".join(["spectral_sinks", *file.relative_to(PACKAGE).with_suffix("").parts]) for file in files]
    texts = {
        name.removesuffix(".__init__"): file.read_text("utf-8")
        for name, file in zip(names, files, strict=True)
    }
    texts["lazy_loader"] = inspect.getsource(lazy_loader)  # the package's faces need it, a server lacks it
    raw = json.dumps(texts, sort_keys=True).encode()
    return zlib.compress(raw, 9), hashlib.sha256(raw).hexdigest()[:12]


@cache
def bootstrap_source() -> str:
    """Return the source that the server executes first."""
    return Path(__file__).with_name("bootstrap.py").read_text("utf-8")


@dataclass(frozen=True, eq=False)
class Columns:
    """Columns of a spectrum, and the index of each of its directions among them."""

    vectors: Tensor
    place: Tensor

    def subspace(self, stored: Tensor, name: str, complemented: bool, dtype: str) -> Subspace:
        basis = self.vectors[:, self.place[stored]].to(getattr(torch, dtype))
        return Subspace(basis, name, complemented)


class Packer(CustomCloudPickler):
    """Pickles a job or a result; `factors` is the dtype in which bases and singular vectors are sent."""

    def __init__(
        self,
        file: Any,
        factors: torch.dtype | None,
        columns: dict[str, Columns | Tensor],
        model: LanguageModel | None,
    ) -> None:
        super().__init__(file, protocol=4)
        self._factors, self._columns, self._model = factors, columns, model
        self._parts = set() if model is None else {id(part) for part in model.module.modules()}

    def persistent_id(self, obj: Any) -> Any:
        if id(obj) in self._parts:
            raise InputError(
                f"a {type(obj).__name__} is a part of the model and stays where that is: take it from the "
                "model that the function is given"
            )
        if not isinstance(obj, LanguageModel):
            return None
        if self._model is not None and obj.nn is not self._model.nn:
            raise InputError(
                f"{obj.name} is another model than {self._model.name}, and a job has the model that it is "
                "sent to alone: call the function for each"
            )
        return "model"

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, type | FunctionType) and _named(obj):
            return NotImplemented
        if isinstance(obj, FunctionType) and vars(obj).get(SENT) is obj:
            return _itself, (vars(obj)["__wrapped__"],)
        if isinstance(obj, FunctionType) and _checked(obj):
            return _itself, (vars(obj)["__wrapped__"],)  # the server has no type checker
        if isinstance(obj, ModuleType) and obj.__name__.partition(".")[0] == "spectral_sinks":
            return importlib.import_module, (obj.__name__,)
        if isinstance(obj, Tensor):
            plain = obj.detach().cpu().resolve_conj().resolve_neg().contiguous()
            raw = plain.flatten().view(torch.uint8).numpy().tobytes()
            return tensor, (raw, str(obj.dtype).removeprefix("torch."), tuple(obj.shape))
        if isinstance(obj, Subspace):
            return self._subspace(obj)
        if isinstance(obj, Mean) and self._factors is not None:  # used in float32 at least
            kind = torch.promote_types(self._factors, torch.float32)
            return Mean, (obj.reference.to(kind), obj.source)
        if isinstance(obj, Spectrum) and self._factors is not None:
            fields = (obj.values, obj.matrix, obj.convention, obj.tied, obj.fingerprint, obj.count)
            return _spectrum, (obj.vectors.to(self._factors), *fields)
        return super().reducer_override(obj)

    def _dynamic_function_reduce(self, func: FunctionType) -> Any:
        made, (*args, _, file, line), *rest = super()._dynamic_function_reduce(func)
        return made, (*args, None, file, line), *rest  # annotations may name what the server lacks

    def _subspace(self, space: Subspace) -> Any:
        if drawn := DRAWN.fullmatch(space.source):
            return _random, (*map(int, drawn.groups()), space.name, space.complemented)
        if self._factors is None or space.members is None or space.spectrum is None:
            basis = space.basis if self._factors is None else space.basis.to(self._factors)
            return Subspace, (basis, space.name, space.complemented)
        fingerprint, vectors = space.spectrum
        stored = space.members ^ space.complemented
        key = fingerprint or str(id(vectors))
        found = self._columns.get(key)
        if isinstance(found, Columns):
            dtype = str(self._factors).removeprefix("torch.")
            return _of_columns, (found, stored, space.name, space.complemented, dtype)
        self._columns[key] = stored if found is None else stored | found
        self._vectors = getattr(self, "_vectors", {}) | {key: vectors}
        return Subspace, (torch.empty(space.d, 0), space.name, space.complemented)

    def seen(self) -> dict[str, Columns | Tensor]:
        """After a first pass, return the columns that the subspaces of the job need, each once."""
        assert self._factors is not None
        found: dict[str, Columns | Tensor] = {}
        for key, needed in self._columns.items():
            assert isinstance(needed, Tensor)
            place = needed.cumsum(0) - 1
            vectors: Tensor = self._vectors[key]
            found[key] = Columns(vectors[:, needed].to(self._factors), place.to(torch.int32))
        return found


class AnswerPacker(Packer):
    """Pickles an answer, in which an instance of a user's dataclass is its name and its fields, not code."""

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if is_dataclass(kind) and not _named(kind):
            return own, (kind.__module__, kind.__qualname__, dict(vars(obj)))
        return super().reducer_override(obj)


def pack(
    value: Any,
    factors: torch.dtype | None = None,
    model: LanguageModel | None = None,
    packer: type[Packer] = Packer,
) -> bytes:
    """Return a value as bytes, with a reference for the model. Raises InputError for what cannot be sent."""
    columns: dict[str, Columns | Tensor] = {}
    try:
        if factors is not None:
            first = packer(io.BytesIO(), factors, columns, model)
            first.dump(value)
            columns = first.seen() if columns else {}
        buffer = io.BytesIO()
        packer(buffer, factors, columns, model).dump(value)
    except InputError:
        raise
    except (pickle.PicklingError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"this cannot be sent to a server or back ({error}): functions of yours, and what they return, "
            "must not hold locks, files or a bare super()"
        ) from error
    return buffer.getvalue()


def unpack(data: bytes, model: Any = None) -> Any:
    """At the server, return the job that was packed, with `model` in place of the reference.

    This runs code of the job. A client reads the answers of a server by `answers.read_answer`.
    """

    class Unpacker(pickle.Unpickler):
        def persistent_load(self, pid: Any) -> Any:
            return model

        def find_class(self, module_name: str, global_name: str) -> Any:
            return super().find_class(*RENAMED.get((module_name, global_name), (module_name, global_name)))

    return Unpacker(io.BytesIO(data)).load()


@dataclass(frozen=True)
class Job:
    """A function of a model, to be called where the model is."""

    layout: Layout
    name: str
    factors: torch.dtype
    call: bytes
    """The function, its positional and named arguments, and the attention hooks around the call, packed."""


def serve(nn: Any, job: bytes) -> bytes:
    """Do a job on the nnsight model of this process; return its result or its refusal, and the facts."""
    given: Job = unpack(job)
    model = LanguageModel(nn, given.layout, given.name, getattr(nn, "tokenizer", None))
    function, args, options, hooks = unpack(given.call, model)
    try:
        value = _under(model, hooks, lambda: function(model, *args, **options))
        return pack(("result", value, facts(model)), model=model, packer=AnswerPacker)
    except InputError as error:
        return pack(("refused", str(error), facts(model)))


def _under(model: LanguageModel, hooks: Sequence[AttentionHook], run: Callable[[], T]) -> T:
    """Run inside `attending`. Raises InputError if a hook has collected anything, which nobody would get."""
    before = [pack(look, model=model) for look in hooks]
    with ExitStack() as stack:
        for look in hooks:
            stack.enter_context(attending(model, look))
        value = run()
    for look, state in zip(hooks, before, strict=True):
        if pack(look, model=model) != state:
            raise InputError(
                f"{getattr(look, '__qualname__', type(look).__name__)} is changed by what it sees in "
                f"`attending` (it collects, caches or draws), and that would stay with {model.name}, which "
                "runs elsewhere: put both into a function of the model that returns what is wanted, and "
                "decorate that with `remotely`"
            )
    return value


def facts(model: LanguageModel) -> dict[str, Any]:
    """Return the library versions and settings of the process in which the model runs."""
    import nnsight
    import transformers

    return {
        "python": platform.python_version(),
        "nnsight": nnsight.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "attention": model.config._attn_implementation,
        "commit": getattr(model.module.config, "_commit_hash", None),
    }


def tensor(raw: bytes, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """Make a tensor from its bytes."""
    kind = getattr(torch, dtype)
    flat = torch.frombuffer(bytearray(raw), dtype=kind) if raw else torch.empty(0, dtype=kind)
    return flat.reshape(shape)


def own(module: str, name: str, fields: dict[str, Any]) -> Any:
    """Name an instance of a user's dataclass in an answer; `answers` reads it."""
    raise NotImplementedError(f"{module}.{name} is read by remote.answers alone")


def _of_columns(columns: Columns, stored: Tensor, name: str, complemented: bool, dtype: str) -> Subspace:
    return columns.subspace(stored, name, complemented, dtype)


def _random(d: int, rank: int, seed: int, name: str, complemented: bool) -> Subspace:
    drawn = random_subspace(d, rank, seed)
    return (drawn if drawn.complemented == complemented else drawn.complement()).named(name)


def _spectrum(vectors: Tensor, *fields: Any) -> Spectrum:
    return Spectrum(vectors, *fields)


def _checked(function: FunctionType) -> bool:
    """Return whether a check of types, which tests install, stands around a function of this package."""
    ours = (function.__module__ or "").startswith("spectral_sinks.")
    return ours and "__wrapped__" in vars(function) and vars(function).get(SENT) is not function


def _itself(value: T) -> T:
    return value


def _named(obj: Any) -> bool:
    """Whether the server finds a class or function of the package by its name."""
    module, name = getattr(obj, "__module__", "") or "", obj.__qualname__
    return module.partition(".")[0] == "spectral_sinks" and "<" not in name
