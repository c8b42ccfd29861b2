"""Effects on image encoders: spectra of heads, filters at every site, and numbers recomputed another way."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import tiny_encoders
from torch import Tensor

import spectral_sinks as ss
from spectral_sinks.measure.vision.ridge import LinearProbe, ridge

CLASSES = tiny_encoders.CLASSES
LABELS = torch.tensor([0, 1, 2, 3, 4, 0, 1])


def spectrum(d: int = tiny_encoders.D, bands: int = 8) -> ss.Spectrum:
    generator = torch.Generator().manual_seed(5)
    return ss.Spectrum.from_matrix(torch.randn(90, d, generator=generator), bands=bands)


def sites(model: ss.VisionModel) -> list[ss.Site]:
    kinds = ("exit", "attention", "mlp", "queries", "keys", "values", "mlp-input")
    return [ss.Site("embedding"), ss.Site("head", 1, 2), *(ss.Site(kind, 1) for kind in kinds)]


def residual(model: ss.VisionModel, x: Tensor, site: ss.Site, edit: Any = None) -> Tensor:
    edits = {} if edit is None else {site: edit}
    return ss.trace(model, x, edits, [site], readout=lambda final, read, _: read[site])


def output(model: ss.VisionModel, x: Tensor, edits: Any = None) -> Tensor:
    return ss.trace(model, x, edits or {}, readout=lambda final, *_: final)


def blocks(weight: Tensor, d: int = tiny_encoders.D) -> list[Tensor]:
    return list(weight.double().split(d, dim=1))


@pytest.mark.parametrize("family", tiny_encoders.WITH_HEAD)
@pytest.mark.parametrize("convention", ["raw", "folded", "centred"])
@pytest.mark.filterwarnings("ignore:band edges")
def test_the_spectrum_of_a_head_by_hand(family: str, convention: Any, tmp_path: Path) -> None:
    """From the model and from its folder alike: what is read of each token, a block each."""
    model, plain = tiny_encoders.model(family), tiny_encoders.plain(family)
    found = ss.read_spectrum(model, convention=convention, use_cache=False)
    heads = [part for name, part in plain.named_parameters() if name.endswith("classifier.weight")]
    read = [block for head in heads for block in blocks(head.detach())]
    if convention != "raw":
        norm = plain.get_submodule(model.layout.final_norm)
        if convention == "centred":
            read = [block - block.mean(0) for block in read]
        read = [block * norm.weight.detach().double() for block in read]
        if convention == "centred":
            read = [block - block.mean(1, keepdim=True) for block in read]
    expected = np.linalg.svd(torch.cat(read).numpy(), full_matrices=True)
    rows = len(read) * (CLASSES - (convention == "centred"))
    assert found.matrix == "classifier" and found.convention == convention
    assert found.rank == rows < model.d and found.null().rank == model.d - rows
    assert f"rank {rows}" in repr(found)
    np.testing.assert_allclose(found.values[:rows], expected.S[:rows], rtol=1e-6)
    assert torch.cat(read).double().matmul(found.null().orthonormal()).abs().max() < 1e-6
    plain.save_pretrained(tmp_path)
    again = ss.read_spectrum(tmp_path, "classifier", convention=convention, use_cache=False)
    assert torch.equal(found.values, again.values)
    others = again.null().orthonormal().T
    torch.testing.assert_close(found.null().project(others), others)


def test_halves_of_a_head_are_centred_each_by_itself() -> None:
    """Softmax ignores one number per token, so what a constant over classes reads of either is invisible."""
    plain = tiny_encoders.build("dinov2 classifier")
    with torch.no_grad():
        plain.classifier.weight[:, : tiny_encoders.D] += 3 * torch.randn(tiny_encoders.D)
    model = ss.load_vision(plain)
    with pytest.warns(ss.SpectralWarning, match="null space"):
        found = ss.read_spectrum(model, convention="centred", use_cache=False)
    assert found.rank == 2 * (CLASSES - 1)


@pytest.mark.parametrize("family", ["dinov2", "dinov3", "vit", "deit", "clip", "siglip"])
def test_matrices_without_a_head(family: str, tmp_path: Path) -> None:
    model, plain = tiny_encoders.model(family), tiny_encoders.plain(family)
    with pytest.raises(ss.InputError, match=r"no classifier head.*name a matrix"):
        ss.read_spectrum(model)
    plain.save_pretrained(tmp_path)
    with pytest.raises(ss.InputError, match=r"no classifier head.*use 'classifier', 'embedding' or a param"):
        ss.read_spectrum(tmp_path)
    kernel = next(m for m in plain.modules() if isinstance(m, torch.nn.Conv2d)).weight.detach()
    expected = np.linalg.svd(kernel.flatten(1).T.numpy(), compute_uv=False)
    for source in (model, tmp_path):
        found = ss.read_spectrum(source, "embedding", use_cache=False)
        assert found.matrix == "embedding" and found.rank == tiny_encoders.D
        np.testing.assert_allclose(found.values, expected, rtol=1e-4)
        with pytest.raises(ss.InputError, match="has only 'raw'"):
            ss.read_spectrum(source, "embedding", convention="folded")
    name = f"{model.layout.layers}.1.{model.layout.values}.weight"
    values = ss.read_spectrum(model, name, use_cache=False)
    assert values.matrix == name
    weight = plain.get_parameter(name).detach().double()
    np.testing.assert_allclose(values.values, np.linalg.svd(weight.numpy(), compute_uv=False), rtol=1e-8)
    with pytest.raises(ss.InputError, match="no parameter 'nowhere'"):
        ss.read_spectrum(model, "nowhere")


def test_clip_has_no_norm_before_its_head(tmp_path: Path) -> None:
    import transformers

    config = transformers.CLIPConfig(vision_config=tiny_encoders.SIZES, num_labels=CLASSES)
    plain = transformers.CLIPForImageClassification(config).eval()
    plain.save_pretrained(tmp_path)
    for source in (ss.load_vision(plain), tmp_path):
        with pytest.warns(ss.SpectralWarning, match="null space"):
            found = ss.read_spectrum(source, use_cache=False)
        expected = np.linalg.svd(plain.classifier.weight.detach().numpy(), compute_uv=False)
        np.testing.assert_allclose(found.values[:CLASSES], expected, rtol=1e-4)
        with pytest.raises(ss.InputError, match="no norm before it"):
            ss.read_spectrum(source, convention="folded")


@pytest.mark.parametrize("family", tiny_encoders.FAMILIES)
def test_filter_and_complement_sum_to_the_input_at_every_site(family: str) -> None:
    model, x = tiny_encoders.model(family), tiny_encoders.images(2)
    edit = ss.remove(spectrum().dark(0.3))
    for site in sites(model):
        read = ss.Site("attention", 1) if site.kind == "head" else site  # where what it adds arrives
        whole, left, other, none = (
            ss.trace(
                model,
                x,
                {} if each is None else {site: each},
                [read],
                readout=lambda _, r, __: next(iter(r.values())),
            )
            for each in (None, edit, edit.complement(), torch.zeros_like)
        )
        torch.testing.assert_close(left + other, whole + none, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(output(model, x, {site: edit}), output(model, x), atol=1e-4)


@pytest.mark.parametrize("family", tiny_encoders.FAMILIES)
def test_fills_and_kinds_of_token_at_the_exit(family: str) -> None:
    """Each fill against its definition, at the tokens that are named and no others, whatever the size."""
    model, site = tiny_encoders.model(family), ss.Site("exit", 1)
    dark = spectrum().dark(0.3)
    basis = dark.orthonormal().float()
    for side in (20, 24):
        x = tiny_encoders.images(3, side)
        pixels = ss.pixels(x, model)
        whole = residual(model, x, site)
        mean = ss.mean_residual(model, pixels, site, batch_size=2)
        torch.testing.assert_close(mean, whole.double().mean(0), atol=1e-6, rtol=1e-6)
        over_patches = mean.clone()
        over_patches[len(model.prefix) :] = mean[len(model.prefix) :].mean(0)
        inside = whole @ basis @ basis.T
        expected = {
            "zero": (ss.Zero(), torch.zeros_like(inside)),
            "swap": (ss.Swap(), inside.roll(1, 0)),
            "mean": (ss.Mean(mean), (mean.float() @ basis @ basis.T).expand_as(inside)),
            "patches": (ss.Mean(over_patches), (over_patches.float() @ basis @ basis.T).expand_as(inside)),
        }
        first = len(model.prefix)
        for fill, replaced in expected.values():
            found = residual(model, x, site, ss.remove(dark, fill, model.at("patches")))
            assert torch.equal(found[:, :first], whole[:, :first])
            right = (whole - inside + replaced)[:, first:]
            torch.testing.assert_close(found[:, first:], right, atol=1e-4, rtol=1e-4)
        noisy = residual(model, x, site, ss.remove(dark, ss.Noise(1))) @ basis
        torch.testing.assert_close(noisy.norm(dim=-1), (whole @ basis).norm(dim=-1), atol=1e-4, rtol=1e-4)


def test_kinds_are_named() -> None:
    model = tiny_encoders.model("dinov2 registers")
    assert model.at("cls", "registers") == {0, 1, 2, 3, 4} == model.at("prefix")
    assert model.at("patches") == {5} and model.at("reg2") == {2}
    assert tiny_encoders.model("deit").at("distillation") == {1}
    with pytest.raises(ss.InputError, match="no tokens 'registers': choose from patches, prefix, cls"):
        tiny_encoders.model("vit").at("registers")
    with pytest.raises(ss.InputError, match="no tokens 'cls'"):
        tiny_encoders.model("siglip").at("cls")


@pytest.mark.parametrize("family", ["dinov2 registers classifier", "deit classifier", "clip", "siglip"])
def test_effects_by_hand(family: str) -> None:
    """Every column against transformers' own pass with a hook, image by image."""
    model, plain = tiny_encoders.model(family), tiny_encoders.plain(family)
    x = tiny_encoders.images(7)
    edit = ss.remove(spectrum().dark(0.4), tokens=model.at("patches"))
    cells = {"dark": {ss.Site("exit", 0): edit}}
    given = LABELS if model.classes else None
    rows = ss.evaluate_images(model, ss.pixels(x, model), cells, labels=given, batch_size=3)["dark"].table
    first, basis = len(model.prefix), edit.blocked.orthonormal().float()

    def cut(_: Any, __: Any, out: Tensor) -> Tensor:
        return torch.cat([out[:, :first], out[:, first:] - out[:, first:] @ basis @ basis.T], dim=1)

    def passed(image: Tensor) -> tuple[Tensor, Tensor | None]:
        seen: list[Tensor] = []
        norm = plain.get_submodule(model.layout.final_norm)
        handle = norm.register_forward_hook(lambda _, __, out: seen.append(out))
        with torch.no_grad():
            found = plain(image[None])
        handle.remove()
        tokens = seen[0][0] if family != "clip" else found.last_hidden_state[0].clone()
        if family == "clip":
            tokens[0] = seen[0][0]
        return tokens.double(), found.logits[0].double() if model.classes else None

    before = [passed(image) for image in x]
    handle = plain.get_submodule(model.layout.layers)[0].register_forward_hook(cut)
    after = [passed(image) for image in x]
    handle.remove()
    close = {"rel": 1e-3, "abs": 2e-5}
    for place, ((old, old_logits), (new, new_logits)) in enumerate(zip(before, after, strict=True)):
        row = rows.iloc[place]
        cosine = (old * new).sum(-1) / old.norm(dim=-1) / new.norm(dim=-1)
        error = (new - old).norm(dim=-1) / old.norm(dim=-1)
        groups: dict[str, list[int]] = {"patches": list(range(first, first + 25))}
        for kind, token in enumerate(model.prefix):
            groups.setdefault("registers" if "reg" in token else token, []).append(kind)
        found = {name.removesuffix("_error") for name in rows.columns if name.endswith("_error")}
        assert found == set(groups)
        for kind, places in groups.items():
            assert row[f"{kind}_cosine"] == pytest.approx(float(cosine[places].mean()), **close)
            assert row[f"{kind}_error"] == pytest.approx(float(error[places].mean()), **close)
        if old_logits is None or new_logits is None:
            assert "kl" not in rows.columns
            continue
        p, q = old_logits.log_softmax(-1), new_logits.log_softmax(-1)
        assert row["kl"] == pytest.approx(float((p.exp() * (p - q)).sum()), **close)
        assert row["top1_agreement"] == float(p.argmax() == q.argmax())
        truth = int(LABELS[place])
        assert row["accuracy"] == float(q.argmax() == truth)
        assert row["baseline_accuracy"] == float(p.argmax() == truth)
        assert row["cross_entropy"] == pytest.approx(float(-q[truth]), **close)
        assert row["delta_cross_entropy"] == pytest.approx(float(p[truth] - q[truth]), rel=1e-3, abs=1e-4)

    def nearest(vector: Any, old: Any, place: int) -> list[int]:
        others = sorted(set(range(7)) - {place})
        cosines = [vector @ old[i] / np.linalg.norm(vector) / np.linalg.norm(old[i]) for i in others]
        return [others[i] for i in np.argsort(cosines)[::-1]]

    for kind in ("cls", "patches") if model.cls is not None else ("patches",):
        pick = (lambda t: t[0]) if kind == "cls" else (lambda t: t[first:].mean(0))
        old, new = (torch.stack([pick(tokens) for tokens, _ in each]).numpy() for each in (before, after))
        for place in range(7):
            order = [nearest(each[place], old, place) for each in (old, new)]
            assert rows[f"{kind}_nearest"][place] == float(order[0][0] == order[1][0])
            kept = len(set(order[0][:5]) & set(order[1][:5])) / 5
            assert rows[f"{kind}_nearest5"][place] == pytest.approx(kept)


def test_batches_equal_singles_and_nothing_done_changes_nothing() -> None:
    family = "dinov2 registers classifier"
    model, pixels = tiny_encoders.model(family), tiny_encoders.pixels(family, 5)
    bands = spectrum()
    every = ss.phi(bands, 1, 8)
    put_back = ss.remove(bands.dark(0.3), ss.spectra.NoOp())
    mask = torch.rand(5, pixels.length, generator=torch.Generator().manual_seed(0)) < 0.3
    mean = ss.Mean(ss.mean_residual(model, pixels, ss.Site("exit", 1)))
    cells = {
        "all bands": {ss.Site("mlp", 1): every},
        "put back": {ss.Site("exit", 1): put_back},
        "mask": {ss.Site("exit", 0): ss.remove(bands.dark(0.3), tokens=mask)},
        "mean": {
            ss.Site("exit", 1): ss.remove(bands.dark(0.3), mean),
            ss.Site("mlp", 2): ss.phi(bands, 1, 6),
        },
        "restored": {ss.Site("exit", 1): ss.spectra.NormRestored(ss.remove(bands.dark(0.3)))},
        "at": {ss.Site("attention", 0): ss.remove(bands.dark(0.3), tokens=ss.At(0, 7))},
    }
    whole = ss.evaluate_images(model, pixels, cells, batch_size=5)
    singles = ss.evaluate_images(model, pixels, cells, batch_size=1)
    for name in cells:
        np.testing.assert_allclose(whole[name].table, singles[name].table, atol=2e-5, rtol=1e-4)
    same = whole["all bands"].table
    assert not same[["kl", "cls_error", "patches_error", "removed_energy_share"]].to_numpy().any()
    assert (same[["top1_agreement", "cls_nearest", "patches_nearest5"]] == 1).all(axis=None)
    assert whole["put back"].table["cls_error"].max() < 1e-5 < whole["mask"].table["cls_error"].min()
    assert whole["put back"].table["removed_energy_share"].min() > 0.05
    table = whole["mean"].summary().set_index("quantity")
    values = whole["mean"].table["kl"]
    assert table.loc["kl", "mean"] == pytest.approx(values.mean()) and table.loc["kl", "n"] == 5
    assert table.loc["kl", "low"] < values.mean() < table.loc["kl", "high"]
    assert whole["restored"].rank is None and whole["mask"].rank == bands.dark(0.3).rank
    assert "patches_cosine" in repr(whole["mask"])


def test_removed_energy_at_an_exit_by_hand() -> None:
    model, pixels = tiny_encoders.model(), tiny_encoders.pixels(count=3)
    site, edit = ss.Site("exit", 1), ss.remove(spectrum().dark(0.3), tokens=ss.At(0, 3))
    whole = residual(model, torch.stack([pixels[i] for i in range(3)]), site).double()
    share = (whole @ edit.blocked.orthonormal()).square().sum(-1) / whole.square().sum(-1)
    rows = ss.evaluate_images(model, pixels, {"x": {site: edit}})["x"].table
    np.testing.assert_allclose(rows["removed_energy_share"], share[:, [0, 3]].mean(1), rtol=1e-4)


@pytest.mark.parametrize("family", tiny_encoders.WITH_HEAD)
def test_planted_what_a_head_reads_is_all_that_its_logits_need(family: str) -> None:
    """At the final norm's output removing the null space changes nothing, and the rest leaves the bias.

    The last exit lies before that norm: with the gain set to one, no bias, and a null space that the norm's
    mean lies in, tokens are only scaled, so classes keep their order when the scale is put back.
    """
    plain = tiny_encoders.build(family)
    loaded = ss.load_vision(copy.deepcopy(plain))
    norm = plain.get_submodule(loaded.layout.final_norm)
    heads = [part for name, part in plain.named_modules() if name.endswith("classifier")]
    with torch.no_grad():
        norm.weight.fill_(1)
        norm.bias.zero_()
        for head in heads:
            halves = [half - half.mean(1, keepdim=True) for half in head.weight.split(tiny_encoders.D, dim=1)]
            head.weight.copy_(torch.cat(halves, dim=1))
    model = ss.load_vision(plain)
    with pytest.warns(ss.SpectralWarning, match="null space"):
        found = ss.read_spectrum(model, use_cache=False)
    read, null = found.head(found.rank / found.d), found.null()
    last, pixels = ss.Site("exit", model.layers - 1), tiny_encoders.pixels(family, 6)

    def without(x: Tensor) -> Tensor:
        """The null space removed, and the centred norm of each token put back along it."""
        left = null.reject(x)
        missing = (x - x.mean(-1, keepdim=True)).square().sum(-1) - left.square().sum(-1)
        axis = null.orthonormal().float()
        axis = axis - axis.mean(0)
        along = axis[:, :1] / axis[:, :1].norm()
        return left + missing.clamp_min(0).sqrt()[..., None] * along[:, 0]

    effects = ss.evaluate_images(
        model,
        pixels,
        {
            "null": {last: without},
            "read": {last: ss.remove(read)},
            "random": {last: ss.rnd(model.d, null.rank, 1)},
        },
    )
    assert effects["null"].table["kl"].max() < 1e-8
    assert effects["null"].table["patches_error"].min() > 0.1
    assert effects["read"].table["kl"].min() > 1e3 * effects["null"].table["kl"].max()
    assert effects["random"].table["kl"].mean() > 1e3 * effects["null"].table["kl"].max()
    bias = sum(head.bias for head in heads) / len(heads)
    logits = ss.trace(
        model,
        torch.stack([pixels[0]]),
        {last: ss.remove(read)},
        readout=lambda *_: model.logits(),
    )
    torch.testing.assert_close(logits[0], bias, atol=1e-4, rtol=1e-4)


def test_a_probe_is_ridge_by_least_squares_and_reads_the_other_half() -> None:
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(40, 6, generator=generator).double(), torch.randn(40, 3, generator=generator).double()
    x[:, 2] = 1.5  # nothing to standardise by
    penalty = 0.3
    mean, sd = x.mean(0).numpy(), x.std(0, correction=0).numpy()
    sd[2] = 1
    padded = np.vstack([(x.numpy() - mean) / sd, np.sqrt(penalty * 40) * np.eye(6)])
    target = np.vstack([(y - y.mean(0)).numpy(), np.zeros((6, 3))])
    weight = np.linalg.lstsq(padded, target, rcond=None)[0]
    np.testing.assert_allclose(ridge(x, y, penalty).weight, weight, atol=1e-10)
    np.testing.assert_allclose(ridge(x, y, penalty)(x), padded[:40] @ weight + y.mean(0).numpy(), atol=1e-10)
    with pytest.raises(ss.InputError, match="two classes"):
        LinearProbe.fitted(x, torch.zeros(40, dtype=torch.long))


def test_planted_labels_are_probed_until_their_direction_goes() -> None:
    """Images of two colours: what tells them apart is gone with one direction, and stays with any other."""
    model = tiny_encoders.model("dinov2")
    x = 0.1 * tiny_encoders.images(40)
    labels = torch.arange(40) % 2
    x[:, 0] += 2.0 * labels[:, None, None]
    pixels = ss.pixels(x, model)
    last = ss.Site("exit", model.layers - 1)
    final = ss.trace(model, x, {}, [last], readout=lambda _, read, __: read[last])[:, 0]
    axis = final[labels == 1].mean(0) - final[labels == 0].mean(0)
    inside = torch.linalg.svd(final - final.mean(0), full_matrices=False)[2][:8].T
    told = ss.Subspace.spanning(torch.cat([axis[:, None], inside], 1).double(), "told")
    cells = {
        "told": {last: ss.remove(told, ss.Mean(final.mean(0).double()))},
        "nothing": {last: ss.phi(spectrum(), 1, 8)},
        "random": {last: ss.rnd(model.d, told.rank, 3)},
    }
    found = ss.evaluate_images(model, pixels, cells, labels=labels, probe="cls")
    rows = found["nothing"].table
    assert rows["probe_accuracy"].notna().sum() == 20
    assert rows["probe_accuracy"].dropna().eq(1).all() and rows["delta_probe_accuracy"].dropna().eq(0).all()
    assert (
        found["told"].table["probe_accuracy"].mean() < 0.75 < found["random"].table["probe_accuracy"].mean()
    )
    assert found["told"].summary().set_index("quantity").loc["probe_accuracy", "n"] == 20


def test_energy_by_kind_of_token() -> None:
    model, pixels = tiny_encoders.model("dinov2 registers"), tiny_encoders.pixels("dinov2 registers", 4)
    bands, site = spectrum(), ss.Site("exit", 1)
    marked = torch.zeros(4, pixels.length, dtype=torch.bool)
    marked[0, 9] = marked[2, [6, 29]] = True
    table = ss.energy(model, pixels, bands, [site], marked=marked, batch_size=3)
    whole = residual(model, torch.stack([pixels[i] for i in range(4)]), site).double()
    squares = (whole @ bands.vectors).square().unflatten(-1, (8, 4)).sum(-1)
    shares = squares / squares.sum(-1, keepdim=True)
    indexed = table.set_index(["position_class", "document", "band"])
    for image in range(4):
        patches = [t for t in range(5, 30) if not marked[image, t]]
        groups = {"cls": [0], "registers": [1, 2, 3, 4], "patches": patches}
        if marked[image].any():
            groups["marked"] = marked[image].nonzero().flatten().tolist()
        found = set(table[table["document"] == image]["position_class"])
        assert found == set(groups)
        for kind, places in groups.items():
            for band in range(8):
                row = indexed.loc[(kind, image, band + 1)]
                assert row["share"] == pytest.approx(float(shares[image, places, band].mean()), abs=1e-5)
            norms = whole[image, places].norm(dim=-1)
            assert row["norm"] == pytest.approx(float(norms.quantile(0.5)), rel=1e-5)
    with pytest.raises(ss.InputError, match="marks of shape"):
        ss.energy(model, pixels, bands, [site], marked=marked[:2])


@pytest.mark.parametrize("family", tiny_encoders.FAMILIES)
def test_weight_shares_of_every_family(family: str) -> None:
    model = tiny_encoders.model(family)
    dark = spectrum().dark(0.25)
    table = ss.residual.weight_shares(model, {"dark": dark, "rest": dark.complement()})
    keys = ["part", "layer", "unit"]
    assert np.allclose(table.groupby(keys, observed=True)["share"].sum(), 1)
    name = f"{model.layout.layers}.2.{model.layout.values}.weight"
    weight = tiny_encoders.plain(family).get_parameter(name).detach().double()[8:16]
    share = (weight @ dark.orthonormal()).square().sum() / weight.square().sum()
    row = table[(table["part"] == "v") & (table["layer"] == 2) & (table["unit"] == 1)]
    assert row.set_index("subspace").loc["dark", "share"] == pytest.approx(float(share))


def test_what_cannot_be_measured_is_refused() -> None:
    family = "vit classifier"
    model, pixels = tiny_encoders.model(family), tiny_encoders.pixels(family, 3)
    site, dark = ss.Site("exit", 1), spectrum().dark(0.3)

    def refused(match: str, edit: Any, where: ss.Site = site, **options: Any) -> None:
        with pytest.raises(ss.InputError, match=match):
            ss.evaluate_images(model, pixels, {"x": {where: edit}}, **options)

    refused("width 30", ss.remove(spectrum(30).dark(0.3)))
    refused("layer 9", ss.remove(dark), ss.Site("exit", 9))
    refused("kind 7", ss.remove(dark, tokens={7}))
    refused("a mean of width 30", ss.remove(dark, ss.Mean(torch.zeros(30))))
    refused("2 labels for 3 images", ss.remove(dark), labels=[0, 1])
    refused("classes 0 to 4", ss.remove(dark), labels=[0, 1, 5])
    refused("learns labels", ss.remove(dark), probe="cls")
    refused("smallest of 1", ss.remove(dark), labels=[0, 1, 0], probe="cls")
    refused("a mask of 2 rows for 3", replace(ss.remove(dark), tokens=torch.ones(2, 26, dtype=torch.bool)))
    many = tiny_encoders.pixels(family, 17)
    with pytest.raises(ss.InputError, match="of 17 images one is left alone"):
        ss.evaluate_images(model, many, {"x": {site: ss.remove(dark, ss.Swap())}}, batch_size=3)
    swapped = {"x": {site: ss.remove(dark, ss.Swap())}}
    tables = [ss.evaluate_images(model, pixels, swapped, batch_size=n)["x"].table for n in (1, 2, 5)]
    assert tables[0].equals(tables[1]) and tables[0].equals(tables[2])
    with pytest.raises(ss.InputError, match=r"no \[CLS\] token"):
        ss.evaluate_images(
            tiny_encoders.model("siglip"),
            tiny_encoders.pixels("siglip", 3),
            {"x": {site: ss.remove(dark)}},
            labels=[0, 1, 0],
            probe="cls",
        )


@pytest.mark.usefixtures("unchecked")
def test_text_has_its_own_call() -> None:
    with pytest.raises(ss.InputError, match="reads images: evaluate_images"):
        ss.evaluate(tiny_encoders.model(), tiny_encoders.pixels(), {})  # pyright: ignore[reportArgumentType]
