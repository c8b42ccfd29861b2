"""Numbers that pages state, and the tables that hold them: pages that check themselves."""

# pyright: basic
# lazy_loader has no types
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"claims": ["Claims"], "verify": ["Check", "uncovered", "verify"]}
)
