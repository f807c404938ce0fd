"""Tokenize a data set into cached shards and show the result."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from ftray.arguments import Data, Settings, StrPath, command, config_of
from ftray.cli import run_command
from ftray.config import Config, ModelConfig
from ftray.reports.data import CLOSE, LEARNT, MASKED, OPEN, describe, duplicates, histogram, marked, rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ftray.data import TokenizedData


@dataclass(frozen=True)
class Preprocessed:
    """Records as tokens.

    Attributes:
        data: the shards, whose `splits` have counts and `rows(split, n)` the first records.
        tokenizer: that they were tokenized with.
        reference: directory of what the model says of preferences before training; None: the task needs none.
    """

    data: "TokenizedData"
    tokenizer: "PreTrainedTokenizerBase"
    reference: str | None

    def __str__(self) -> str:
        """Statistics of every split, and what is there twice."""
        return "\n".join([describe(self.data), histogram(self.data, "train"), *duplicates(self.data)])

    def show(self, records: int = 1) -> None:
        """Print training records as the model sees them, what bears no loss dimmed or outside of marks."""
        _show(self.data, self.tokenizer, records)


@command
def preprocess(
    data: "Data | None" = None,
    *,
    validation_data: "Data | None" = None,
    test_data: "Data | None" = None,
    model: StrPath | Settings | None = None,
    task: str | None = None,
    scaling: Settings | None = None,
    config: Config | StrPath | Settings | None = None,
    verbose: bool | None = None,
) -> Preprocessed:
    """Tokenize a data set into cached shards.

    Args:
        data: records: a list of mappings, a frame, a data set or a path; or the section, with `source` one of these.
        model: directory, hub id or .gguf file; or the section.
        config: YAML file or mapping of sections, over which the other arguments win.

    Raises:
        UserError: the data or the model can't be used; found before Ray starts in sources of up to 64 MiB.
    """
    found, refer = _tokenized(config_of("preprocess", locals()))
    return replace(found, reference=refer())


def _tokenized(cfg: Config) -> tuple[Preprocessed, Callable[[], str | None]]:
    """The records as tokens, and the pass over the model that finds out its `reference`, which takes longer."""
    from ftray.data import DataCheck, prepare
    from ftray.models.find import find
    from ftray.tasks.infer_task import infer_task

    model_path = find(cfg.model.name)
    check = DataCheck(cfg.data)
    cfg = infer_task(cfg, model_path, check.first)

    from ftray.data.limits import refuse_beyond, within_positions
    from ftray.models.load import load_skeleton, load_tokenizer
    from ftray.runtime.cluster import connect
    from ftray.search.reference import with_reference  # takes seconds: a name misspelt has been found by now

    tokenizer = load_tokenizer(model_path, cfg.model.trust_remote_code, cfg.data.chat_template)
    task = check.run(tokenizer, cfg.task)
    plain = ModelConfig(trust_remote_code=cfg.model.trust_remote_code)  # the places that it has, whatever its dtype
    skeleton = load_skeleton(plain, model_path, task).model
    data_cfg = within_positions(cfg.data, skeleton, lengths=check.lengths)
    begin_ray = partial(connect, cfg, dashboard=False)
    data = prepare(data_cfg, model_path, cfg.model.trust_remote_code, cfg.task, connect=begin_ray)
    refuse_beyond(data, data_cfg, skeleton, tokenizer)

    def refer() -> str | None:
        settled = cfg.model_copy(update={"data": data_cfg})
        return with_reference(settled, model_path, data, connect=begin_ray).reference or None

    return Preprocessed(data, tokenizer, None), refer


def run(cfg: Config) -> int:
    """The command: statistics of every split, and some records as the model sees them, what bears no loss dimmed.

    Raises:
        UserError: the data or the model can't be used; found before Ray starts in sources of up to 64 MiB.
    """
    found, refer = _tokenized(cfg)
    print(found)
    found.show(cfg.show)
    print(f"shards {found.data.directory}", flush=True)
    if reference := refer():
        print(f"reference {reference}")
    return 0


def _show(data: "TokenizedData", tokenizer: "PreTrainedTokenizerBase", records: int) -> None:
    """Print training records as the model sees them."""
    console = Console()
    styled = console.is_terminal and not console.is_dumb_terminal
    for number, row in enumerate(data.rows("train", records) if records else [], 1):
        text = rendered(row, tokenizer, data.task.full_name)
        if styled:
            console.print(Text.assemble(f"record {number}, ", ("context", MASKED), " and ", ("learnt", LEARNT), ":"))
            console.print(text, soft_wrap=True)
        else:
            print(f"record {number}, what is learnt in {OPEN} {CLOSE}:\n{marked(text)}")


if __name__ == "__main__":
    sys.exit(run_command("preprocess"))
