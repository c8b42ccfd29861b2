"""A recorded set of what goes wrong between here and a server: a sentence each, and no key in any."""

import io
import json
import logging
import runpy
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from support import fake_ndif, tiny_models

import spectral_sinks as ss
from spectral_sinks.remote import handshake
from spectral_sinks.remote.transport import TRIES

FAILURES: dict[str, tuple[tuple[int, str] | str | Exception, str, int]] = {
    "no key": (
        (401, "Missing or invalid API key. Please visit https://login.ndif.us/ to create a new one."),
        "does not accept the API key.*nnsight login",
        1,
    ),
    "malformed key": (
        (400, f"Invalid API key format: '{fake_ndif.KEY}'. API keys must be in the format: xxxxxxxx"),
        "does not accept the API key",
        1,
    ),
    "unknown key": ((403, "Invalid API key."), "does not accept the API key", 1),
    "old client": (
        (400, "Client nnsight version 0.7.0 is below the minimum supported 0.8.0."),
        "versions of this process and of .* do not match.*remote check",
        1,
    ),
    "other architecture": (
        "The model architecture on this server doesn't match the one your code was traced against: it has no "
        "module at 'model.layers.7'.",
        "versions of this process and of .* do not match",
        1,
    ),
    "not running": (
        "Could not deploy this model. It needs 140 GB and no node has them.",
        "is not running at .* could not be started.*140 GB",
        1,
    ),
    "too large": ((413, "Request Entity Too Large"), "refuses a payload.*fewer cells", 1),
    "out of memory": (
        "Traceback (most recent call last):\n  File x\ntorch.OutOfMemoryError: CUDA out of memory. Tried to",
        "ran out of memory.*smaller batch_size",
        1,
    ),
    "too long": ("Your job exceeded the execution timeout of 3600.0s.", "took longer than .* allows", 1),
    "own error": (
        "Traceback (most recent call last):\n  File x\nZeroDivisionError: division by zero",
        "the job failed at .*ZeroDivisionError: division by zero",
        1,
    ),
    "server error": ((500, "Internal server error."), "the job failed at .*Internal server error", 1),
    "reconnecting": (
        (503, "Service temporarily unavailable: compute backend is reconnecting. Please try again in a few"),
        "is not ready",
        TRIES,
    ),
    "purged": (
        "Critical server error occurred. Please try again later. Sorry for the inconvenience.",
        "is not ready",
        TRIES,
    ),
    "garbled": (
        "Your request payload could not be read (ZstdError: Unknown frame descriptor). It may be truncated",
        "could not read the job",
        TRIES,
    ),
    "refused": (httpx.ConnectError("[Errno 111] Connection refused"), "cannot be reached", TRIES),
    "slow": (httpx.ReadTimeout("The read operation timed out"), "cannot be reached", TRIES),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def fake(folder: Path, monkeypatch: pytest.MonkeyPatch) -> fake_ndif.Fake:
    return fake_ndif.serve(folder, monkeypatch)


def measured(model: ss.LanguageModel, vocabulary: int = tiny_models.VOCABULARY) -> ss.Effect:
    w = ss.Windows.of_ids(tiny_models.ids(3, 66) % vocabulary, model)
    return ss.evaluate(model, w, {ss.Site("exit", 0): ss.rnd(model.d, 3)})


def test_a_server_gives_the_numbers_of_this_process(fake: fake_ndif.Fake, folder: Path) -> None:
    there = ss.load(folder, remote=True)
    assert all(weight.is_meta for weight in there.module.parameters()), "weights were loaded here"
    here, found = measured(ss.load(folder, attention="eager")), measured(there)
    assert here.table.equals(found.table)
    assert there.remote is not None
    record = there.remote.record()
    assert record["host"] == fake_ndif.HOST and record["jobs"] == ["job0", "job1"]
    assert record["server"]["torch"] == torch.__version__ and record["server"]["attention"] == "eager"
    assert record["server"]["dtype"] == "float32" and record["bytes_sent"] == sum(map(len, fake.blobs))
    assert ss.read_spectrum(there, bands=4).fingerprint == ss.read_spectrum(folder, bands=4).fingerprint


@pytest.mark.parametrize("name", FAILURES)
def test_each_failure_is_one_sentence(
    name: str, fake: fake_ndif.Fake, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said, expected, tries = FAILURES[name]
    there = ss.load(folder, remote=True)
    ss.remote.examine(there)
    fake.trouble, fake.asked = [said] * TRIES, []
    with caplog.at_level(logging.DEBUG), pytest.raises(ss.RemoteError, match=expected) as caught:
        measured(there)
    assert fake.asked.count("/request") == tries
    message = str(caught.value)
    assert "\n" not in message and "Traceback" not in message and len(message) < 500
    assert fake_ndif.without_key(message) and fake_ndif.without_key(caplog.text)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


def test_what_may_succeed_later_is_tried_again(fake: fake_ndif.Fake, folder: Path) -> None:
    there = ss.load(folder, remote=True)
    ss.remote.examine(there)
    fake.trouble = [FAILURES["reconnecting"][0], FAILURES["refused"][0], None]
    assert measured(there).table.equals(measured(ss.load(folder, attention="eager")).table)


def changed(monkeypatch: pytest.MonkeyPatch, **found: Any) -> None:
    probe = handshake.call
    monkeypatch.setattr(handshake, "call", lambda *arguments: probe(*arguments) | found)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"maps": False}, "no attention maps.*attention='sdpa'"),
        ({"ids": [[0, 0]]}, "runs token ids"),
        ({"settings": "{}"}, "another configuration"),
        ({"bos": 1}, "has BOS 1"),
        ({"opens_with_bos": False}, "opens texts: False"),
        ({"noop": False}, "changes logits"),
        ({"adds_up": False}, "do not add up"),
        ({"alone": False}, "its layers return several values"),
        ({"logits": False}, "its logits are not what the unembedding gives"),
    ],
)
def test_what_a_server_does_is_not_assumed(
    found: dict[str, Any], expected: str, fake: fake_ndif.Fake, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed(monkeypatch, **found)
    with pytest.raises(ss.InputError, match=expected):
        measured(ss.load(folder, remote=True))
    if "maps" in found:
        assert measured(ss.load(folder, remote=True, attention="sdpa")).sink_mass is None


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("StarCoder 2", None),
        ("Cohere", "its logits are not what .*; a model loaded here is examined for what cohere does"),
        ("Granite", "the parts of a layer do not add up"),
    ],
)
def test_a_family_whose_layout_is_not_tested_is_no_less_exact_at_a_server(
    family: str, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "generate_families.py"))
    script["build"](family).save_pretrained(tmp_path)
    tiny_models.tokenizer().save_pretrained(tmp_path)
    fake_ndif.serve(tmp_path, monkeypatch)
    there, here = ss.load(tmp_path, remote=True), ss.load(tmp_path, attention="eager")
    for site in (ss.Site("queries", 1), ss.Site("head", 1, 0)):
        with pytest.raises(ss.InputError, match=r"whose layout is not tested, .*\(load the model in this"):
            site.check(there)
        site.check(here)
    if expected is None:
        np.testing.assert_allclose(
            measured(there, 96).table["nll"], measured(here, 96).table["nll"], atol=1e-6
        )
        return
    with pytest.raises(ss.InputError, match=expected):
        measured(there, 96)


def test_the_dtype_of_the_server_is_found_out(
    fake: fake_ndif.Fake, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = ss.load(folder, remote=True)
    before = there.dtype
    fake.nn._module.to(torch.bfloat16)
    measured(there)
    assert (before, there.dtype) == (torch.float32, torch.bfloat16)
    with pytest.raises(ss.InputError, match=r"runs .* in bfloat16, not in torch.float32 as requested"):
        measured(ss.load(folder, remote=True, dtype="float32"))


def test_a_server_that_ignores_the_attention_asked_for(fake: fake_ndif.Fake, folder: Path) -> None:
    fake.nn._module.set_attn_implementation("sdpa")
    with pytest.raises(ss.InputError, match="no attention maps"):
        measured(ss.load(folder, remote=True))


def test_a_spectrum_that_only_the_server_has(
    fake: fake_ndif.Fake, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    there = ss.load(tmp_path, remote=True)
    found, true = ss.read_spectrum(there, bands=4), ss.read_spectrum(folder, bands=4)
    assert torch.allclose(found.values, true.values, rtol=1e-9)
    assert float(ss.spectra.principal_cosines(found.dark(), true.dark()).min()) > 1 - 1e-9
    count = len(fake.blobs)
    assert torch.equal(ss.read_spectrum(there, bands=4).vectors, found.vectors) and len(fake.blobs) == count
    monkeypatch.setattr(type(there), "weightless", True)  # here it is; and the far end has its own class
    with pytest.raises(ss.InputError, match="holds no weights"):
        ss.read_spectrum(there, "embedding")


def test_unit_vectors_read_the_unembedding(monkeypatch: pytest.MonkeyPatch) -> None:
    from spectral_sinks.measure.residual import matrix_spectrum as spectra

    model = tiny_models.model("gpt2")
    monkeypatch.setattr(type(model), "weightless", True)
    assert torch.allclose(spectra._columns(model), model.unembedding_weight, atol=1e-7)


def test_preflight(fake: fake_ndif.Fake, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = tiny_models.run(capsys, "remote", "check", folder, "--json")
    steps = json.loads(ran.out)["steps"]
    assert ran.status == 0 and [step["name"] for step in steps] == [
        *("reachable", "key", "versions", "configuration", "running", "one token")
    ]
    assert all(step["ok"] for step in steps) and fake_ndif.without_key(ran.out + ran.err)
    fake.packages["transformers"] = "4.40.0"
    ran = tiny_models.run(capsys, "remote", "check", folder)
    assert ran.status == 1 and "4.40.0" in ran.out and "NO" in ran.out
    assert fake_ndif.without_key(ran.out + ran.err)


def test_preflight_finds_other_versions_in_a_pass(
    fake: fake_ndif.Fake, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(**_: Any) -> Any:
        raise httpx.ReadTimeout("The read operation timed out")

    monkeypatch.setattr(fake_ndif.ndif, "get_remote_env", slow)
    assert all(step.ok for step in ss.remote.preflight(str(folder)))
    fake.version = "4.40.0"
    *_, last = ss.remote.preflight(str(folder))
    assert (last.name, last.ok) == ("one token", False) and "transformers==4.40.0" in last.found


def test_preflight_without_a_key(fake: fake_ndif.Fake, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_ndif.CONFIG.API, "APIKEY", None)
    *_, last = ss.remote.preflight(str(folder))
    assert (last.name, last.ok) == ("key", False) and "nnsight login" in last.found


def test_what_is_no_place() -> None:
    with pytest.raises(ss.InputError, match="remote='ndfi'"):
        ss.load(tiny_models.model(), remote="ndfi")
    with pytest.raises(ss.InputError, match="knows models by name"):
        ss.load(tiny_models.plain(), remote=True)
    with pytest.raises(ss.InputError, match="server's devices"):
        ss.load(remote=True, device="cpu")


def test_the_key_is_in_no_payload_and_no_record(fake: fake_ndif.Fake, folder: Path) -> None:
    import zstandard

    there = ss.load(folder, remote=True)
    measured(there)
    for blob in fake.blobs:
        raw = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(blob)).read()
        assert fake_ndif.KEY.encode() not in raw
    assert there.remote is not None and fake_ndif.without_key(
        json.dumps(there.remote.record()) + repr(there.remote)
    )


def test_results_of_jobs_sent_before_a_class_was_renamed() -> None:
    import pickle

    import numpy as np

    from spectral_sinks.measure.nll.replay import BatchResult
    from spectral_sinks.remote.serialization import unpack

    zero = np.zeros((1, 2))
    current = pickle.dumps(BatchResult(zero, zero + 1, zero, zero, None), protocol=0)
    new = b"cspectral_sinks.measure.nll.replay\nBatchResult"
    assert new in current
    old = current.replace(new, b"cspectral_sinks.measure.replay\nMeasured")
    result = unpack(old)
    assert isinstance(result, BatchResult) and result.kl.tolist() == [[1.0, 1.0]]
