"""Every supported family: parts found, filters at every site equal hooks written by hand for that family."""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import spectral_sinks as ss

IDS = tiny.ids()
SITES = [
    ss.Site("embedding"),
    *(ss.Site(kind, 1) for kind in ("queries", "keys", "values", "attention", "mlp-input", "mlp", "exit")),
    ss.Site("head", 1, 2),
]
EVERYWHERE = [ss.Site(s.kind, layer, s.head) for layer in range(3) for s in SITES if s.kind != "embedding"]

Edit = Callable[[Tensor], Tensor]

LLAMA = {
    "layers": "model.layers",
    "attention": "self_attn",
    "norm": "input_layernorm",
    "mlp norm": "post_attention_layernorm",
    "attention write": "self_attn",
    "mlp write": "mlp",
    "out": "self_attn.o_proj",
}
GEMMA = LLAMA | {
    "mlp norm": "pre_feedforward_layernorm",
    "attention write": "post_attention_layernorm",
    "mlp write": "post_feedforward_layernorm",
}
NEOX = LLAMA | {
    "layers": "gpt_neox.layers",
    "attention": "attention",
    "attention write": "attention",
    "out": "attention.dense",
}
GPT2 = LLAMA | {
    "layers": "transformer.h",
    "attention": "attn",
    "norm": "ln_1",
    "mlp norm": "ln_2",
    "attention write": "attn",
    "out": "attn.c_proj",
}
NAMES = dict.fromkeys(tiny.FAMILIES, LLAMA) | {
    "gemma2": GEMMA,
    "gemma3": GEMMA,
    "olmo2": GEMMA | {"norm": "", "mlp norm": "mlp"},
    "gpt_neox": NEOX,
    "gpt_neox parallel": NEOX,
    "gpt2": GPT2,
}
HEAD_SIZE = {"qwen3": 16, "gemma2": 16, "gemma3": 16}


def head_size(family: str) -> int:
    return HEAD_SIZE.get(family, 8)


def qkv_rows(family: str, kind: str) -> tuple[str, list[int]]:
    """Name the projection inside attention, and the outputs of it that are queries, keys or values."""
    size, which = head_size(family), ("queries", "keys", "values").index(kind)
    if family == "gpt2":
        return "c_attn", list(range(32 * which, 32 * (which + 1)))
    if family.startswith("gpt_neox"):
        return "query_key_value", [24 * h + 8 * which + i for h in range(4) for i in range(8)]
    if family == "phi3":
        starts = (0, 32, 48, 64)
        return "qkv_proj", list(range(starts[which], starts[which + 1]))
    return ("q_proj", "k_proj", "v_proj")[which], list(range(size * (4 if which == 0 else 2)))


def first(output: Any, f: Edit) -> Any:
    return (f(output[0]), *output[1:]) if isinstance(output, tuple) else f(output)


def linear(module: Any, x: Tensor) -> Tensor:
    """Apply an nn.Linear or a GPT-2 Conv1D without calling the module."""
    weight = module.weight if isinstance(module, torch.nn.Linear) else module.weight.T
    return torch.nn.functional.linear(x, weight, module.bias)


@contextmanager
def hooked(model: Any, family: str, site: ss.Site, f: Edit) -> Iterator[None]:
    """Filter a site of an unwrapped model by PyTorch hooks."""
    names, stack = NAMES[family], ExitStack()
    layer = model.get_submodule(names["layers"])[site.layer]

    def after(path: str, hook: Callable[[Any, Any, Any], Any]) -> None:
        module = layer.get_submodule(path)
        stack.callback(module.register_forward_hook(hook).remove)

    def before(path: str, hook: Callable[[Any, Any], Any]) -> None:
        module = layer.get_submodule(path)
        stack.callback(module.register_forward_pre_hook(hook).remove)

    if site.kind == "embedding":
        before("", lambda m, args: (f(args[0]), *args[1:]))
    elif site.kind == "exit":
        after("", lambda m, args, out: first(out, f))
    elif site.kind == "attention":
        after(names["attention write"], lambda m, args, out: first(out, f))
    elif site.kind == "mlp":
        after(names["mlp write"], lambda m, args, out: first(out, f))
    elif site.kind == "mlp-input":
        before(names["mlp norm"], lambda m, args: (f(args[0]), *args[1:]))
    elif site.kind == "head":
        size = head_size(family)
        mine = slice(size * site.head, size * (site.head + 1))

        def rewrite(projection: Any, args: Any, out: Any) -> Tensor:
            alone = torch.zeros_like(args[0])
            alone[..., mine] = args[0][..., mine]
            bias = 0 if projection.bias is None else projection.bias
            written = linear(projection, alone) - bias
            return linear(projection, args[0] - alone) + f(written)

        after(names["out"], rewrite)
    else:
        inside, rows = qkv_rows(family, site.kind)
        entry: list[Tensor] = []

        def remember(_: Any, args: Any) -> None:
            entry.append(args[0])

        def other(projection: Any, args: Any, out: Tensor) -> Tensor:
            x = f(entry.pop())
            seen = layer.get_submodule(names["norm"])(x) if names["norm"] else x
            out = out.clone()
            out[..., rows] = linear(projection, seen)[..., rows]
            return out

        before("", remember)
        after(f"{names['attention']}.{inside}", other)
    with stack:
        yield


@pytest.fixture(params=tiny.FAMILIES)
def family(request: Any) -> str:
    return request.param


@pytest.fixture(scope="module")
def untouched() -> Callable[[str], Tensor]:
    def run(family: str) -> Tensor:
        with torch.no_grad():
            return tiny.plain(family)(IDS).logits

    return run


def test_the_parts_are_found_and_add_up(family: str) -> None:
    model = tiny.model(family)
    model.check()
    assert model.tested
    assert (model.layers, model.d, model.heads, model.head_size) == (3, 32, 4, head_size(family))
    assert (model.vocabulary, model.context) == (tiny.VOCABULARY, tiny.CONTEXT)
    assert model.tied == (family in ("qwen2", "gemma2", "gemma3", "gpt2"))
    assert model.centres_residual == (family in ("gpt2", "gpt_neox", "gpt_neox parallel"))
    norm = tiny.plain(family).get_submodule(model.layout.final_norm)
    gain = norm.weight + 1 if family.startswith("gemma") else norm.weight
    assert torch.equal(model.final_gain, gain.detach())


def test_identity_and_keep_all_change_no_bit(family: str, untouched: Any) -> None:
    model, expected = tiny.model(family), untouched(family)
    everywhere = [ss.Site("embedding"), *EVERYWHERE]
    kept = ss.phi(ss.read_spectrum(model, bands=4), 1, 4)
    assert torch.equal(tiny.logits(model, IDS, {}), expected)
    assert torch.equal(tiny.logits(model, IDS, dict.fromkeys(everywhere, lambda x: x * 1.0)), expected)
    assert torch.equal(tiny.logits(model, IDS, dict.fromkeys(everywhere, kept)), expected)


@pytest.mark.parametrize("site", SITES, ids=str)
def test_a_filter_equals_hooks_written_by_hand(family: str, site: ss.Site, untouched: Any) -> None:
    spectrum = ss.read_spectrum(tiny.model(family), bands=8)
    basis = torch.cat([spectrum.vectors[:, :4], spectrum.vectors[:, 24:]], dim=1)
    rest = (torch.eye(32, dtype=torch.float64) - basis @ basis.T).float()
    removed = ss.remove(spectrum.subspace("1,7-8"))
    traced = tiny.logits(tiny.model(family), IDS, {site: removed})
    twin = copy.deepcopy(tiny.plain(family))
    with torch.no_grad(), hooked(twin, family, site, lambda x: x @ rest):
        by_hand = twin(IDS).logits
    with torch.no_grad(), hooked(twin, family, site, removed):
        same_filter = twin(IDS).logits
    assert (traced - untouched(family)).abs().max() > 1e-3, "the filter must act"
    assert (traced - by_hand).abs().max() <= 5e-5  # the explicit projector rounds otherwise
    if site.kind == "head":  # sums the heads in another order
        assert (traced - same_filter).abs().max() <= 1e-5
    else:
        assert torch.equal(traced, same_filter)


def test_many_sites_at_once_equal_hooks(family: str) -> None:
    model = tiny.model(family)
    spectrum = ss.read_spectrum(model, bands=8)
    edits = {site: ss.remove(spectrum.band(1 + i % 8)) for i, site in enumerate(EVERYWHERE)}
    twin = copy.deepcopy(tiny.plain(family))
    with torch.no_grad(), ExitStack() as stack:
        for site in sorted(edits, key=lambda s: s.rank):
            stack.enter_context(hooked(twin, family, site, edits[site]))
        expected = twin(IDS).logits
    assert (tiny.logits(model, IDS, edits) - expected).abs().max() <= 2e-5


def test_nll_is_the_loss_of_transformers(family: str) -> None:
    ids = tiny.ids(3, 20, seed=1)
    effect = ss.evaluate(tiny.model(family), ss.Windows.of_ids(ids, tiny.model(family)), {})
    with torch.no_grad():
        expected = [tiny.plain(family)(row[None], labels=row[None]).loss for row in ids]
    assert effect.rows["nll"].tolist() == pytest.approx([float(loss) for loss in expected], abs=1e-5)
    assert effect.baseline_nll == effect.nll and effect.delta_nll == 0.0
