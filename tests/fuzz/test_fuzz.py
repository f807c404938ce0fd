"""Whatever a user gives: it is taken, or refused in one line. `make fuzz` looks for what is neither for five minutes.

What was found stands as a plain test beside the code that it is about.
"""

import csv
import io
import json
import pickle
import shutil
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers
import yaml
from hypothesis import strategies as st

from ftray.adapters.lora_init import save
from ftray.adapters.methods import attach
from ftray.cli import COMMANDS, fields, parse, run_command
from ftray.config import AdapterConfig, DataConfig, ModelConfig, config_from
from ftray.data.check import DataCheck
from ftray.data.formats import read_chunk
from ftray.data.inference import Renderer, read_records
from ftray.data.record_task import record_task
from ftray.data.splits import find_sources
from ftray.data.tokens import spread
from ftray.errors import UserError
from ftray.models.load import load_base, load_tokenizer
from ftray.search.space import load_space
from ftray.task_spec import IGNORE, OBJECTIVES, TASKS, TaskSpec
from ftray.tasks.infer_task import infer_task
from fuzz.values import KEYS, NUMBERS, PREFERENCES, RAW, RECORDS, TEXTS, VALUES, fuzz, refused

pytestmark = pytest.mark.slow
KNOWN = st.sampled_from(sorted(fields()))
YAML = st.text("[]{}:,&*!|>'\"- \n\tab0~", max_size=20)
TYPED = (TEXTS | YAML | NUMBERS.map(str)).filter(lambda text: "\0" not in text)  # no argument of a command holds it
FIELDS = st.dictionaries(
    st.sampled_from(KEYS) | TEXTS,
    st.sampled_from([*KEYS, "messages.0.content", "{{ input }}", "{{ x.y }}", "{% for", "{{ input | x }}"]) | TEXTS,
    max_size=3,
)
TEMPLATES = st.sampled_from(["auto", "{prompt}", "{prompt}\n", "{{prompt}}{prompt}", "{prompt}{x}", "{prompt} {0}"])
CHATS = st.sampled_from([None, "chatml", "gemma", "llama3", "mistral", "zephyr"])
READING = st.fixed_dictionaries(
    {},
    optional={
        "fields": FIELDS,
        "template": TEMPLATES | TEXTS,
        "chat_template": CHATS,
        "delimiter": st.sampled_from([",", ";", "\t", "|", '"', "\n"]),
        "encoding": st.sampled_from(["utf-8", "utf-16", "latin-1", "ascii", "cp037", "base64", "idna", "punycode"]),
        "limit": st.sampled_from([1, 2, 100]),
        "max_length": st.sampled_from([2, 3, 8, 64]),
        "overlong": st.sampled_from(["truncate", "drop"]),
        "train_on_prompt": st.booleans(),
        "learn": st.sampled_from(["all", "last", "generation"]),
    },
)
FILES = st.sampled_from(["jsonl", "jsonl", "json", "csv", "tsv", "parquet", "txt", "jsonl.gz", "md"])


def written(path: Path, records: list[dict], raw: list[bytes]) -> None:
    """The records as a file of the kind that the path names, as far as that can hold them; and what is no record."""
    lines = [json.dumps(record).encode() for record in records]
    kind = path.suffix[1:]
    if kind == "json":
        lines = [json.dumps(records).encode()]
    elif kind in ("csv", "tsv"):
        table = io.StringIO(newline="")
        writer = csv.writer(table, delimiter="," if kind == "csv" else "\t", escapechar="\\")
        writer.writerow(records[0] if records else [])
        writer.writerows(record.values() for record in records)
        lines = [table.getvalue().encode(errors="surrogatepass")]
    elif kind in ("txt", "md"):
        lines = [str(value).encode(errors="surrogatepass") for record in records for value in record.values()]
    elif kind == "parquet":
        try:
            pq.write_table(pa.Table.from_pylist(records), path)
            return
        except (pa.ArrowException, OverflowError, UnicodeEncodeError, TypeError):  # no table holds them
            pass
    path.write_bytes(b"\n".join(lines + raw))


def test_records(tmp_path, tiny_llama):
    tokenizers = {None: load_tokenizer(tiny_llama)}
    unsplit = {"validation_fraction": 0, "test_fraction": 0}  # equal records share a split: the others may be empty

    def check(files, times, task, raw, reading):
        sources = []
        for i, (kind, records) in enumerate(files):
            sources.append(tmp_path / f"records-{i}.{kind}")
            written(sources[-1], records * times, raw)
        data = {"source": [str(path) for path in sources], "cache": str(tmp_path / "cache"), **unsplit, **reading}
        given = {"data": {"max_length": 64, **data}, "task": task}
        try:
            cfg = config_from(given)
            checked = DataCheck(cfg.data)
            task = infer_task(cfg, tiny_llama, checked.first).task
            if (chat := cfg.data.chat_template) not in tokenizers:
                tokenizers[chat] = load_tokenizer(tiny_llama, False, chat)
            spec = checked.run(tokenizers[chat], task)
        except UserError as error:
            refused(error, "records-", "task", "data", "QUESTION_ANS")
            return
        try:
            tokenized(cfg.data, tokenizers[chat], spec)
        except UserError as error:  # only a chat template refuses a record that the check has passed
            refused(error, "records-")

    files = st.lists(st.tuples(FILES, st.lists(RECORDS, min_size=1, max_size=6)), min_size=1, max_size=2)
    fuzz(
        check,
        files=files,
        times=st.sampled_from([1, 12]),
        task=st.sampled_from(["auto", *TASKS]),
        raw=st.just([]) | st.lists(RAW, max_size=2),
        reading=st.just({}) | READING,
    )


def tokenized(cfg: DataConfig, tokenizer, spec: TaskSpec) -> None:
    """Read and tokenize all records, as the tasks of a cluster do."""
    task = spec.load()
    for source in find_sources(cfg).values():
        for chunk in source.chunks:
            examples = [task.parse_and_see(record, place)[0] for place, record in read_chunk(chunk)]
            examples = pickle.loads(pickle.dumps(examples))
            rows = [row for _, row in spread(task.tokenize(examples, tokenizer, source.cfg)) if row]
            for row in rows:
                assert not row.lengths or sum(row.lengths) == len(row.input_ids)
                assert max([len(row.input_ids), *row.lengths][bool(row.lengths) :]) <= cfg.max_length
                assert all(0 <= token < len(tokenizer) for token in row.input_ids)
                pa.array([row.prompt, row.target, row.extra], pa.string())
            if rows:
                task.collate({name: [getattr(row, name) for row in rows] for name in task.columns})


def test_preferences(tiny_llama):
    tokenizers = {chat: load_tokenizer(tiny_llama, False, chat) for chat in (None, "chatml", "gemma", "llama3")}

    def check(objective, records, splits, chat, reading):
        task, tokenizer, cfg = record_task(TaskSpec.named(objective)), tokenizers[chat], DataConfig(**reading)
        examples = []
        for record in records:
            if "\ud83d" in json.dumps(record, ensure_ascii=False):  # which no file may hold
                continue
            try:
                examples.append(task.parse_and_see(record, "records-1")[0])
                json.dumps([task.group(examples[-1]), *task.parse_and_see(record, "records-1")[1].ignored])
            except UserError as error:
                refused(error, "records-1")
        examples = task.in_batch(pickle.loads(pickle.dumps(examples)), [*splits, *"ab" * 9][: len(examples)])
        try:
            rows = [row for row in task.tokenize(examples, tokenizer, cfg) if row]
        except UserError as error:
            refused(error, "records-1", "data")
            return
        for row in rows:
            assert not row.further
            assert len(row.labels) == len(row.input_ids)
            assert all(0 <= token < len(tokenizer) for token in row.input_ids)
            texts = row.lengths if len(row.lengths) == 2 else [len(row.input_ids)]
            assert sum(texts) == len(row.input_ids)
            assert max(texts) <= cfg.max_length
            start = 0
            for length in texts:
                labels = row.labels[start : start + length]
                assert {*labels[: row.prompt_tokens]} <= {IGNORE}
                assert row.input_ids[start : start + row.prompt_tokens] == row.input_ids[: row.prompt_tokens]
                assert objective == "GRPO" or any(label != IGNORE for label in labels[1:])
                start += length
            if objective == "DISTILLATION":
                taught = row.lengths[0] * sum(label != IGNORE for label in row.labels)
                assert len(row.teacher_ids) == len(row.teacher_logprobs) == taught
            pa.array([row.prompt, row.target, row.extra], pa.string())

    fuzz(
        check,
        objective=st.sampled_from(sorted(OBJECTIVES)),
        records=st.lists(PREFERENCES, min_size=1, max_size=4),
        splits=st.lists(st.sampled_from(["train", "test"]), max_size=4),
        chat=st.sampled_from([*tokenizers]),
        reading=st.fixed_dictionaries(
            {"max_length": st.sampled_from([2, 3, 8, 64])},
            optional={
                "template": TEMPLATES,
                "overlong": st.sampled_from(["truncate", "drop"]),
                "learn": st.sampled_from(["all", "last", "generation"]),
            },
        ),
    )


def test_prompts(tmp_path, tiny_llama):
    tokenizers = {chat: load_tokenizer(tiny_llama, False, chat) for chat in (None, "chatml", "gemma")}

    def check(records, raw, suffix, chat, system, template, chat_template):
        path = tmp_path / f"prompts{suffix}"
        written(path, records, raw)
        try:
            data = config_from({"data": {"template": template}, "generation": {"system": system}}).data
            renderer = Renderer(tokenizers[chat_template], data, system)
            for where, record in read_records(str(path)):
                assert all(isinstance(token, int) for token in renderer.record(where, record, chat))
        except UserError as error:
            refused(error, "prompts", "data", "generation")

    fuzz(
        check,
        records=st.lists(RECORDS, max_size=3),
        raw=st.lists(RAW, max_size=2),
        suffix=st.sampled_from([".jsonl", ".txt", ".json", ".csv"]),
        chat=st.booleans(),
        system=st.none() | TEXTS,
        template=TEMPLATES | TEXTS,
        chat_template=st.sampled_from([*tokenizers]),
    )


def test_configurations(tmp_path):
    def check(command, values, flags, raw):
        path, nested = tmp_path / "config.yaml", {}
        for name, value in values.items():
            section, _, key = name.partition(".")
            if key:
                nested.setdefault(section, {})
                if isinstance(nested[section], dict):
                    nested[section][key] = value
            else:
                nested[section] = value
        path.write_bytes(yaml.safe_dump(nested).encode(errors="surrogatepass") + raw)
        for arguments in (["--config", str(path)], [f"--{name}={text}" for name, text in flags.items()]):
            try:
                parse(command, arguments)
            except UserError as error:
                refused(error)

    fuzz(
        check,
        command=st.sampled_from(sorted(COMMANDS)),
        values=st.dictionaries(KNOWN | TEXTS, VALUES, max_size=4),
        flags=st.dictionaries(KNOWN, TYPED, max_size=3),
        raw=st.just(b"") | st.binary(max_size=40) | YAML.map(str.encode),
    )


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny_llama) -> Path:
    """As a training leaves it."""
    directory = tmp_path_factory.mktemp("adapter")
    transformers.utils.logging.disable_progress_bar()  # as a command does, before it imports transformers
    model = attach(load_base(ModelConfig(dtype="fp32"), tiny_llama), AdapterConfig(method="lora"), 1, 0)
    save(model, TaskSpec("CAUSAL_LM", template="{prompt}\n"), directory)
    return directory


def run_as_a_user(command: str, argv: list[str], capsys) -> int:
    """The exit code: 0, or that of a refusal in one line, after which nothing is there that was not there before."""
    before = sorted(Path().rglob("*"))
    code = run_command(command, argv)
    shown = capsys.readouterr()
    assert code in (0, 2), shown
    if code:
        shown.err.encode()
        assert len(shown.err.splitlines()) == 1, shown.err
        assert sorted(Path().rglob("*")) == before
    return code


def test_commands(tmp_path, monkeypatch, capsys, tiny_llama, words, adapter):
    """From a command line, or a file, to its exit code, as far as a command goes without Ray."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ftray.runtime.cluster.check_address", stop_here)
    monkeypatch.setattr("ftray.runtime.cluster.connect", stop_here)
    monkeypatch.setattr(
        "ftray.runtime.cluster.importing", lambda *modules: suppress(UserError)
    )  # checks come beside it
    monkeypatch.setattr("ftray.search.run_manifest.sole_driver", stop_here)
    left = ("verbose", "resume", "plan", "output", "data.cache", "scaling.address", "serving.run")
    readable = [name for name in sorted(fields()) if name not in left]
    records = {"data.source": words, "model.name": tiny_llama}
    needed = {
        "preprocess": records,
        "train": records | {"output": "out"},
        "tune": records | {"output": "out"},
        "evaluate": records | {"adapters": str(adapter)},
        "serve": {"model.name": tiny_llama},
        "infer": {"adapters": str(adapter), "generation.prompt": "a", "generation.max_new_tokens": "2"},
        "merge": {"adapters": str(adapter), "output": "out"},
        "config": {},
        "status": {"output": "out"},
        "stop": {"output": "out", "request.trial": "1"},
        "add": {"output": "out", "request.configuration": "{adapter: {method: lora}}"},
        "clone": {"output": "out", "request.trial": "1"},
        "pause": {"output": "out", "request.trial": "1"},
        "report": {"output": "out"},
        "ui": {"output": "out"},
        "export": {"export.run": "out", "export.to": "mlx-adapter", "output": "exported"},
    }
    assert {*needed} == {*COMMANDS}

    def check(command, flags, by_file):
        given = needed[command] | flags
        if by_file:
            nested: dict = {}
            for name, value in given.items():
                section, _, key = name.partition(".")
                nested |= {section: {**nested.get(section, {}), key: value} if key else value}
            tmp_path.with_suffix(".yaml").write_text(yaml.safe_dump(nested), encoding="utf-8")
            argv = ["--config", str(tmp_path.with_suffix(".yaml"))]
        else:
            argv = [f"--{name}={value}" for name, value in given.items()]
        if run_as_a_user(command, argv, capsys) == 0:
            assert command in ("infer", "merge", "config"), command
            shutil.rmtree("out", ignore_errors=True)

    fuzz(
        check,
        command=st.sampled_from([*needed]),
        flags=st.dictionaries(st.sampled_from(readable), TYPED, max_size=2),
        by_file=st.booleans(),
    )


def test_adapters(tmp_path, monkeypatch, capsys, adapter):
    """Of a directory that somebody else wrote, or that is damaged."""
    monkeypatch.chdir(tmp_path)
    damaged = tmp_path.parent / "damaged"

    def check(command, file, changes, raw):
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(adapter, damaged)
        content = json.dumps(json.loads((adapter / file).read_text()) | changes).encode()
        (damaged / file).write_bytes(content if raw is None else raw)
        more = ["--prompt", "a", "--generation.max_new_tokens", "2"] if command == "infer" else ["--output", "out"]
        run_as_a_user(command, ["--adapter", str(damaged), *more], capsys)
        shutil.rmtree("out", ignore_errors=True)

    files = {file.name: [*json.loads(file.read_text())] for file in sorted(adapter.glob("*.json"))}
    names = st.sampled_from(sorted({name for own in files.values() for name in own}))
    fuzz(
        check,
        command=st.sampled_from(["infer", "merge"]),
        file=st.sampled_from([*files]),
        changes=st.dictionaries(names | TEXTS, VALUES, max_size=2),
        raw=st.none() | st.none() | RAW,
    )


def stop_here(*args: object, **kwargs: object) -> None:
    raise UserError("would start")


def test_spaces(tmp_path):
    def check(content, raw):
        path = tmp_path / "space.yaml"
        path.write_bytes(yaml.safe_dump(content).encode(errors="surrogatepass") + raw)
        try:
            load_space(str(path)).corners()
        except UserError as error:
            refused(error, "space")

    kinds = st.dictionaries(
        st.sampled_from(["choice", "float", "log", "int", "times", "step"]) | TEXTS, VALUES, max_size=3
    )
    keys = st.sampled_from(["learning_rate", "batch_size", "lora", "ia3", "model", "steps"]) | TEXTS
    own = st.dictionaries(
        st.sampled_from(["rank", "alpha", "dropout", "target_modules"]) | TEXTS, kinds | VALUES, max_size=3
    )
    methods = st.sampled_from(["lora", ["lora", "ia3"]]) | VALUES
    spaces = st.builds(
        lambda m, rest: {**rest, "method": m}, methods, st.dictionaries(keys, kinds | own | VALUES, max_size=3)
    )
    fuzz(check, content=spaces | VALUES, raw=st.just(b"") | st.binary(max_size=10))
