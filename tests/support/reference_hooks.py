"""Filters at sites of an unwrapped model by PyTorch hooks, by hand for each family: the ground truth."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

import spectral_sinks as ss
from support import tiny_models

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
BERT = {
    "layers": "bert.encoder.layer",
    "attention": "attention.self",
    "norm": "",
    "mlp norm": "intermediate",
    "attention write": "attention.output.dense",
    "mlp write": "output.dense",
    "out": "attention.output.dense",
}
MODERNBERT = LLAMA | {
    "attention": "attn",
    "norm": "attn_norm",
    "mlp norm": "mlp_norm",
    "attention write": "attn",
    "out": "attn.Wo",
}
NAMES = dict.fromkeys(tiny_models.FAMILIES, LLAMA) | {
    "gemma2": GEMMA,
    "gemma3": GEMMA,
    "olmo2": GEMMA | {"norm": "", "mlp norm": "mlp"},
    "gpt_neox": NEOX,
    "gpt_neox parallel": NEOX,
    "gpt2": GPT2,
    "bert": BERT,
    "roberta": BERT | {"layers": "roberta.encoder.layer"},
    "modernbert": MODERNBERT,
    "modernbert untied": MODERNBERT,
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
    if family.startswith("modernbert"):
        return "Wqkv", list(range(32 * which, 32 * (which + 1)))
    if family in ("bert", "roberta"):
        return ("query", "key", "value")[which], list(range(32))
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
