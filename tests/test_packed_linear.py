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
    engine, used = engine_of(), set()
    monkeypatch.setattr(packed_linear, "packed_product", lambda x, w, b: used.add(id(w)) or packed_product(x, w, b))
    found = answers(engine)
    assert len(used) == len(made) == 2 * 7 + 1
    monkeypatch.setattr(packed_linear, "MOST_BYTES", 1000)  # less than a second copy takes
    plain = engine_of()
    assert len(made) == len(used)
    assert answers(plain) == found


def test_each_weight_is_packed_once(made):
    """However many copies of the model adapters are tried on."""
    engine_of()
    assert len(made) == len({id(weight) for weight in made}) == 2 * 7 + 1


def test_what_is_not_bfloat16_stays_as_it_is(made):
    engine_of(torch.float32)
    assert not made
