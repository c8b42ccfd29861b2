"""Rules that mark sink tokens in other texts: learned on a sample, stored in a folder, read back."""

import hashlib
import json
import weakref
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save as tensor_bytes
from torch import Tensor

from spectral_sinks.data.texts import Windows
from spectral_sinks.errors import InputError
from spectral_sinks.files import atomic_write, clearly, read_regular
from spectral_sinks.interventions.sites import Site
from spectral_sinks.interventions.tracing import trace
from spectral_sinks.measure.memory import batches
from spectral_sinks.measure.residual.band_energy import residual_sites
from spectral_sinks.measure.residual.massive import high_norm_cutoff, robust_levels
from spectral_sinks.measure.residual.matrix_spectrum import by_convention
from spectral_sinks.measure.results import Result
from spectral_sinks.measure.sinks.find import Sinks
from spectral_sinks.measure.sinks.rule import as_batch, counted, marked
from spectral_sinks.models.base import Transformer
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.spectra.spectrum import Spectrum
from spectral_sinks.spectra.subspace import Subspace
from spectral_sinks.stats import Estimate

By = Literal["norm", "position", "token", "place"]
"""How tokens are marked: by the norm of their residual, by their position, by their token id, or by either of
the last two."""

FORMAT = 1
"""Version of the stored form of a rule."""

DARK = "dark "
"""What the name of a stored basis begins with, before its convention."""


@dataclass(frozen=True, eq=False, repr=False)
class SinkRule(Result):
    """What was learned about the sinks of a model on a sample of text, to mark them in other texts.

    A site of the residual stream has an index: 0 for the embedding, l + 1 for the exit of layer l.
    """

    model: str
    fingerprint: str
    """Hash of the model's weights and configuration: the rule is refused for any other model."""
    positions: tuple[int, ...]
    """Positions that are sinks whatever token they hold."""
    token_ids: tuple[int, ...]
    """Tokens that are sinks at other positions."""
    site: Site
    """The residual that the layer with the strongest sink reads."""
    cutoffs: Float[Tensor, "sites"]
    """Norm at each site beyond which a token counts as a sink: ten robust standard deviations above the
    median of the sample's tokens, and twice that median [ours]."""
    carriers: Float[Tensor, "sites d"]
    """Direction of the mean residual of the sample's sink tokens at each site, of length 1."""
    dark: dict[str, Float[Tensor, "d rank"]]
    """Orthonormal basis of the dark band under each convention."""
    learned_from: dict[str, Any]
    """The text that the rule was learned on: documents, windows, tokens, hash of the ids."""

    @classmethod
    def learn(
        cls,
        model: LanguageModel,
        found: Sinks,
        spectrum: Spectrum | tuple[Spectrum, ...] | list[Spectrum] = (),
        *,
        batch_size: int | None = None,
    ) -> "SinkRule":
        """Learn a rule from the sinks that `find_sinks` found, with one more pass over the same windows.

        Args:
            model: the language model.
            found: its sinks.
            spectrum: the spectra whose dark bands the rule holds, as from `read_spectra`; without any,
                `clean` knows no dark band.
            batch_size: windows in a pass.

        Raises:
            InputError: if no sink was found, for the sinks of another model, and for spectra as `find_sinks`
                does.

        """
        if found.model != model.name or len(found.levels[0]) != model.layers + 1:
            raise InputError(f"these are the sinks of {found.model}, not of {model.name}: find its own first")
        if not found.sinks:
            raise InputError(
                f"no sink was found in {model.name}, so there is no rule to learn: give more or longer texts "
                "to find_sinks, or a smaller epsilon"
            )
        several = isinstance(spectrum, Spectrum) or len(spectrum) > 0
        spectra = by_convention(model, spectrum) if several else {}
        sites, windows = residual_sites(model), found.attention.windows
        total = torch.zeros(len(sites), model.d, dtype=torch.float64)
        for places, ids in batches(model, windows, batch_size):
            member = torch.from_numpy(found.members[places][:, : ids.shape[1]])

            def of_members(x: Tensor, member: Tensor = member) -> Tensor:
                return x[member.to(x.device)].double().sum(0).cpu()

            total += trace(
                model,
                ids.to(model.device),
                {},
                dict.fromkeys(sites, of_members),
                readout=lambda final, read, weights: torch.stack([read[site] for site in sites]),
            )
        return cls(
            model.name,
            _identity(model),
            found.positions,
            found.token_ids,
            sites[found.sinks[0].layer],
            torch.from_numpy(high_norm_cutoff(found.levels)).float(),
            torch.nn.functional.normalize(total, dim=-1).float(),
            {name: each.dark().orthonormal().float().cpu() for name, each in spectra.items()},
            {name: windows.record[name] for name in ("documents", "windows", "tokens", "data_hash")},
        )

    @property
    def d(self) -> int:
        """Width of the residual stream."""
        return self.carriers.shape[1]

    def index(self, site: Site | None = None) -> int:
        """Return the index of a site of the residual stream; by default that of the rule's own site.

        Raises InputError for a site that is neither the embedding nor an exit of the model.
        """
        site = self.site if site is None else site
        index = 0 if site.kind == "embedding" else site.layer + 1
        if site.kind not in ("embedding", "exit") or site.layer < 0 or index >= len(self.cutoffs):
            raise InputError(
                f"{site}: the rule of {self.model} knows the embedding and the exits 0 to "
                f"{len(self.cutoffs) - 2}"
            )
        return index

    def carrier(self, site: Site | None = None) -> Float[Tensor, "d"]:
        """Return the direction of the mean residual of sink tokens at a site."""
        return self.carriers[self.index(site)]

    def channels(self, site: Site | None = None) -> list[int]:
        """Return the massive channels of the carrier at a site, the largest first.

        A channel is massive if its magnitude is ten robust standard deviations above the median over the
        channels, and above twice that median [ours]. The published rule (Sun et al. 2024) names absolute
        sizes that hold for large models only. There may be none.
        """
        size = self.carrier(site).abs().double()
        cutoff = float(high_norm_cutoff(robust_levels(size[:, None].numpy()))[0])
        order = size.argsort(descending=True).tolist()
        return [channel for channel in order if size[channel] > cutoff]

    def mask(self, ids: Int[Tensor, "batch tokens"], by: By = "place") -> Bool[Tensor, "batch tokens"]:
        """Mark the sinks of token ids by position, by token, or by both ("place"), without running the model.

        Raises InputError for the rule "norm", which needs the model: `sink_mask`.
        """
        if by not in ("position", "token", "place"):
            raise InputError(
                f"by {by!r}: without the model, choose 'position', 'token' or 'place', or use sink_mask"
            )
        positions = () if by == "token" else self.positions
        return marked(ids, positions, () if by == "position" else self.token_ids)

    def require(self, model: Transformer) -> None:
        """Raise InputError unless the rule was learned on this very model."""
        if model.d != self.d or model.layers != len(self.cutoffs) - 1:
            raise InputError(
                f"the rule is of {self.model}, with {len(self.cutoffs) - 1} layers of width {self.d}, and "
                f"{model.name} has {model.layers} of width {model.d}: learn a rule on it with SinkRule.learn"
            )
        if _identity(model) != self.fingerprint:
            raise InputError(
                f"the rule was learned on other weights or another configuration ({self.model}) than those "
                f"of {model.name}: learn a rule on it with SinkRule.learn"
            )

    @cached_property
    def spaces(self) -> dict[str, Subspace]:
        """The dark band under each convention."""
        return {name: Subspace(basis, f"dark ({name})") for name, basis in self.dark.items()}

    @property
    def table(self) -> pd.DataFrame:
        """One row per site: its `cutoff`, and the massive channels of the carrier as text."""
        sites = [Site("embedding"), *(Site("exit", layer) for layer in range(len(self.cutoffs) - 1))]
        channels = [" ".join(map(str, self.channels(site))) for site in sites]
        columns = {"site": list(map(str, sites)), "cutoff": self.cutoffs.tolist(), "channels": channels}
        return pd.DataFrame(columns)

    def summary(self) -> pd.DataFrame:
        """Return the table of sites."""
        return self.table

    def record(self) -> dict[str, Any]:
        """Return everything except the carriers and the dark bands, as a dictionary that JSON can hold."""
        return {
            "model": self.model,
            "fingerprint": self.fingerprint,
            "width": self.d,
            "positions": list(self.positions),
            "token_ids": list(self.token_ids),
            "site": str(self.site),
            "cutoffs": self.cutoffs.tolist(),
            "channels": self.channels(),
            "conventions": list(self.dark),
            "learned_from": self.learned_from,
        }

    def save(self, folder: str | Path) -> None:
        """Write `rule.json` and `rule.safetensors` to a folder.

        Each file replaces an older one as a whole, and the first holds the hash of the second, so `load`
        refuses files that do not belong together. Raises InputError if the folder cannot be written.
        """
        folder = Path(folder)
        tensors = {"carriers": self.carriers.contiguous(), "cutoffs": self.cutoffs.contiguous()}
        tensors |= {DARK + name: basis.contiguous() for name, basis in self.dark.items()}
        stored = tensor_bytes(tensors)
        kept = {name: value for name, value in self.record().items() if name not in ("cutoffs", "channels")}
        text = {"format": FORMAT, **kept, "tensors": hashlib.sha256(stored).hexdigest()}
        with clearly(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in (
                ("rule.safetensors", stored),
                ("rule.json", (json.dumps(text, indent=1) + "\n").encode()),
            ):
                with atomic_write(folder / name) as path:
                    path.write_bytes(content)

    @classmethod
    def load(cls, folder: str | Path) -> "SinkRule":
        """Read a rule that `save` wrote. Raises InputError for a folder that does not hold one."""
        folder = Path(folder)
        try:
            text = json.loads(read_regular(folder / "rule.json"))
            stored = read_regular(folder / "rule.safetensors")
        except OSError as error:
            raise InputError(
                f"{folder} holds no rule ({error.strerror}): SinkRule.save writes one"
            ) from error
        except ValueError as error:
            raise InputError(f"{folder / 'rule.json'} is not JSON: write the rule again") from error
        if not isinstance(text, dict) or text.get("format") != FORMAT:
            raise InputError(f"{folder / 'rule.json'} is not a rule of this version: write it again")
        if text.get("tensors") != hashlib.sha256(stored).hexdigest():
            raise InputError(
                f"rule.json and rule.safetensors in {folder} do not belong together: write the rule again"
            )
        try:
            tensors = read_tensors(stored)
            bases = {name: tensors[DARK + name] for name in text["conventions"]}
            kind, _, layer = text["site"].partition(" ")
            return cls(
                str(text["model"]),
                str(text["fingerprint"]),
                tuple(map(int, text["positions"])),
                tuple(map(int, text["token_ids"])),
                Site(kind, int(layer or 0)),
                tensors["cutoffs"],
                tensors["carriers"],
                bases,
                dict(text["learned_from"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError, SafetensorError) as error:
            raise InputError(f"the rule in {folder} is not whole ({error}): write it again") from error


_identities: "weakref.WeakKeyDictionary[Transformer, str]" = weakref.WeakKeyDictionary()


def _identity(model: Transformer) -> str:
    """Return the fingerprint of a model as it was when it was first asked for.

    It hashes all weights, which takes as long as many passes.
    """
    if model not in _identities:
        _identities[model] = model.fingerprint
    return _identities[model]


def sink_mask(
    model: LanguageModel,
    ids: Int[Tensor, "batch tokens"],
    rule: SinkRule,
    *,
    by: By = "norm",
    site: Site | None = None,
    attention_mask: Bool[Tensor, "batch tokens"] | Int[Tensor, "batch tokens"] | None = None,
    batch_size: int | None = None,
) -> Bool[Tensor, "batch tokens"]:
    """Mark the sink tokens of a text, to keep them out of means, directions, dictionaries or statistics.

    By "norm", tokens are marked whose residual at `site` exceeds the rule's cut-off there; this needs a pass
    of the model, and finds sinks wherever they stand. By "position", "token" or "place" (either), they are
    marked from the ids alone. Only tokens of high norm are found by "norm": a model may have sinks without
    it, and tokens of high norm that draw no attention; `mask_agreement` measures how often.

    Args:
        model: a language model.
        ids: the token ids.
        rule: what was learned on a sample: `SinkRule.learn`.
        by: how tokens are marked.
        site: the embedding or the exit whose norms count; by default the rule's own site.
        attention_mask: 1 or True for the tokens of each text and 0 for padding on either side, as a tokenizer
            returns it; by default nothing is padding. Padding is not marked, and positions count from the
            first token of each text.
        batch_size: windows in a pass.

    Raises:
        InputError: for the rule of another model, an unknown `by`, a site that is not one of the residual
            stream, ids that the model cannot read, and a mask that leaves gaps or does not fit the ids.

    """
    rule.require(model)
    ids = as_batch(ids)
    if by not in get_args(By):
        raise InputError(f"by {by!r}: choose from {', '.join(get_args(By))}")
    real = _unpadded(ids, attention_mask)
    windows = Windows.of_ids([row[own] for row, own in zip(ids, real, strict=True)], model)
    found = torch.zeros(ids.shape, dtype=torch.bool)
    if by != "norm":
        for row, own, window in zip(found, real, windows.rows, strict=True):
            row[own] = rule.mask(window[None], by)[0]
        return found
    index = rule.index(site)
    site = residual_sites(model)[index]
    for places, rows in batches(model, windows, batch_size):
        norms = trace(
            model,
            rows.to(model.device),
            {},
            [site],
            readout=lambda final, read, weights: read[site].float().norm(dim=-1).cpu(),
        )
        for place, marks in zip(places, norms > rule.cutoffs[index], strict=True):
            found[place, real[place]] = marks
    return found


def _unpadded(ids: Int[Tensor, "batch tokens"], attention_mask: Any) -> list[slice]:
    """Return where the text of each row stands. Raises InputError for a mask that does not fit."""
    if attention_mask is None:
        return [slice(0, ids.shape[1])] * len(ids)
    mask = torch.as_tensor(attention_mask).cpu().bool()
    if mask.shape != ids.shape:
        raise InputError(
            f"an attention mask of shape {tuple(mask.shape)} for ids of shape {tuple(ids.shape)}: give one "
            "number for each token"
        )
    found = []
    for place, own in enumerate(mask):
        where = own.nonzero().flatten().tolist()
        if not where or len(where) != where[-1] - where[0] + 1:
            raise InputError(
                f"the attention mask of text {place} is empty or has gaps: give ones for a text, zeros for "
                "padding before or after it"
            )
        found.append(slice(where[0], where[-1] + 1))
    return found


@dataclass(frozen=True, eq=False, repr=False)
class MaskAgreement(Result):
    """How often a mask marks the tokens that `find_sinks` lists on the same text."""

    model: str
    table: pd.DataFrame
    """One row per `document` and rule (`by`): the numbers of tokens that the mask marks (`masked`), that
    `find_sinks` lists (`seen`) and that are `both`; and `precision` (of the masked tokens) and `recall` (of
    the seen ones), NaN where there is none."""

    def summary(self) -> pd.DataFrame:
        """Return one row per rule: tokens, and the means over documents of precision and recall.

        Each mean has its 95 % interval under `_low` and `_high`.
        """
        rows: list[dict[str, Any]] = []
        for by, part in self.table.groupby("by", sort=False):
            row: dict[str, Any] = {"by": by, "documents": len(part)}
            row |= {name: int(part[name].sum()) for name in ("masked", "seen", "both")}
            for name in ("precision", "recall"):
                values = part[name].dropna()
                missing = {name: np.nan, f"{name}_low": np.nan, f"{name}_high": np.nan}
                row |= Estimate.of(values).columns(name) if len(values) else missing
            rows.append(row)
        return pd.DataFrame(rows)

    def record(self) -> dict[str, Any]:
        """Return the summary as a dictionary that JSON can hold."""
        return {"model": self.model, "rules": self.summary().to_dict("records")}


def mask_agreement(
    model: LanguageModel, found: Sinks, rule: SinkRule, *, site: Site | None = None
) -> MaskAgreement:
    """Compare the masks of a rule with the sinks that `find_sinks` found on texts that it was not learned on.

    Only tokens that at least half of the queries can see are compared, since `find_sinks` lists no others.

    Args:
        model: the language model.
        found: the sinks of the held-out texts.
        rule: the rule, learned on other texts.
        site: the site of the norms, as in `sink_mask`.

    Raises:
        InputError: as `sink_mask` does.

    """
    windows, rows = found.attention.windows, []
    compared = counted(found.attention)
    owners = np.asarray(windows.document)
    for by in get_args(By):
        mask = np.zeros_like(found.members)
        for places, ids in windows.batches(len(windows)):
            here = sink_mask(model, ids, rule, by=by, site=site)
            mask[places, : ids.shape[1]] = here.numpy()
        mask &= compared
        for document in np.unique(owners):
            own = owners == document
            masked, seen = int(mask[own].sum()), int(found.members[own].sum())
            both = int((mask & found.members)[own].sum())
            rows.append(
                {
                    "document": int(document),
                    "by": by,
                    "masked": masked,
                    "seen": seen,
                    "both": both,
                    "precision": both / masked if masked else np.nan,
                    "recall": both / seen if seen else np.nan,
                }
            )
    return MaskAgreement(model.name, pd.DataFrame(rows))
