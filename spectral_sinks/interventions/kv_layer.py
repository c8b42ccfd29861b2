"""What a layer of a `KVCache` keeps: its first entries and, of the others, those of a rule."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from spectral_sinks.errors import InputError
from spectral_sinks.interventions.kv_storage import Bits, Grouping, Storage, longer, taken
from spectral_sinks.models.attention_capture import AttentionCall, WeightObserver
from spectral_sinks.models.language import LanguageModel
from spectral_sinks.models.rotary import Rotation

Evict = Literal["window", "attention", "random"]
"""What is dropped first: the oldest entries, those that received least attention, or random ones."""


Positions = Literal["cache", "text"]
"""Where keys count their positions from: the first entry of the cache, or the beginning of the text."""


@dataclass(frozen=True)
class CacheRule:
    """What each layer of a `KVCache` keeps, and how; its fields are the arguments of that class."""

    size: int | None
    first: int
    evict: Evict
    recent: int
    positions: Positions
    bits: Bits | None
    keys_by: Grouping
    group: int
    exact_first: bool
    seed: int
    chosen: tuple[int, ...] | None = None
    """Positions in the text of the entries that stay in place of the first ones; None for the first."""

    def check(self, model: LanguageModel) -> None:
        """Raise InputError for values that contradict each other or that the model cannot have."""
        if self.evict not in ("window", "attention", "random"):
            raise InputError(f"evict={self.evict!r}: choose 'window', 'attention' or 'random'")
        if self.positions not in ("cache", "text"):
            raise InputError(f"positions={self.positions!r}: choose 'cache' or 'text'")
        if self.bits not in (None, 8, 4, 2) or self.keys_by not in ("channel", "token"):
            raise InputError(
                f"bits={self.bits!r}, keys_by={self.keys_by!r}: choose 8, 4, 2 or None, and 'channel' or "
                "'token'"
            )
        if self.first < 0 or self.group < 1:
            raise InputError(f"first={self.first}, group={self.group}: expected at least 0 and 1")
        if self.size is not None and self.size <= self.first:
            raise InputError(
                f"a cache of {self.size} entries cannot keep the first {self.first} and a recent one: give "
                f"it at least {self.first + 1}"
            )
        if self.size is not None and not 1 <= self.recent <= self.size - self.first:
            raise InputError(
                f"recent={self.recent}: a cache of {self.size} entries that keeps the first {self.first} has "
                f"room for 1 to {self.size - self.first}"
            )
        if self.chosen is not None and (self.evict != "window" or self.bits is not None):
            raise InputError(
                "positions in place of the first entries go with evict='window' and without `bits`: give "
                "`first` as a number"
            )
        by_channel = self.bits is not None and self.keys_by == "channel"
        if by_channel and self.size is not None and self.recent < self.group:
            raise InputError(
                f"keys are rounded by channel in groups of {self.group} tokens, and only the most recent "
                f"{self.recent} tokens are sure to stay: give a smaller `group`, or keys_by='token'"
            )
        if self.bits is not None and model.head_size % (8 // self.bits):
            raise InputError(
                f"heads of size {model.head_size} do not fill whole bytes with {self.bits} bits: use 8 bits"
            )


class KVLayer(CacheLayerMixin):
    """The entries of one layer of a `KVCache`."""

    is_sliding = False
    is_croppable = False

    def __init__(self, rule: CacheRule, index: int, rotation: Rotation | None) -> None:
        super().__init__()
        self.rule, self.index, self.rotation = rule, index, rotation
        exact = rule.first if rule.exact_first else 0
        self.stored_keys = Storage(rule.bits, rule.keys_by, rule.group, exact)
        self.stored_values = Storage(rule.bits, "token", rule.group, exact)
        self.reset()

    def reset(self) -> None:
        """Forget all entries."""
        self.stored_keys.empty()
        self.stored_values.empty()
        self.seen = 0
        """Number of tokens whose keys have come in."""
        self.places: Tensor | None = None
        """Places of the entries in the text, `[batch, heads, entries]`; None where the rule implies them."""
        self.received: Tensor | None = None
        """Attention that each entry has received, summed over queries and the query heads of its key head."""
        self.awaiting = False
        """Whether the attention of the last block has not been seen yet."""
        self.watched = False
        """Whether an observer will see it."""
        self.shown: tuple[Tensor | None, int] = None, 0
        """Places in the text of the last pass's keys, `[#batch, #heads, keys]`, and by how many positions the
        cache counted them nearer to the queries; None and 0 if none had been dropped."""
        self.generator = torch.Generator().manual_seed(1000003 * self.rule.seed + self.index)
        self.is_initialized = False

    @property
    def held(self) -> int:
        """Number of entries of each row and head."""
        return self.stored_values.shape[2]

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors that the layer holds for its entries."""
        own = [x for x in (self.places, self.received) if x is not None]
        return [*self.stored_keys.tensors, *self.stored_values.tensors, *own]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note the dtype and the device of the entries."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Float[Tensor, "batch heads keys size"], Float[Tensor, "batch heads keys value_size"]]:
        """Return the keys and values of the entries and the new tokens; keep what the rule keeps.

        The new tokens see all entries that were held before them.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.awaiting:
            raise unseen()
        new = key_states.shape[2]
        keys, values = key_states, value_states
        old = self.stored_keys.read(), self.stored_values.read()
        if old[0] is not None and old[1] is not None:
            before = self._counted_back(old[0])
            keys, values = torch.cat([before, keys], dim=2), torch.cat([old[1], values], dim=2)
        places = torch.arange(self.seen, self.seen + new)
        self.shown = self._shown(places)
        if self.rotation is not None and self.rule.bits is not None:
            key_states = self.rotation.turned(key_states, -places)
        self.stored_keys.append(key_states)
        self.stored_values.append(value_states)
        self.seen += new
        if self.rule.size is None:
            return keys, values
        if self.rule.evict != "window" or self.rule.chosen is not None:
            own = places.to(self.device, torch.int32).expand(*key_states.shape[:2], new)
            self.places = longer(self.places, own)
        if self.rule.evict == "attention":
            zeros = torch.zeros(*key_states.shape[:2], new, device=self.device)
            self.received = longer(self.received, zeros)
            self.awaiting, self.watched = True, False
        else:
            self.evict()
        return keys, values

    def observer(self, call: AttentionCall) -> WeightObserver:
        """Return the function that adds the attention of a block of queries, and evicts after the last."""

        def observe(rows: slice, weights: Tensor) -> None:
            assert self.received is not None
            batch, _, _, keys = weights.shape
            by_key_head = weights.view(batch, self.received.shape[1], -1, keys).float().sum(2)
            self.received[..., :keys] += by_key_head
            if rows.stop == call.query.shape[2]:
                self.awaiting = False
                self.evict()

        return observe

    def evict(self) -> None:
        """Drop entries until there are no more than the rule allows."""
        rule = self.rule
        batch, heads, held = self.stored_values.shape
        if rule.size is None or held <= rule.size:
            return
        if rule.chosen is not None:
            assert self.places is not None
            chosen = torch.tensor(rule.chosen, device=self.device)
            others = (~torch.isin(self.places[0, 0], chosen)).nonzero().flatten()
            stays = torch.ones(held, dtype=torch.bool, device=self.device)
            stays[others[: held - rule.size]] = False
            self._keep(stays.nonzero().flatten().expand(batch, heads, -1))
            return
        ends = torch.cat([torch.arange(rule.first), torch.arange(held - rule.recent, held)])
        index = ends.to(self.device).expand(batch, heads, -1)
        if count := rule.size - rule.first - rule.recent:
            middle = slice(rule.first, held - rule.recent)
            if self.received is not None:
                scores = self.received[..., middle]
            else:
                shape = (batch, heads, middle.stop - middle.start)
                scores = torch.rand(shape, generator=self.generator).to(self.device)
            best = scores.topk(count, dim=2).indices + rule.first
            index = torch.cat([index, best], dim=2).sort(dim=2).values
        self._keep(index)

    def _keep(self, index: Int[Tensor, "batch heads kept"]) -> None:
        self.stored_keys.keep(index)
        self.stored_values.keep(index)
        self.places = None if self.places is None else taken(self.places, index)
        self.received = None if self.received is None else taken(self.received, index)

    def _counted_back(
        self, keys: Float[Tensor, "batch heads entries size"]
    ) -> Float[Tensor, "batch heads entries size"]:
        """Return the stored keys of the entries, turned as if they stood just before the next token.

        Queries are turned by their place in the text, and only differences of places matter. Keys that are
        stored as they came are turned by what their place changes; with `bits` they are stored before the
        rotation. The former loses nothing in half precision as long as nothing is dropped.
        """
        if self.rotation is None:
            return keys
        by = torch.arange(self.seen - self.held, self.seen, device=keys.device)
        if self.rule.bits is None:
            own = self.entries().to(keys.device)
            by = by - (own if self.places is not None else own[:1, :1])
        return self.rotation.turned(keys, by) if by.any() else keys

    def _shown(self, new: Int[Tensor, "new"]) -> tuple[Tensor | None, int]:
        gone = self.seen - self.held
        if not gone:
            return None, 0
        own = self.entries()
        if self.rule.evict == "window":
            own = own[:1, :1]
        places = torch.cat([own, new.to(own.device).expand(*own.shape[:2], -1)], dim=2)
        return places, 0 if self.rotation is None else gone

    def entries(self) -> Int[Tensor, "batch heads entries"]:
        """Return the positions in the text of the entries."""
        if self.places is not None:
            return self.places.long()
        batch, heads, held = self.stored_values.shape
        first = min(self.rule.first, held)
        places = torch.cat([torch.arange(first), torch.arange(self.seen - held + first, self.seen)])
        return places.expand(batch, heads, -1)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys of the next pass, and the offset at which its mask begins.

        The entries take the places just before the next token, so that it sees all of them.
        """
        return self.held + query_length, self.seen - self.held

    def get_seq_length(self) -> int:
        """Return the number of tokens whose keys have come in, from which the next positions follow."""
        return self.seen

    def get_max_length(self) -> int:
        """Return the number of entries that are kept, or -1 without a limit."""
        return -1 if self.rule.size is None else self.rule.size

    def change(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by what a function of it returns, such as other rows of the batch."""
        self.stored_keys.change(function)
        self.stored_values.change(function)
        self.places = None if self.places is None else function(self.places)
        self.received = None if self.received is None else function(self.received)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows for a beam search."""
        self.change(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self.change(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self.change(lambda x: x[indices])

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to go back, since what was dropped or rounded is gone; raises InputError."""
        if tokens_to_remove:
            raise InputError(
                "a KVCache cannot go back to an earlier token, since what it has dropped or rounded since is "
                "gone: use a cache of transformers, such as DynamicCache"
            )


def unseen() -> InputError:
    """Return the error of a rule by received attention under which a pass ran without the cache's hook."""
    return InputError(
        "eviction by received attention needs the attention weights of every pass, and no hook has seen "
        "them: run it inside `with ss.attending(model, cache):`"
    )
