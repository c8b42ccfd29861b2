"""Models inside wrappers, and models whose weights accelerate loads when a layer runs."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import cpu_offload, disk_offload
from support import readings, tiny_encoders, tiny_models
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import spectral_sinks as ss

LOCAL = (
    "model.embed_tokens",
    "model.layers.0",
    "model.layers.1",
    "model.norm",
    "model.rotary_emb",
    "lm_head",
)
EVERYWHERE = {name: "cpu" for name in LOCAL} | {"model.layers.2": "cpu"}


@pytest.fixture(scope="module")
def expected() -> Any:
    return {
        tied: readings.readings(
            ss.load(
                tiny_models.build("qwen2", tie_word_embeddings=tied),
                tokenizer=tiny_models.tokenizer(),
            )
        )
        for tied in (False, True)
    }


def loaded(model: Any) -> ss.LanguageModel:
    return ss.load(model, tokenizer=tiny_models.tokenizer())


def build(tied: bool = False) -> Any:
    return tiny_models.build("qwen2", tie_word_embeddings=tied)


@pytest.mark.parametrize(
    "elsewhere",
    [
        {"model.layers.2": "disk"},
        {"lm_head": "disk", "model.norm": "disk"},
        {"model.embed_tokens": "disk", "model.layers.0": "disk"},
        dict.fromkeys(EVERYWHERE, "disk") | {"model.layers.1": "cpu"},
    ],
    ids=lambda elsewhere: ", ".join(elsewhere),
)
def test_layers_on_disk(elsewhere: dict[str, str], tmp_path: Path, expected: Any) -> None:
    build().save_pretrained(tmp_path / "model")
    module = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map=EVERYWHERE | elsewhere,
        offload_folder=tmp_path / "elsewhere",
        attn_implementation="eager",
    )
    assert any(weight.is_meta for weight in module.parameters())
    model = loaded(module)
    assert not model.weightless and model.device == torch.device("cpu") and not model.tied
    readings.assert_same(readings.readings(model), expected[False])
    assert (
        model.fingerprint
        == loaded(
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
        ).fingerprint
    )
    with pytest.raises(ss.InputError, match=r"spread over several devices|offloaded"):
        pickle.dumps(model)


@pytest.mark.parametrize("offload", ["cpu", "disk"])
@pytest.mark.parametrize("tied", [False, True])
def test_offloading_by_accelerate(offload: str, tied: bool, tmp_path: Path, expected: Any) -> None:
    module = build(tied)
    if offload == "cpu":
        cpu_offload(module, execution_device=torch.device("cpu"))
    else:
        disk_offload(module, tmp_path / "elsewhere", execution_device=torch.device("cpu"))
    assert all(weight.is_meta for weight in module.parameters())
    model = loaded(module)
    assert model.tied == tied and model.dtype == torch.float32
    readings.assert_same(readings.readings(model), expected[tied])
    with pytest.raises(ss.InputError, match="quantised or offloaded, and cannot be handed to other"):
        pickle.dumps(model)


def test_an_offloaded_image_encoder(tmp_path: Path) -> None:
    plain = tiny_encoders.build("vit classifier")
    module = copy.deepcopy(plain)
    cpu_offload(module, execution_device=torch.device("cpu"))
    models = [ss.load_vision(each) for each in (module, plain)]
    subspaces = {"x": ss.random_subspace(models[0].d, 4, 0)}
    shares = [ss.residual.weight_shares(model, subspaces)["share"].to_numpy() for model in models]
    assert shares[0] == pytest.approx(shares[1], abs=1e-6)
    for matrix in ("embedding", "classifier"):
        a, b = (ss.read_spectrum(model, matrix, bands=1, use_cache=False) for model in models)
        assert torch.allclose(a.values, b.values, atol=1e-6)


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        lambda model: torch.compile(model, backend="eager"),
        lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
        torch.optim.swa_utils.AveragedModel,
    ],
    ids=["DataParallel", "compile", "both", "AveragedModel"],
)
def test_wrappers_are_taken_off(wrap: Any, expected: Any) -> None:
    found = loaded(wrap(build()))
    assert type(found.module).__name__ == "Qwen2ForCausalLM"
    readings.assert_same(readings.readings(found), expected[False])


def test_single_compiled_layers(expected: Any) -> None:
    module = build()
    module.model.layers[1].self_attn.o_proj = torch.compile(
        module.model.layers[1].self_attn.o_proj, backend="eager"
    )
    readings.assert_same(readings.readings(loaded(module)), expected[False])


def test_models_that_are_sharded_are_refused() -> None:
    class FSDPModule:
        pass

    class FSDPQwen2DecoderLayer(FSDPModule, type(build().model.layers[0])):
        pass

    module = build()
    module.model.layers[1].__class__ = FSDPQwen2DecoderLayer
    with pytest.raises(ss.InputError, match=r"is sharded over processes .*save it by save_pretrained"):
        ss.load(module)
    module = build()
    module.model.norm.weight.ds_id = 3  # of DeepSpeed's ZeRO-3
    with pytest.raises(ss.InputError, match="is sharded over processes"):
        ss.load(module)


def test_models_that_fsdp_or_a_mesh_has_sharded_are_refused(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded, distributed = build(), build()
        fully_shard(sharded, mesh=mesh)
        norm = distributed.model.norm
        norm.weight = nn.Parameter(distribute_tensor(norm.weight.detach(), mesh, [Shard(0)]))
        for module in (sharded, distributed):
            with pytest.raises(
                ss.InputError, match=r"is sharded over processes .*save it by save_pretrained"
            ):
                ss.load(module)
    finally:
        torch.distributed.destroy_process_group()


def test_modules_that_are_no_model_are_refused() -> None:
    for other in (nn.Linear(3, 3), nn.DataParallel(nn.Linear(3, 3))):
        with pytest.raises(ss.InputError, match="is not a model: give a name, a folder"):
            ss.load(other)


def test_a_model_without_weights_is_refused() -> None:
    with torch.device("meta"):
        module = transformers.AutoModelForCausalLM.from_config(tiny_models.plain().config)
    with pytest.raises(ss.InputError, match="are not loaded, but on the meta device: load it"):
        ss.load(module)
