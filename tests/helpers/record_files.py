"""Files of records, read as a command reads them up to the tokens of each row."""

import json

from ftray.config import Config, config_from
from ftray.data import DataCheck
from ftray.data.formats import read_chunk
from ftray.data.splits import find_sources, split_of
from ftray.data.tokens import Tokens, spread
from ftray.models.load import load_tokenizer
from ftray.task_spec import IGNORE
from ftray.tasks.infer_task import infer_task

TEMPLATE = (  # with tools, as the templates of current models have them
    "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] or '' }}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


USER, END = "<|user|>", "<|end|>"
ASK = f"{END}<|assistant|>"


def lines(record, count: int = 40) -> str:
    return "".join(json.dumps(record(n)) + "\n" for n in range(count))


def config(source, model: str, chat_template: str | None, **data) -> Config:
    given = {"source": source if isinstance(source, list) else str(source), "chat_template": chat_template}
    given |= {"max_length": 200, "validation_fraction": 0.2, "test_fraction": 0.2}
    return config_from({"data": given | data, "model": {"name": model}})


def rows_of(cfg: Config, split: str = "train") -> tuple[str, list[tuple[str, Tokens]]]:
    """The task that is told from the records, and what all records of a source come to, by their split."""
    check = DataCheck(cfg.data)
    cfg = infer_task(cfg, cfg.model.name, check.first)
    tokenizer = load_tokenizer(cfg.model.name, False, cfg.data.chat_template)
    task = check.run(tokenizer, cfg.task).load()
    source = find_sources(cfg.data)[split]
    read = [(place, record) for chunk in source.chunks for place, record in read_chunk(chunk)]
    examples = [task.parse(record, place) for place, record in read]
    rows = spread(task.tokenize(examples, tokenizer, source.cfg))
    return cfg.task, [(split_of(read[i][1], source.cfg, split), row) for i, row in rows if row]


def said(row: Tokens, tokenizer) -> list[tuple[str, bool]]:
    """The text of a row in pieces, each with whether it is learnt."""
    pieces: list[tuple[list[int], bool]] = []
    for token, label in zip(row.input_ids, row.labels, strict=True):
        learnt = label != IGNORE
        if not pieces or pieces[-1][1] != learnt:
            pieces.append(([], learnt))
        pieces[-1][0].append(token)
    return [(tokenizer.decode(ids), learnt) for ids, learnt in pieces]


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def call(arguments):
    return [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}}]
