"""A model with other names: told which part was not found, used once its parts are named."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import tiny_models
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel

import spectral_sinks as ss


class OddConfig(PretrainedConfig):
    model_type = "odd"

    def __init__(self, **given: Any) -> None:
        self.vocab_size, self.hidden_size, self.num_attention_heads, self.num_hidden_layers = 50, 16, 2, 2
        self.max_position_embeddings = 64
        super().__init__(**given)


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ask, self.offer, self.give = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.back = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        ask, offer, give = (
            p(x).unflatten(-1, (2, 8)).transpose(1, 2) for p in (self.ask, self.offer, self.give)
        )
        mixed = nn.functional.scaled_dot_product_attention(ask, offer, give, is_causal=True)
        return self.back(mixed.transpose(1, 2).flatten(2))


class Floor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(16), nn.LayerNorm(16)
        self.mixer, self.thinker, self.unused = (
            Mixer(),
            nn.Sequential(nn.Linear(16, 16), nn.ReLU()),
            nn.Identity(),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.before(x))
        return self.unused(x + self.thinker(self.between(x)))


class OddModel(PreTrainedModel, GenerationMixin):
    config_class = OddConfig

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(50, 16)
        self.floors = nn.ModuleList([Floor(), Floor()])
        self.roof = nn.LayerNorm(16)
        self.reader = nn.Linear(16, 50, bias=False)
        self.scale = 1.0
        self.post_init()

    def get_input_embeddings(self) -> Any:
        return self.words

    def get_output_embeddings(self) -> Any:
        return self.reader

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        x = self.words(input_ids)
        for floor in self.floors:
            x = floor(x)
        return SimpleNamespace(logits=self.scale * self.reader(self.roof(x)))


PARTS = {
    "layers": "floors",
    "final_norm": "roof",
    "attention": "mixer",
    "mlp": "thinker",
    "attention_norm": "before",
    "mlp_norm": "between",
    "queries": "mixer.ask",
    "keys": "mixer.offer",
    "values": "mixer.give",
    "attention_projection": "mixer.back",
}


@pytest.fixture
def odd() -> OddModel:
    torch.manual_seed(0)
    model = OddModel(OddConfig())
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("part", [part for part in PARTS if part != "final_norm"])
def test_the_part_that_is_missing_is_named(odd: OddModel, part: str) -> None:
    others = {name: path for name, path in PARTS.items() if name != part}
    with pytest.raises(ss.InputError) as caught:
        ss.load(odd, parts=others)
    words = part.replace("_", " ")
    assert f"the {words} of this model {'were' if words[-1] == 's' else 'was'} not found (tried " in str(
        caught.value
    )
    assert f"load(model, parts={{'{part}': 'dotted.name'}})" in str(caught.value)


def test_the_norm_beside_the_layers_is_the_final_one(odd: OddModel) -> None:
    found = ss.load(odd, parts={name: path for name, path in PARTS.items() if name != "final_norm"})
    assert found.layout.final_norm == "roof"


def test_named_by_hand_it_works_at_every_site(odd: OddModel) -> None:
    ids = torch.randint(50, (3, 9))
    with torch.no_grad():
        expected = odd(ids).logits
    model = ss.load(odd, parts=PARTS)
    assert not model.tested and model.layers == 2
    kinds = ("queries", "keys", "values", "attention", "mlp-input", "mlp", "exit")
    sites = [ss.Site("embedding"), ss.Site("head", 1, 1), *(ss.Site(kind, 1) for kind in kinds)]
    assert torch.equal(tiny_models.logits(model, ids, dict.fromkeys(sites, lambda x: x * 1.0)), expected)
    half = (torch.arange(16) < 8).float()
    for site in sites:
        assert not torch.allclose(
            tiny_models.logits(model, ids, {site: lambda x: x * half}), expected, atol=1e-3
        )
    assert ss.evaluate(model, ss.Windows.of_ids(ids, model), {}).nll == pytest.approx(
        float(nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten())), abs=1e-5
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"attention_write": "mixer.ask"},
            "layer 0 is not entry . attention . MLP with the parts 'mixer.ask'",
        ),
        ({"mlp_write": "unused"}, "layer 0 is not entry"),
        ({"final_norm": "floors.1"}, "logits are not unembedding"),
        ({"mlp": "nothing.there"}, "nothing.there"),
        ({"mlp_write": "nothing.there"}, "nothing.there"),
        ({"layers": "roof"}, "roof is not a list of layers"),
        ({"heads": "mixer"}, "no part is called heads; parts: attention"),
    ],
)
def test_wrong_parts_are_refused(odd: OddModel, wrong: dict[str, str], message: str) -> None:
    with pytest.raises(ss.InputError, match=message):
        ss.load(odd, parts=PARTS | wrong)


def test_a_scaled_unembedding_is_noticed(odd: OddModel) -> None:
    odd.scale = 3.0  # such as Cohere's logit scale: the NLL would be wrong without a word
    with pytest.raises(ss.InputError, match="its NLL would be wrong"):
        ss.load(odd, parts=PARTS)


def test_wrong_parts_of_a_known_family_are_refused() -> None:
    with pytest.raises(ss.InputError, match="name them by hand"):
        ss.load(tiny_models.build(), parts={"attention_write": "self_attn.q_proj"})
