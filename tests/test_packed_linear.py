"""Weights laid out for oneDNN: answers are those without them, to the last bit, and no weight is copied twice."""

import pytest
import torch
from conftest import llama, make_tokenizer
from helpers.engines import asked, run
from helpers.packs import Trial

from ftray.compat.torch import can_pack_weights, packed_product, packed_weight
from ftray.multi_adapter import packed_linear
from ftray.serving.engine import Engine

pytestmark = pytest.mark.skipif(not can_pack_weights(), reason="needs a CPU with bfloat16 in oneDNN")


def engine_of(dtype=torch.bfloat16):
    model = llama(tie_word_embeddings=True).to(dtype).requires_grad_(False)
    engine = Engine(model, make_tokenizer())
    for i, method in enumerate(("lora", "ia3", "oft")):
        engine.add(method, engine.prepare(Trial(method, seed=i).model(model).eval()))
    return engine


@pytest.fixture
def made(monkeypatch):
    """The weights that have been packed."""
    weights = []
    monkeypatch.setattr(packed_linear, "packed_weight", lambda weight: weights.append(weight) or packed_weight(weight))
    return weights


def answers(engine):
    given = [(9, "lora"), (1, "ia3"), (30, "oft"), (4, None)]
    asks = [asked(range(5, 5 + count), name, 12, logprobs=3) for count, name in given]
    return run(engine, asks), [delta.tokens for sequence in asks for delta in sequence.deltas]


def test_answers_are_the_same_to_the_last_bit(made, monkeypatch):
    engine, products = engine_of(), []
    monkeypatch.setattr(
        packed_linear,
        "packed_product",
        lambda x, packed, bias: products.append(id(packed)) or packed_product(x, packed, bias),
    )
    found = answers(engine)
    assert all(delta.logprob is not None for tokens in found[1] for delta in tokens)
    assert len(set(products)) > 2 * 7 + 1  # the base's own, and factors
    monkeypatch.setattr(packed_linear, "MOST_BYTES", 1000)  # less than a second copy takes
    made.clear()
    plain = engine_of()
    assert answers(plain) == found
    assert made
    assert not {id(p) for p in plain.base.parameters()} & set(map(id, made))
    monkeypatch.setattr(packed_linear, "can_pack_weights", lambda: False)
    made.clear()
    assert answers(engine_of()) == found
    assert not made


def test_each_weight_is_packed_once(made):
    """However many copies of the model adapters are tried on."""
    engine = engine_of()
    own = {id(p) for p in engine.base.parameters()}
    bases = [id(weight) for weight in made if id(weight) in own]
    assert len(bases) == len(set(bases)) == 2 * 7 + 1


def test_what_is_not_bfloat16_stays_as_it_is(made):
    engine_of(torch.float32)
    assert not made
