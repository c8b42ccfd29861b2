"""A description of a checkpoint in a process that never imports torch.

transformers reads configurations and tokenizers where torch is not installed. Where it is, each configuration
imports torch, which takes more time than everything else that a description needs.
"""

import ast
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

from spectral_sinks.errors import InputError
from spectral_sinks.files import GGUF, expanded

CODE = (
    "import sys; sys.path[:] = sys.argv[1:]; "
    "from spectral_sinks.models import without_torch; without_torch.print_description()"
)
"""What the process runs; its arguments are the import path of this one."""


def describe_without_torch(
    model: str | Path, *, revision: str | None = None, gguf_file: str | None = None
) -> dict[str, Any] | None:
    """Return what `describe` returns, from another process; None if torch is needed to tell.

    It is needed for GGUF files, and wherever transformers refuses the configuration or the tokenizer or a
    library warns, so that `describe` gives the reason. Raises InputError as `describe` does.
    """
    path = expanded(str(model))
    if gguf_file is not None or path.suffix == GGUF or (path.is_dir() and any(path.glob(f"*{GGUF}"))):
        return None
    ran = subprocess.run(
        [sys.executable, "-P", "-c", CODE, *sys.path],
        input=ascii({"model": str(model), "revision": revision}),
        env=os.environ | {"TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"},  # one of which says to install torch
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode != 0:
        return None
    sys.stderr.write(ran.stderr)
    told = ast.literal_eval(ran.stdout.splitlines()[-1])
    if isinstance(told, str):
        raise InputError(told)
    return told


def print_description() -> None:
    """Describe the checkpoint that standard input names, and print the result as a Python literal.

    Where the checkpoint is refused for a reason that has nothing to do with torch, the reason is printed. Any
    other error ends the process, and so does a warning.
    """
    sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]  # as if it were not installed
    from transformers.utils.import_utils import is_torch_available

    is_torch_available()  # which transformers keeps
    del sys.modules["torch"]  # two matrices may have to be compared
    from spectral_sinks.models.configuration import UnreadableError
    from spectral_sinks.models.describe import describe

    for shown in (UserWarning, FutureWarning, RuntimeWarning):
        warnings.simplefilter("error", shown)
    told: Any
    try:
        told = describe(**ast.literal_eval(sys.stdin.read()))
    except UnreadableError:
        raise
    except InputError as error:
        told = str(error)
    print(ascii(told))
