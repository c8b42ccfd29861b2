"""The check of annotations at run time, which pyproject.toml names to the plugin of jaxtyping."""

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

# an int passes for a float, as for type checkers (PEP 484)
_check: Callable[[Any], Any] = beartype(conf=BeartypeConf(is_pep484_tower=True))
_made: dict[Any, Callable[..., Any]] = {}


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with a check of its arguments and of what it returns.

    jaxtyping passes an empty function with the signature of the one that it checks, and does so again each
    time that a function within another is defined. To make a check takes milliseconds, which was a quarter of
    the time of all tests; one is therefore kept for each signature.

    Of a function whose result is checked, jaxtyping passes two: one that returns anything is called first,
    and one that has the result as one more argument and returns it. The second need not check the others.
    """
    if (result := function.__annotations__.get("return", Any)) is not Any:
        function.__annotations__ = {"return": result}
    code = function.__code__
    if function.__defaults__ or function.__kwdefaults__:
        return _check(function)
    names = (function.__module__, function.__qualname__, code.co_varnames)
    kinds = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
    key = (*names, *kinds, *function.__annotations__.items())
    try:
        found = _made.get(key)
    except TypeError:  # an annotation without a hash
        return _check(function)
    if found is None:
        found = _made[key] = _check(function)
    return found
