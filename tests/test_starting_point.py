"""Training that starts from an adapter, merged or kept, and stages of it: by real commands, over tiny models."""

import json
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from helpers.searches import run_here
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from ftray.adapters import lora_init
from ftray.adapters.methods import attach
from ftray.config import AdapterConfig, Config, DataConfig, ModelConfig
from ftray.data import TokenizedData, prepare
from ftray.errors import UserError
from ftray.models.load import load_base
from ftray.multi_adapter.shared_model import share, trainable
from ftray.search.reference import log_probabilities
from ftray.search.results import checkpoints
from ftray.search.starting_point import find_start, kept_adapter
from ftray.storage.location import parse_location
from ftray.task_spec import TaskSpec
from ftray.training.checkpoint import start_from
from ftray.training.optimizer import TorchOptimizer
from ftray.training.pack import Pack

TEMPLATE = "{prompt}:"
SPACE = """
method: lora
lora: {rank: 4, alpha: 8, target_modules: [q_proj, v_proj]}
learning_rate: {log: [1.0e-3, 1.0e-2]}
"""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    with open(path, "w") as file:
        for _ in range(60):
            word = draw.choices("abcdefgh", k=draw.randint(3, 6))
            record = {"prompt": " ".join(word), "chosen": "".join(word).upper(), "rejected": "".join(reversed(word))}
            file.write(json.dumps(record) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def common(pairs, tmp_path_factory) -> list[str]:
    """Flags of all commands."""
    cache = tmp_path_factory.mktemp("shards")
    flags = {"data": pairs, "data.cache": str(cache), "model.dtype": "fp32", "evaluation.max_new_tokens": "4"}
    return [part for name, value in flags.items() for part in (f"--{name}", value)]


TRAINED = ["--training.steps", "6", "--training.batch_size", "4"]


def last(printed: str) -> str:
    """The last line of what `done` returned, but for what went to standard error beside it."""
    return [line for line in printed.splitlines() if not line.startswith(("reference: ", "base: "))][-1]


def done(command: str, *flags: str, code: int = 0) -> str:
    made = run_here(["", "", f"ftray.{command}", *flags])
    assert made.returncode == code, made.stdout + made.stderr
    return made.stdout + made.stderr


@pytest.fixture(scope="module")
def sft(cluster, tmp_path_factory, common, tiny_llama) -> Path:
    """What supervised fine-tuning of the good answers left, with a template of its own."""
    output = tmp_path_factory.mktemp("sft") / "out"
    shape = ["--method", "lora", "--adapter.rank", "4", "--training.learning_rate", "0.02"]
    started = ["--task", "sft", "--model", tiny_llama, "--data.template", TEMPLATE, "--output", str(output)]
    done("train", *common, *TRAINED, *started, *shape)
    return output


@pytest.fixture(scope="module")
def space(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("space") / "space.yaml"
    path.write_text(SPACE)
    return str(path)


def by_transformers(model: torch.nn.Module, rows: list[dict]) -> list[list[float]]:
    """The log-probability of both answers of each row, by the plain model."""
    found = []
    for row in rows:
        at = row["lengths"][0]
        both = []
        for part in (slice(0, at), slice(at, None)):
            ids, labels = torch.tensor(row["input_ids"][part]), torch.tensor(row["labels"][part])
            with torch.no_grad():
                said = (
                    model(input_ids=ids[None]).logits[0, -len(ids) :].log_softmax(-1)
                )  # after a prompt, if it has one
            learnt = (labels[1:] != -100).nonzero()[:, 0]
            both.append(said[learnt, labels[1:][learnt]].sum().item())
        found.append(both)
    return found


def plain(base: str, adapter: Path) -> PeftModel:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()


def test_good_answers_are_learnt_as_texts_are_and_share_the_splits_of_pairs(cluster, tmp_path, pairs, tiny_llama):
    fields = {"prompt": "prompt", "completion": "chosen"}
    made = {
        task: prepare(DataConfig(source=pairs, cache=str(tmp_path), fields=mapped), tiny_llama, task=task)
        for task, mapped in (("SFT", {}), ("DPO", {}), ("CAUSAL_LM", fields))
    }
    for split in ("train", "validation", "test"):
        rows = {task: data.rows(split) for task, data in made.items()}
        targets = {task: sorted((row["prompt"], row["target"]) for row in own) for task, own in rows.items()}
        assert targets["SFT"] == targets["DPO"]
        assert targets["SFT"]
    texts = {
        task: sorted((row["input_ids"].tolist(), row["labels"].tolist()) for s in data.splits for row in data.rows(s))
        if hasattr(next(iter(data.rows("train")))["input_ids"], "tolist")
        else sorted((list(row["input_ids"]), list(row["labels"])) for s in data.splits for row in data.rows(s))
        for task, data in made.items()
    }
    assert texts["SFT"] == texts["CAUSAL_LM"]


def test_sft_then_dpo_is_two_commands(cluster, tmp_path, common, sft, space, tiny_llama, capsys):
    output = tmp_path / "dpo"
    searched = [*common, *TRAINED, "--from", str(sft), "--space", space, "--trials", "2", "--output", str(output)]
    printed = done("tune", *searched)
    merged = plain(tiny_llama, sft / "adapter").merge_and_unload()
    made = AutoModelForCausalLM.from_pretrained(output / "base", dtype=torch.float32)
    for name, weight in merged.state_dict().items():
        assert torch.equal(made.state_dict()[name], weight), name
    assert f"{tiny_llama} with {sft} merged into it" in printed

    config = yaml.safe_load((output / "config.yaml").read_text())
    assert (config["task"], config["data"]["template"]) == ("DPO", TEMPLATE)
    best = output / "best" / "adapter"
    assert json.loads((best / "adapter_config.json").read_text())["base_model_name_or_path"] == str(output / "base")

    data = TokenizedData.load(shards(config, "DPO"))
    proof = json.loads((output / "summary.json").read_text())["proof"]
    rows = data.rows("test")
    before, after = by_transformers(made, rows), by_transformers(plain(str(output / "base"), best), rows)
    margins = [(a[0] - b[0]) - (a[1] - b[1]) for a, b in zip(after, before, strict=True)]
    assert proof["metrics"]["margin"]["base"] == 0.0
    assert proof["metrics"]["margin"]["best"] == pytest.approx(sum(margins) / len(margins), abs=1e-4)

    # all that works on what a search left
    capsys.readouterr()
    done("evaluate", *common, "--adapter", str(output), "--output", str(tmp_path / "scores.json"))
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["adapters"][str(output)]["margin"]["best"] == pytest.approx(
        proof["metrics"]["margin"]["best"], abs=1e-4
    )
    done("merge", "--adapter", str(output), "--model.dtype", "fp32", "--output", str(tmp_path / "whole"))
    ids = AutoTokenizer.from_pretrained(best)("a b c:", return_tensors="pt")["input_ids"]
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    assert torch.allclose(whole(ids).logits, plain(str(output / "base"), best)(ids).logits, atol=1e-4)

    stamp = (output / "base" / "MANIFEST.json").stat().st_mtime_ns
    done("tune", *searched, "--resume")
    assert (output / "base" / "MANIFEST.json").stat().st_mtime_ns == stamp
    assert "lora.rank: a kept adapter stays as it is, and a space varies training settings alone" in done(
        "tune", *searched, "--resume", "--from-as", "kept", code=2
    )


def shards(config: dict, task: str) -> str:
    """The newest directory of shards of a task."""
    cache = Path(config["data"]["cache"])
    found = [path.parent for path in cache.glob("*/manifest.json") if task in path.read_text()]
    return str(max(found, key=lambda path: path.stat().st_mtime))


def test_a_moved_search_is_served_and_scored_with_the_base_that_lies_in_it(cluster, tmp_path, common, sft, space):
    from ftray.cli import parse
    from ftray.serving.catalog import find_catalog, model_of_run

    output, moved = tmp_path / "here", tmp_path / "there"
    done("tune", *common, *TRAINED, "--from", str(sft), "--space", space, "--trials", "1", "--output", str(output))
    output.rename(moved)
    catalog = find_catalog(model_of_run(parse("serve", ["--run", str(moved)])))
    assert catalog.model_path == str(moved / "base")
    assert set(catalog.adapters) >= {"best"}
    done("evaluate", *common, "--adapter", str(moved), "--output", str(tmp_path / "scores.json"))
    assert json.loads((tmp_path / "scores.json").read_text())["model"] == str(moved / "base")


def test_a_kept_adapter_is_where_trials_begin_and_what_they_are_compared_with(
    cluster, tmp_path, common, sft, tiny_llama
):
    output = tmp_path / "kept"
    began = time.time()
    done("tune", *common, *TRAINED, "--from", str(sft), "--from-as", "kept", "--trials", "2", "--output", str(output))
    config = yaml.safe_load((output / "config.yaml").read_text())
    directory = Path(shards(config, "DPO"))
    start, bare = plain(tiny_llama, sft / "adapter"), AutoModelForCausalLM.from_pretrained(tiny_llama)

    (reference,) = (path for path in directory.glob("reference-*") if path.stat().st_mtime > began)
    assert matches(reference, directory, start)
    assert not matches(reference, directory, bare)

    summary = json.loads((output / "summary.json").read_text())
    rows = TokenizedData.load(str(directory)).rows("test")
    before, after = by_transformers(start, rows), by_transformers(plain(tiny_llama, output / "best" / "adapter"), rows)
    margins = [(a[0] - b[0]) - (a[1] - b[1]) for a, b in zip(after, before, strict=True)]
    metric = summary["proof"]["metrics"]["margin"]
    assert metric["base"] == 0.0
    assert metric["best"] == pytest.approx(sum(margins) / len(margins), abs=1e-4)
    of_bare = [(a[0] - b[0]) - (a[1] - b[1]) for a, b in zip(before, by_transformers(bare, rows), strict=True)]
    assert abs(sum(of_bare)) > 1e-3  # what the start would have, were the bare base the reference
    assert summary["start"] == f"{tiny_llama} with {sft}, kept"

    first, best = (
        json.loads((d / "adapter_config.json").read_text()) for d in (sft / "adapter", output / "best/adapter")
    )
    for name in ("r", "lora_alpha", "lora_dropout", "base_model_name_or_path"):
        assert best[name] == first[name]
    assert {*best["target_modules"]} == {*first["target_modules"]}


def matches(reference: Path, directory: Path, model: torch.nn.Module) -> bool:
    """Whether the log-probabilities in a directory of references are those of a model."""
    data = TokenizedData.load(str(directory), str(reference))
    rows = data.rows("validation")
    said = by_transformers(model, rows)
    return all(list(row["reference"]) == pytest.approx(own, abs=1e-4) for row, own in zip(rows, said, strict=True))


def test_an_untrained_kept_adapter_is_compared_with_itself(cluster, tmp_path, sft, common, tiny_llama):
    """A step so small that it rounds to nothing: the margins of a validation are those of the start over itself."""
    still = ["--training.steps", "1", "--training.batch_size", "4", "--training.learning_rate", "1e-30"]
    output = tmp_path / "still"
    done("train", *common, *still, "--from", str(sft), "--from-as", "kept", "--output", str(output))
    ((report, _),) = checkpoints(parse_location(str(output)) / "train")
    assert abs(report["validation_margin"]) < 1e-5
    start, end = (plain(tiny_llama, out / "adapter").state_dict() for out in (sft, output))
    assert all(torch.equal(weight, end[name]) for name, weight in start.items())


def test_stages_are_one_command_and_one_that_is_over_stays(cluster, tmp_path, common, space, tiny_llama):
    output = tmp_path / "both"
    stages = "[{task: sft, training: {learning_rate: 0.01}}, {task: dpo, training: {steps: 4}}]"
    all_of_it = ["tune", *common, *TRAINED, "--model", tiny_llama, "--space", space, "--trials", "2"]
    all_of_it += ["--output", str(output), "--stages", stages]
    printed = done(*all_of_it)
    first, second = (yaml.safe_load((output / name / "config.yaml").read_text()) for name in ("1-sft", "2-dpo"))
    assert (first["task"], second["task"]) == ("SFT", "DPO")
    assert (first["training"]["learning_rate"], first["training"]["steps"]) == (0.01, 6)
    assert second["training"]["steps"] == 4
    assert second["start"] == {"adapter": str(output / "1-sft"), "form": "merged"}
    assert last(printed) == f"stage    {output / '2-dpo' / 'best' / 'adapter'}"
    merged = plain(tiny_llama, output / "1-sft" / "best" / "adapter").merge_and_unload()
    made = AutoModelForCausalLM.from_pretrained(output / "2-dpo" / "base", dtype=torch.float32).state_dict()
    assert all(torch.equal(made[name], weight) for name, weight in merged.state_dict().items())

    stamp = (output / "1-sft" / "summary.json").stat().st_mtime_ns
    summary = json.loads((output / "2-dpo" / "summary.json").read_text())
    summary["proof"] = None  # as if it had been killed before
    (output / "2-dpo" / "summary.json").write_text(json.dumps(summary))
    printed = done(*all_of_it, "--resume")
    assert "stage 1 of 2, 1-sft: is over" in printed
    assert (output / "1-sft" / "summary.json").stat().st_mtime_ns == stamp
    assert json.loads((output / "2-dpo" / "summary.json").read_text())["proof"]["metrics"]["margin"]["base"] == 0.0


def test_the_adapter_of_a_stage_may_be_kept(cluster, tmp_path, common, tiny_llama):
    output = tmp_path / "both"
    flags = ["--model", tiny_llama, "--output", str(output), "--stages", "sft,dpo", "--from-as", "kept"]
    printed = done("train", *common, *TRAINED, *flags, "--adapter.rank", "2", code=2)
    assert "start.form kept: of which adapter" in printed
    stages = "[sft, {task: dpo, start: {form: kept}}]"
    printed = done("train", *common, *TRAINED, *flags[:-3], stages)
    first, second = (
        json.loads((output / name / "adapter" / "adapter_config.json").read_text()) for name in ("1-sft", "2-dpo")
    )
    assert (first["r"], first["base_model_name_or_path"]) == (second["r"], second["base_model_name_or_path"])
    assert last(printed) == f"stage    {output / '2-dpo' / 'adapter'}"


@pytest.fixture(scope="module")
def prompted(tmp_path_factory, tiny_llama) -> Path:
    """An adapter that can't be merged."""
    directory = tmp_path_factory.mktemp("prompted") / "adapter"
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config).save_pretrained(directory)
    return directory


def test_what_cannot_be_started_from_is_refused_in_one_line(
    cluster, tmp_path, common, sft, prompted, tiny_llama, tiny_gpt2
):
    def refused(*flags: str, command: str = "tune") -> str:
        more = [] if "--output" in flags else ["--output", str(tmp_path / "none")]
        printed = done(command, *common, *TRAINED, *flags, *more, code=2)
        assert len(printed.strip().splitlines()[-1:]) == 1
        assert not (tmp_path / "none").exists()
        return printed.strip().splitlines()[-1]

    damaged, labelled, spaces = tmp_path / "damaged", tmp_path / "labelled", tmp_path / "space.yaml"
    classes = AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=2)
    get_peft_model(classes, LoraConfig(task_type="SEQ_CLS", r=2)).save_pretrained(labelled)
    TaskSpec("SEQ_CLS", ("bad", "good")).save(labelled)
    shutil.copytree(sft / "adapter", damaged)
    (damaged / "adapter_model.safetensors").write_bytes(b"cut off")
    assert "is damaged" in refused("--from", str(damaged))
    assert "no such directory" in refused("--from", str(tmp_path / "nothing"))
    assert "was made for another base" in refused("--from", str(sft), "--model", tiny_gpt2)
    assert "start.form kept: of which adapter" in refused("--from-as", "kept", "--model", tiny_llama)
    assert "prompt_tuning can't be merged into the base: take --from-as kept" in refused("--from", str(prompted))
    assert "take --from-as kept, or ftray merge" in refused("--from", str(sft), "--output", "s3://runs/none")

    for task in ([], ["--task", "dpo"]):
        assert "is for SEQ_CLS, and DPO is to be learnt" in refused("--from", str(labelled), *task)

    kept = ["--from", str(sft), "--from-as", "kept"]
    for text, said in (
        ("method: {choice: [lora, ia3]}", "method lora, ia3: a kept adapter stays as it is"),
        ("method: lora\nlora: {rank: {choice: [2, 4]}}", "lora.rank: a kept adapter stays as it is"),
        ("method: ia3\nlearning_rate: 0.1", "method ia3: the adapter"),
    ):
        spaces.write_text(text)
        assert said in (line := refused(*kept, "--space", str(spaces)))
        assert "--from-as merged" in line
    assert "adapter.rank: the adapter" in refused(*kept, "--adapter.rank", "8", command="train")
    assert "training.zero_stage 3" in refused(*kept, "--training.zero_stage", "3", command="train")

    assert "stages[1], dpo: unknown key training.nonsense" in refused(
        "--stages", "[sft, {task: dpo, training: {nonsense: 1}}]", "--model", tiny_llama
    )
    assert "task DPO: stages say what is learnt" in refused("--stages", "sft,dpo", "--task", "dpo")
    assert "stages[0].task: must be 'auto', 'CAUSAL_LM'" in refused("--stages", "sfd")
    assert "stage 2-seq_cls: " in refused("--stages", "sft,seq_cls", "--model", tiny_llama)


def test_a_starting_adapter_that_has_changed_is_not_resumed_from(cluster, tmp_path, common, sft, space):
    adapter, output = tmp_path / "adapter", tmp_path / "out"
    shutil.copytree(sft / "adapter", adapter)
    (adapter / "MANIFEST.json").unlink()
    flags = [*common, *TRAINED, "--from", str(adapter), "--space", space, "--trials", "1", "--output", str(output)]
    done("tune", *flags)
    weights = {name: 2 * weight for name, weight in load_file(adapter / "adapter_model.safetensors").items()}
    save_file(weights, adapter / "adapter_model.safetensors", {"format": "pt"})
    assert "has changed since output" in done("tune", *flags, "--resume", code=2)


ADAPTERS = {
    "lora": {"rank": 4, "dropout": 0.1, "use_rslora": True},
    "dora": {"method": "lora", "use_dora": True, "target_modules": "attention"},
    "ia3": {},
    "oft": {"block_size": 16},
    "vera": {},
    "ln_tuning": {},
    "prompt_tuning": {"virtual_tokens": 3},
    "prefix_tuning": {"virtual_tokens": 3},
    "lora with a head": {
        "method": "peft",
        "config": {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    },
    "lora from what it took": {"method": "lora", "init": "pissa", "target_modules": "attention-qv"},
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_what_trials_begin_with_says_what_the_saved_adapter_says(tmp_path, tiny_llama, name):
    adapter, base = (
        AdapterConfig(**{"method": name, **ADAPTERS[name]}),
        load_base(ModelConfig(dtype="fp32"), tiny_llama),
    )
    first = attach(replace(base, model=share(base.model)), adapter, 10, 0)
    with torch.no_grad():
        for parameter in trainable(first):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    lora_init.save(first, TaskSpec(), tmp_path / "saved")

    model = attach(replace(base, model=share(base.model)), kept_adapter(tmp_path / "saved"), 10, 1)
    start_from(model, tmp_path / "saved")
    lora_init.save(model, TaskSpec(), tmp_path / "again")
    before, after = (load_file(tmp_path / where / "adapter_model.safetensors") for where in ("saved", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())

    pack = Pack(base.model.requires_grad_(False), TaskSpec.named("DPO"))
    pack.add("start", model, TorchOptimizer(model, torch.optim.SGD(trainable(model), 0.0)))
    rows = [
        {
            "input_ids": [5, 6, 7, 8, 9, 5, 6, 7, 10],
            "labels": [-100, -100, 7, 8, 9, -100, -100, 7, 10],
            "lengths": [5, 4],
        },
        {"input_ids": [11, 12, 13, 11, 14], "labels": [-100, 12, 13, -100, 14], "lengths": [3, 2]},
    ]
    wanted = by_transformers(plain(tiny_llama, tmp_path / "saved"), rows)
    for got, own in zip(log_probabilities(pack, rows), wanted, strict=True):
        assert got == pytest.approx(own, abs=2e-4)
    bare = by_transformers(base.model, rows)
    assert (
        max(abs(a - b) for own, other in zip(wanted, bare, strict=True) for a, b in zip(own, other, strict=True)) > 1e-3
    )


@pytest.mark.parametrize(("name", "said"), [("adalora", "the ranks of adalora"), ("p_tuning", "not the encoder")])
def test_methods_that_cannot_go_on_say_so(tmp_path, tiny_llama, name, said):
    base = load_base(ModelConfig(dtype="fp32"), tiny_llama)
    model = attach(replace(base, model=share(base.model)), AdapterConfig(method=name), 10, 0)
    lora_init.save(model, TaskSpec(), tmp_path)
    cfg = Config.model_validate({"start": {"adapter": str(tmp_path), "form": "kept"}, "model": {"dtype": "fp32"}})
    with pytest.raises(UserError, match=said):
        find_start(cfg)
