"""What a model has places for, and what is said of data that is beyond."""

import json
import random
from pathlib import Path

import pyarrow as pa
import pytest
import torch
import transformers as t
import yaml
from conftest import bert, gpt2, llama, t5

from ftray.config import AdapterConfig, DataConfig, config_from
from ftray.data.limits import check_special_tokens, refuse_beyond, within_positions
from ftray.data.shards import SCHEMA, SplitWriter, TokenizedData
from ftray.errors import UserError
from ftray.models.limits import positions, rope_length
from ftray.train import check as check_training

SMALL = {
    "vocab_size": 384,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
MODELS = {
    "gpt2": (gpt2, 512),
    "bert": (bert, 512),
    "llama": (llama, None),
    "t5": (t5, None),
    "roberta": (lambda: t.RobertaModel(t.RobertaConfig(**SMALL, max_position_embeddings=42)), 40),
    "deberta": (lambda: t.DebertaV2Model(t.DebertaV2Config(**SMALL, max_position_embeddings=40)), 40),
    "neox": (lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**SMALL, max_position_embeddings=40)), None),
    "opt": (
        lambda: t.OPTForCausalLM(
            t.OPTConfig(
                vocab_size=384,
                hidden_size=32,
                word_embed_proj_dim=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                ffn_dim=32,
                max_position_embeddings=40,
            )
        ),
        40,
    ),
    "bart": (
        lambda: t.BartModel(
            t.BartConfig(
                vocab_size=384,
                d_model=32,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=32,
                decoder_ffn_dim=32,
                max_position_embeddings=40,
            )
        ),
        40,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_so_many_positions_work_and_one_more_does_not(name):
    make, wanted = MODELS[name]
    model = make().eval()
    assert positions(model) == wanted

    def works(length: int) -> bool:
        more = {"decoder_input_ids": torch.full((1, 2), 5)} if model.config.is_encoder_decoder else {}
        try:
            with torch.no_grad():
                model(input_ids=torch.full((1, length), 5), **more)
        except (IndexError, RuntimeError):
            return False
        return True

    assert works(wanted or 600)
    assert works((wanted or 600) + 1) == (wanted is None)


def test_a_length_that_is_not_given_is_what_the_model_has_places_for(capsys):
    model = gpt2()
    assert within_positions(DataConfig(), model, 12).max_length == 500
    assert (
        capsys.readouterr().out
        == "data.max_length 500: the model has 512 positions, 12 of them for the adapter's own tokens\n"
    )
    given = DataConfig(max_length=600)
    assert within_positions(given, model) is given
    assert (
        "data.max_length 600: the model takes 512 tokens: a record that is longer is refused" in capsys.readouterr().out
    )
    assert within_positions(DataConfig(), llama()).max_length == 512
    assert capsys.readouterr().out == ""


def phi3() -> t.Phi3ForCausalLM:
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 24}
    sizes = {"max_position_embeddings": 96, "original_max_position_embeddings": 24, "pad_token_id": 0}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    return t.Phi3ForCausalLM(t.Phi3Config(**SMALL, **sizes, rope_parameters=rope))


def dynamic() -> t.LlamaForCausalLM:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    return t.LlamaForCausalLM(t.LlamaConfig(**SMALL, max_position_embeddings=24, rope_parameters=rope))


@pytest.mark.parametrize("make", [phi3, dynamic, llama, gpt2])
@torch.no_grad()
def test_up_to_a_length_rotary_positions_are_those_of_a_record_alone(make, tmp_path, tokenizer, capsys):
    """Of two records that share a pass, the shorter one is as alone, up to that length of the longer one."""
    torch.manual_seed(0)
    model = make().eval()
    alone = model(input_ids=torch.arange(10, 20)[None]).logits[0]

    def same_beside(length: int) -> bool:
        both = torch.stack([torch.arange(10, 10 + length), torch.arange(40, 40 + length)])
        return torch.allclose(model(input_ids=both).logits[0, :10], alone, atol=1e-5)

    limit = 24 if make in (phi3, dynamic) else None
    assert rope_length(model) == limit
    assert same_beside(24)
    assert same_beside(25) == (limit is None)
    data = shards(tmp_path, list(range(10, 35)))
    if limit:
        with pytest.raises(UserError, match=r"beyond 24 tokens the model's rotary positions .*: take 24"):
            refuse_beyond(data, DataConfig(max_length=512), model, tokenizer)
        assert within_positions(DataConfig(), model).max_length == 24
        assert capsys.readouterr().out.startswith("data.max_length 24: beyond 24 tokens the model's rotary positions")
        assert within_positions(DataConfig(max_length="auto"), model, 0, [50]).max_length == 24
    else:
        refuse_beyond(data, DataConfig(max_length=512), model, tokenizer)


def shards(directory, *records: list[int], lengths: tuple[int, ...] = ()) -> TokenizedData:
    writer = SplitWriter(directory, "train")
    empty = {"prompt": "", "target": "", "prompt_tokens": 1, "token_type_ids": [], "score": 0.0, "extra": ""}
    rows = [
        {"key": i, "input_ids": ids, "labels": ids, "lengths": list(lengths), **empty} for i, ids in enumerate(records)
    ]
    table = pa.Table.from_pylist(rows, SCHEMA)
    writer.add(table.append_column("truncated", [[0] * len(rows)]))
    return TokenizedData(str(directory), "", {"train": writer.close()})


def test_records_beyond_the_positions_and_tokens_beyond_the_embeddings(tmp_path, tokenizer):
    model, long = gpt2(), DataConfig(max_length=600)
    fits = shards(tmp_path, [5] * 512, [383])
    assert fits.splits["train"].highest == 383
    refuse_beyond(fits, long, model, tokenizer)
    with pytest.raises(
        UserError, match=r"has 512 tokens and the adapter puts 1 before it, but the model has 512 .* take 511"
    ):
        refuse_beyond(fits, long, model, tokenizer, 1)
    with pytest.raises(UserError, match=r"data.max_length 600: the longest record has 513 tokens, but .* take 512"):
        refuse_beyond(shards(tmp_path, [5] * 3, [6] * 513), long, model, tokenizer)
    refuse_beyond(shards(tmp_path, [6] * 600), long, llama(), tokenizer)
    with pytest.raises(UserError, match=r"of id 384, but the model has embeddings for 384 tokens"):
        refuse_beyond(shards(tmp_path, [5, 384]), DataConfig(), llama(), tokenizer)


def test_a_padding_token_beyond_the_embeddings_and_no_end(capsys):
    from conftest import make_tokenizer

    other = make_tokenizer()
    other.add_tokens([f"<extra {i}>" for i in range(200)])
    other.pad_token = "<extra 199>"
    with pytest.raises(UserError, match=f"'<extra 199>' has id {other.pad_token_id}, but .* 384 tokens: name another"):
        check_special_tokens("m", llama(), other)
    other.pad_token = other.eos_token = None
    check_special_tokens("m", llama(), other)
    assert (
        capsys.readouterr().out
        == "model m: its tokenizer has no eos_token: what is learnt has no end, answers run on\n"
    )


def test_training_plans_for_few_positions(tmp_path, words, tokenizer):
    t.GPT2LMHeadModel(t.GPT2Config(vocab_size=384, n_embd=64, n_layer=1, n_head=2, n_positions=40)).save_pretrained(
        tmp_path
    )
    tokenizer.save_pretrained(tmp_path)
    cfg = config_from({"model": {"name": str(tmp_path)}, "data": {"source": words}, "output": str(tmp_path / "out")})
    assert check_training(cfg)[0].data.max_length == 40
    prompted = cfg.model_copy(update={"adapter": AdapterConfig(method="prompt_tuning", virtual_tokens=5)})
    assert check_training(prompted)[0].data.max_length == 35


def test_auto_leaves_all_but_one_in_a_thousand_whole_if_the_model_takes_as_many(capsys):
    lengths = [*range(3, 2003)]  # 2000 of them: 1998 have at most 2000 tokens
    random.Random(0).shuffle(lengths)
    cfg = DataConfig(max_length="auto")
    roomy = llama(max_position_embeddings=4096)
    assert within_positions(cfg, roomy, 0, lengths).max_length == 2000
    assert capsys.readouterr().out == (
        "data.max_length 2000: of 2000 records 99.9% have at most 2000 tokens, the longest has 2002, "
        "and the model takes 4096\n"
    )
    assert within_positions(cfg, gpt2(), 12, lengths).max_length == 500
    assert within_positions(cfg, llama(), 0, lengths).max_length == 512
    assert within_positions(cfg, t5(), 0, [5, 7, 6]).max_length == 7  # no table and no such setting
    assert within_positions(cfg, gpt2(), 0, [1]).max_length == 2


def test_auto_goes_by_the_records_and_a_resumed_run_by_what_it_came_to(tmp_path, words, tiny_llama, tokenizer):
    told = {"model": {"name": tiny_llama}, "data": {"source": words, "max_length": "auto"}}
    cfg = config_from({**told, "output": str(tmp_path / "out")})
    records = [json.loads(line) for line in Path(words).read_text().splitlines()]
    chats = [
        tokenizer.apply_chat_template([{"role": "user", "content": r["input"]}], add_generation_prompt=True)[
            "input_ids"
        ]
        + tokenizer(r["output"] + "<|end|>")["input_ids"]
        for r in records
    ]
    assert check_training(cfg)[0].data.max_length == max(map(len, chats))
    (tmp_path / "out" / "train").mkdir(parents=True)
    begun = {**cfg.model_dump(), "task": "CAUSAL_LM"}
    begun["data"]["max_length"], begun["search"]["metric"] = 9, "validation_loss"
    (tmp_path / "out" / "config.yaml").write_text(yaml.safe_dump(begun))
    resumed = config_from({**told, "output": str(tmp_path / "out"), "resume": True})
    assert check_training(resumed)[0].data.max_length == 9
    not_given = config_from({"model": told["model"], "data": {"source": words}, "output": str(tmp_path / "out")})
    assert check_training(not_given.model_copy(update={"resume": True}))[0].data.max_length == 9
