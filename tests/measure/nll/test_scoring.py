"""Scores against cross_entropy and scipy in float64: ties, caps, biases, half precision, chunks, memory."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.special
import torch
from support import tiny_models
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import spectral_sinks as ss
from spectral_sinks.measure.nll import scoring as nll
from spectral_sinks.measure.nll.scoring import Reference, Scores, score, untouched

IDS = tiny_models.ids(4, 23, seed=3)
KINDS = [
    "llama",
    "gpt2",
    "gemma2",
    "gpt_neox parallel",
    "biased",
    "bfloat16",
    "float16",
    "capped bfloat16",
    "float64",
]


def make(kind: str) -> ss.LanguageModel:
    if kind in tiny_models.FAMILIES:
        return tiny_models.model(kind)
    module = tiny_models.plain("gemma2" if "capped" in kind else "llama")
    if kind == "biased":
        module.lm_head = nn.Linear(tiny_models.D, tiny_models.VOCABULARY, bias=True)
        torch.manual_seed(1)
        nn.init.normal_(module.lm_head.weight, std=0.3)
        nn.init.normal_(module.lm_head.bias, std=2)
    else:
        module = module.to(getattr(torch, kind.split()[-1]))
    return ss.load(module)


@pytest.fixture(scope="module", params=KINDS)
def model(request: Any) -> ss.LanguageModel:
    return make(request.param)


def finals(model: ss.LanguageModel, rows: int = 4, seed: int = 0, near: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return two outputs of the final norm, some way from one another."""
    generator = torch.Generator().manual_seed(seed)
    one, other = (torch.randn(rows, 23, tiny_models.D, generator=generator) for _ in "12")
    return one.to(model.dtype), (one + near * other).to(model.dtype)


def exact_logits(model: ss.LanguageModel, final: Tensor) -> np.ndarray:
    """Return the logits that the model itself computes, in its own dtype, then widened."""
    head = model.module.get_submodule(model.layout.unembedding)
    with torch.no_grad():
        logits = nn.functional.linear(final, head.weight, head.bias).double()
    cap = getattr(model.config, "final_logit_softcapping", None)
    return (logits if cap is None else cap * torch.tanh(logits / cap)).numpy()


def expected(
    model: ss.LanguageModel, base: Tensor, final: Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """NLL, KL and agreement by scipy in float64; `base` repeats as often as `final` is longer."""
    z = exact_logits(model, base)[:, :-1]
    other = exact_logits(model, final)[:, :-1]
    z = np.tile(z, (len(other) // len(z), 1, 1))
    target = IDS.repeat(len(other) // len(IDS), 1)[:, 1:].numpy()
    logp, logq = scipy.special.log_softmax(z, -1), scipy.special.log_softmax(other, -1)
    loss = -np.take_along_axis(logq, target[..., None], -1)[..., 0]
    kl = (np.exp(logp) * (logp - logq)).sum(-1)
    if kl.max() < 10:  # where nothing underflows
        np.testing.assert_allclose(kl, scipy.special.rel_entr(np.exp(logp), np.exp(logq)).sum(-1), atol=1e-10)
    by_torch = cross_entropy(
        torch.tensor(other).flatten(0, 1), torch.tensor(target).flatten(), reduction="none"
    )
    np.testing.assert_allclose(by_torch.numpy(), loss.ravel(), atol=1e-10)
    top = np.take_along_axis(other, z.argmax(-1)[..., None], -1)[..., 0]
    return loss, kl, top >= other.max(-1)


def check(found: Scores, wanted: tuple[np.ndarray, ...], atol: float = 1e-5) -> None:
    assert found.kl is not None and found.agrees is not None and found.agrees.dtype == torch.bool
    np.testing.assert_allclose(found.nll.numpy(), wanted[0], atol=atol)
    np.testing.assert_allclose(found.kl.numpy(), wanted[1], atol=atol)
    assert (found.agrees.numpy() == wanted[2]).mean() >= 0.97, "but for capped logits that rounding ties"


@pytest.mark.parametrize("near", [1.0, 1e-2, 1e-4])
@torch.no_grad()
def test_against_scipy(model: ss.LanguageModel, near: float) -> None:
    base, final = finals(model, near=near)
    plain, reference = untouched(model, base, IDS)
    wanted = expected(model, base, base)[0]
    np.testing.assert_allclose(plain.nll.numpy(), wanted, atol=1e-5)
    assert torch.equal(plain.nll, score(model, base, IDS).nll)
    assert plain.kl is None and plain.agrees is None
    found = score(model, final, IDS, reference)
    check(found, expected(model, base, final))
    assert found.kl is not None
    size = np.abs(exact_logits(model, base)).max()
    assert found.kl.min() >= -3e-7 * max(3, size), "logits are rounded in the 24th binary place"
    assert found.kl.mean() >= -1e-6
    halves = torch.finfo(model.dtype).bits < 32
    assert (reference.expected is None) == (halves or model.family == "gemma2")


@torch.no_grad()
def test_nothing_changed(model: ss.LanguageModel) -> None:
    base, _ = finals(model)
    plain, reference = untouched(model, base, IDS)
    found = score(model, base, IDS, reference)
    assert found.kl is not None and found.agrees is not None
    assert torch.equal(found.nll, plain.nll) and found.agrees.all()
    assert (found.kl == 0).all()


@pytest.mark.parametrize("rows", [1, 7, 22, 23, 87, 88, 89, 10_000])
@torch.no_grad()
def test_chunks(model: ss.LanguageModel, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever predictions and vocabulary are divided, a batch and a stack of three come out the same."""
    base, final = finals(model)
    stack = torch.cat([final, base, final.flip(0)])
    monkeypatch.setattr(nll, "MIN_PREDICTIONS", rows)
    monkeypatch.setattr(nll, "LOGITS", {"cpu": 17 * rows})
    assert nll.chunk(model, torch.device("cpu")) == rows
    assert nll.block(model, torch.device("cpu")) == 17
    plain, reference = untouched(model, base, IDS)
    check(score(model, stack, IDS.repeat(3, 1), reference), expected(model, base, stack))
    np.testing.assert_allclose(plain.nll.numpy(), expected(model, base, base)[0], atol=1e-5)


@torch.no_grad()
def test_references_cut_and_joined(model: ss.LanguageModel) -> None:
    base, final = finals(model)
    whole = untouched(model, base, IDS)[1]
    parts = [untouched(model, base[a:b], IDS[a:b])[1] for a, b in ((0, 1), (1, 3), (3, 4))]
    joined = Reference.joined(parts)
    for name in ("final", "total", "top", "expected"):
        one, other = getattr(whole, name), getattr(joined, name)
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, atol=1e-5)
    for a, b in ((0, 1), (1, 3), (2, 4), (0, 4)):
        cut = whole.windows(a, b, 22)
        assert len(cut.total) == (b - a) * 22
        found = score(model, final[a:b], IDS[a:b], cut)
        check(found, tuple(x[a:b] for x in expected(model, base, final)))


@torch.no_grad()
def test_ties_for_the_most_likely_token() -> None:
    """Either of two equal tokens will do, and a token that is only the first of the largest is no other."""
    model = ss.load(tiny_models.plain())
    weight = torch.zeros(tiny_models.VOCABULARY, tiny_models.D)
    weight[9, 0] = weight[40, 0] = 1  # equal whatever comes
    weight[50, 1] = weight[30, 2] = 1
    model.unembedding_weight.copy_(weight)
    axes = torch.eye(tiny_models.D) * 4
    base = torch.stack([axes[i] for i in (0, 1, 0, 1, 1, 1, 0, 3)])[None]
    final = torch.stack(
        [
            *(axes[0], axes[1] + axes[2], axes[1], axes[2], axes[1] * 0),
            *(axes[0] + more * axes[1] for more in (2, 1.00001, 0)),
        ]
    )
    ids = tiny_models.ids(1, 8)
    found = score(model, final[None], ids, untouched(model, base, ids)[1])
    assert found.agrees is not None
    assert found.agrees[0].tolist() == [True, True, False, False, True, True, False]


@torch.no_grad()
def test_large_logits_stay_finite() -> None:
    for kind in ("llama", "bfloat16", "gemma2", "biased"):
        model = make(kind)
        base, final = finals(model)
        found = score(model, final * 200, IDS, untouched(model, base * 200, IDS)[1])
        loss, kl, _ = expected(model, base * 200, final * 200)
        np.testing.assert_allclose(found.nll.numpy(), loss, rtol=1e-5, atol=1e-4)
        assert found.kl is not None
        np.testing.assert_allclose(found.kl.numpy(), kl, rtol=1e-4, atol=1e-2)  # capped, or rounded


def test_the_size_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.model()
    assert nll.chunk(model, torch.device("cpu")) == nll.LOGITS["cpu"] // tiny_models.VOCABULARY
    assert nll.chunk(model, torch.device("cuda")) == nll.LOGITS["cuda"] // tiny_models.VOCABULARY
    assert nll.chunk(model, torch.device("mps")) == nll.LOGITS["cpu"] // tiny_models.VOCABULARY
    monkeypatch.setattr(nll, "LOGITS", {"cpu": 5})
    assert nll.chunk(model, torch.device("cpu")) == nll.MIN_PREDICTIONS


def test_an_identity_has_no_effect_through_a_whole_pass(model: ss.LanguageModel) -> None:
    windows = ss.Windows.of_ids(IDS, model)
    for site in (ss.Site("exit", 1), ss.Site("embedding")):
        rows = ss.evaluate(model, windows, {site: lambda x: x}).table
        assert (rows["delta_nll"] == 0).all() and (rows["top1_agreement"] == 1).all()
        assert rows["kl"].abs().max() <= 1e-6
        cells = {str(k): {site: lambda x: x} for k in range(3)}
        for effect in ss.evaluate_all(model, windows, cells).values():
            tolerance = (
                1e-6 if torch.finfo(model.dtype).bits >= 32 else 2e-2
            )  # products of other heights round
            assert effect.table[["delta_nll", "kl"]].abs().to_numpy().max() <= tolerance


PEAK = """
import json
import torch
from support import tiny_models
import spectral_sinks as ss
from spectral_sinks.measure.nll import scoring as nll

def peak(run):
    # the most memory that `run` held at once
    with open("/proc/self/clear_refs", "w") as highest:
        highest.write("5")  # importing and loading may have held more
    run()
    line, = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])

model = ss.load(tiny_models.build(vocab_size=128_000))
ids = tiny_models.ids(8, 128)
windows = ss.Windows.of_ids(ids, model)
edits = {ss.Site("exit", 1): ss.rnd(32, 8)}
def forward():
    with torch.no_grad():
        model.module.model(ids, use_cache=False)

def evaluate():
    ss.evaluate(model, windows, edits)

evaluate()  # what is loaded at the first call is not of the pass
plain, chunked = peak(forward), peak(evaluate)
chunk = 256 * model.vocabulary * 4
nll.LOGITS = {"cpu": 2**40}
print(json.dumps([plain, chunked, peak(evaluate), chunk]))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux to see the peak")
def test_peak_memory_with_a_large_vocabulary() -> None:
    """A filter takes what the pass takes and some blocks of logits; those of all predictions would show."""
    tests = Path(tiny_models.__file__).parents[1]
    paths = os.pathsep.join(map(str, (tests, tests.parent)))
    ran = subprocess.run(
        [sys.executable, "-c", PEAK],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    plain, chunked, whole, chunk = json.loads(ran.stdout)
    assert chunk == 256 * 128_000 * 4
    assert chunked <= plain + chunk
    assert whole >= chunked + chunk, "holding all logits, four chunks, shows"
