"""The cells of a sweep: sites x filters x fills x tokens x draws."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from spectral_sinks.data.texts import Windows
from spectral_sinks.errors import InputError
from spectral_sinks.interventions.sites import Site
from spectral_sinks.interventions.tracing import Interventions
from spectral_sinks.measure.residual.references import mean_residuals
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.spectra.cache import fingerprint
from spectral_sinks.spectra.filters import (
    At,
    Fill,
    Filter,
    Mean,
    Noise,
    Swap,
    Tokens,
    Zero,
    keep,
    omega,
    phi,
    psi,
    remove,
    rnd,
)
from spectral_sinks.spectra.spectrum import Spectrum
from spectral_sinks.sweeps.content_address import digest, of_rows

FillName = Literal["zero", "mean", "swap", "noise"]
Rung = Literal["phi", "psi", "omega"]


@dataclass(frozen=True, eq=False)
class Cell:
    """Interventions to measure, under a name that no other cell of the sweep has."""

    name: str
    edits: Interventions
    draw: int | None = None
    """Number of the random draw; None where nothing is drawn."""


def grid(
    model: LanguageModel,
    windows: Windows,
    spectrum: Spectrum,
    embedding: Spectrum | None = None,
    *,
    sites: Iterable[str] = ("exit",),
    layers: Sequence[int | Sequence[int]] | None = None,
    keep: Iterable[str] = (),
    remove: Iterable[str] = (),
    ladder: Iterable[Rung] = (),
    kept: Sequence[int] | None = None,
    fills: Sequence[FillName] = ("zero",),
    tokens: Sequence[Tokens] = ("all",),
    controls: int = 0,
) -> list[Cell]:
    """Return every combination of sites, filters, fills and tokens as cells.

    Args:
        model: a language model.
        windows: the text, for the fill "mean".
        spectrum: the spectrum whose bands are kept or removed.
        embedding: the second spectrum of Psi.
        sites: kinds of sites as `Site.parse` reads them.
        layers: the layers of each kind, all by default; several layers in one entry are filtered at once.
        keep: specifications of the bands to keep.
        remove: specifications of the bands to remove.
        ladder: names of filters ("phi", "psi", reading u-e, and "omega") with each number of bands in `kept`.
        kept: the numbers of bands kept on the ladder; 1 to all by default.
        fills: "zero", "mean" (by position, over the windows), "swap" or "noise" (seed 0).
        tokens: which tokens the filters act on.
        controls: random subspaces of the rank of each filter, seeds 0, 1, ..., with the same fill and tokens.

    Raises:
        InputError: for sites, bands and layers that do not exist, and for an empty grid.

    """
    filters = _filters(spectrum, embedding, keep, remove, ladder, kept)
    chosen_layers = range(model.layers) if layers is None else layers
    entries = [entry if isinstance(entry, Sequence) else (entry,) for entry in chosen_layers]
    site_groups: list[tuple[Site, ...]] = []
    for kind in sites:
        layered = [(0,)] if kind == "embedding" else entries
        site_groups += [tuple(dict.fromkeys(Site.parse(kind, layer) for layer in entry)) for entry in layered]
    at_once = {site for group in site_groups for site in group}
    for site in at_once:
        site.check(model)
    for name in fills:
        if name not in get_args(FillName):
            raise InputError(f"fill {name!r}: choose from {', '.join(get_args(FillName))}")
    if not (site_groups and all(site_groups) and fills and tokens):
        raise InputError("an empty grid: give at least one site, layer, fill and choice of tokens")
    means: dict[Site, Fill] = {}
    if "mean" in fills:
        references = mean_residuals(model, windows, sorted(at_once, key=lambda site: site.rank))
        source = f"{model.fingerprint} {of_rows(windows)}"
        means = {site: Mean(mean, digest(f"{source} {site}")) for site, mean in references.items()}
    plain: dict[str, Callable[[], Fill]] = {"zero": Zero, "swap": Swap, "noise": Noise}
    random: dict[tuple[int, int], Filter] = {}

    def blocks(chosen: Filter) -> Iterator[tuple[int | None, Filter]]:
        yield None, chosen
        for draw in range(controls if 0 < chosen.rank < spectrum.d else 0):
            key = chosen.rank, draw
            if key not in random:
                random[key] = rnd(spectrum.d, *key)
            yield draw, random[key]

    cells: dict[str, Cell] = {}
    for group, fill, which in itertools.product(site_groups, fills, tokens):
        for draw, block in itertools.chain.from_iterable(map(blocks, filters)):
            name = f"{' + '.join(map(str, group))}: {block.name}{_suffix(fill, which)}"
            if name not in cells:
                fillings = {site: means[site] if fill == "mean" else plain[fill]() for site in group}
                edits = {site: block.filled(filling).at(which) for site, filling in fillings.items()}
                cells[name] = Cell(name, edits, draw)
    return list(cells.values())


def named(cells: Mapping[str, Interventions] | Iterable[Cell]) -> list[Cell]:
    """Return cells, made from interventions by name. Raises InputError for none, and for a name twice."""
    if isinstance(cells, Mapping):
        listed = [Cell(str(name), edits) for name, edits in cells.items()]
    else:
        listed = list(cells)
    if not listed:
        raise InputError("a sweep without cells: give at least one")
    if twice := [name for name, count in Counter(cell.name for cell in listed).items() if count > 1]:
        raise InputError(f"{len(twice)} names of cells occur more than once, such as {twice[0]!r}")
    return listed


def _filters(
    spectrum: Spectrum,
    embedding: Spectrum | None,
    kept_specs: Iterable[str],
    removed_specs: Iterable[str],
    ladder: Iterable[Rung],
    kept: Sequence[int] | None,
) -> list[Filter]:
    filters = [keep(spectrum.subspace(spec)) for spec in kept_specs]
    filters += [remove(spectrum.subspace(spec)) for spec in removed_specs]
    for rung in ladder:
        if rung not in get_args(Rung):
            raise InputError(f"ladder {rung!r}: choose from {', '.join(get_args(Rung))}")
        for k in range(1, spectrum.count + 1) if kept is None else kept:
            if rung == "phi":
                filters.append(phi(spectrum, 1, k))
            elif rung == "omega" and k < spectrum.count:
                filters.append(omega(spectrum, k))
            elif rung == "psi":
                if embedding is None:
                    raise InputError("Psi needs the spectrum of the embedding as well")
                filters.append(psi(spectrum, embedding, k))
    if not filters:
        raise InputError("a grid without filters: give keep, remove or ladder")
    return filters


def _suffix(fill: str, tokens: Tokens) -> str:
    if isinstance(tokens, Tensor):
        where = f"mask {fingerprint(tokens, None, 'mask')[:8]}"
    elif isinstance(tokens, At):
        where = f"at {' '.join(map(str, tokens.positions))}"
    else:
        where = tokens if isinstance(tokens, str) else f"tokens {' '.join(map(str, sorted(tokens)))}"
    return ("" if fill == "zero" else f", {fill}") + ("" if where == "all" else f", {where}")
