"""Measurements of a running model, in rooms: each imports itself and lower ones only."""

# pyright: basic
# lazy_loader has no types
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submodules=["attention", "circuits", "nll", "residual", "sinks", "vision"]
)
