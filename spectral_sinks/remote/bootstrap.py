"""The code that runs on the server: it unpacks the package, calls a function of it, and packs the result.

A server has nnsight, torch, numpy and transformers, but not this package, and its Python may differ from the
client's, so bytecode cannot be sent. This file is sent as text and executed there. It imports nothing of the
package until the package's sources, which are sent with it, can be found.
"""

import importlib.abc
import importlib.util
import json
import linecache
import sys
import types
import zlib

PACKAGE = "spectral_sinks"

OPTIONAL = ("datasets", "jaxtyping", "pandas", "psutil", "pyarrow", "scipy")
"""Libraries that the sources import and a server may lack; they are used only on the client or in
annotations.
"""


class Placeholder:
    """A name from a missing library, which can only be used in annotations."""

    def __init__(self, name):
        self._name = name

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Placeholder(f"{self._name}.{name}")

    def __getitem__(self, _):
        return self

    def __or__(self, _):
        return self

    __ror__ = __or__

    def __call__(self, *args, **options):
        raise ModuleNotFoundError(f"{self._name} was called, and the server does not have it")


class Absent(types.ModuleType):
    """A missing library."""

    def __init__(self, name):
        super().__init__(name)
        self.__path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Placeholder(f"{self.__name__}.{name}")


class Sources(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the package from source texts by module name, and replaces missing libraries."""

    def __init__(self, texts, digest):
        self.texts, self.digest = texts, digest
        self.lacking = {name for name in OPTIONAL if name not in sys.modules and not _installed(name)}
        self.made = set()

    def find_spec(self, name, path=None, target=None):
        package = any(other.startswith(f"{name}.") for other in self.texts)
        if name in self.texts or package:
            return importlib.util.spec_from_loader(name, self, is_package=package)
        if name.partition(".")[0] in self.lacking:
            return importlib.util.spec_from_loader(name, self, is_package=True)
        if name.startswith(f"{PACKAGE}."):  # a client's own part of the package
            raise ModuleNotFoundError(f"{name} does not run at the server: call it at the client", name=name)
        return None

    def create_module(self, spec):
        self.made.add(spec.name)
        return Absent(spec.name) if spec.name.partition(".")[0] in self.lacking else None

    def exec_module(self, module):
        text = self.texts.get(module.__name__)
        if text is None:
            return
        # nnsight reads the source of a trace through linecache; the digest keeps versions apart
        file = f"<{module.__name__} {self.digest}>"
        linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
        module.__file__ = f"/{module.__name__.replace('.', '/')}.py"  # where there is nothing
        exec(compile(text, file, "exec"), module.__dict__)


def _installed(name):
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _registries():
    """Return transformers' registries of attention implementations, to which the sources add their own."""
    from transformers import AttentionInterface, AttentionMaskInterface

    return [kind._global_mapping for kind in (AttentionInterface, AttentionMaskInterface)]


def _classes():
    """Return cloudpickle's registries of classes made from a user's sources, which have other bases in
    another job.
    """
    from cloudpickle import cloudpickle

    return [cloudpickle._DYNAMIC_CLASS_TRACKER_BY_ID, cloudpickle._DYNAMIC_CLASS_TRACKER_BY_CLASS]


def run_job(nn, sources, digest, job):
    """Run a packed job on the nnsight model of this process, undo all other changes, and return the packed
    outcome.
    """
    ours = [name for name in sys.modules if name.partition(".")[0] == PACKAGE]
    before = {name: sys.modules.pop(name) for name in ours}
    finder = Sources(json.loads(zlib.decompress(sources)), digest)
    sys.meta_path.insert(0, finder)
    registries = [*_registries(), *_classes()]
    registered = [dict(registry) for registry in registries]
    for classes in _classes():
        classes.clear()
    try:
        return importlib.import_module(f"{PACKAGE}.remote.serialization").serve(nn, job)
    finally:
        sys.meta_path.remove(finder)
        for registry, entries in zip(registries, registered, strict=True):
            registry.clear()
            registry.update(entries)
        for name in [*finder.made, *sys.modules]:
            if name in finder.made or name.partition(".")[0] == PACKAGE:
                sys.modules.pop(name, None)
        sys.modules.update(before)
