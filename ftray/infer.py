"""Generate: one prompt, a file of prompts, or a conversation on the terminal."""

import json
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from ftray.arguments import Data, Settings, StrPath, command, config_of
from ftray.cli import run_command
from ftray.config import COLDEST, Config
from ftray.errors import UserError
from ftray.storage.atomic import atomic_write
from ftray.storage.location import Location, parse_location
from ftray.task_spec import CHAT, RAW, TaskSpec

if TYPE_CHECKING:
    import pandas
    import torch
    from transformers import PreTrainedTokenizerBase, TextStreamer

    from ftray.data.inference import Renderer

HELP = "/reset starts a new conversation, /exit or Ctrl-D ends, Ctrl-C stops an answer"


@dataclass(frozen=True)
class Answers:
    """What was generated.

    Attributes:
        records: each prompt's record, with its answer as `generated`.
    """

    records: list[dict[str, Any]]

    @property
    def texts(self) -> list[str]:
        """The answers, in the order of the prompts."""
        return [record["generated"] for record in self.records]

    @property
    def table(self) -> "pandas.DataFrame":
        """A row a record."""
        import pandas

        return pandas.DataFrame(self.records)

    def __str__(self) -> str:
        return "\n".join(self.texts)

    def _repr_html_(self) -> str:
        html: str = self.table.to_html(index=False)
        return html


@command
def infer(
    prompt: str | None = None,
    *,
    file: "Data | None" = None,
    adapter: StrPath | None = None,
    model: StrPath | Settings | None = None,
    task: str | None = None,
    output: StrPath | None = None,
    stream: bool = False,
    generation: Settings | None = None,
    evaluation: Settings | None = None,
    data: Settings | None = None,
    config: Config | StrPath | Settings | None = None,
    verbose: bool | None = None,
) -> Answers:
    """Generate answers to a prompt, or to a file of prompts.

    Args:
        file: prompts: a list of mappings, a frame, a data set or a path.
        adapter: directory, URI, or what `train` and `tune` return.
        model: directory, hub id or .gguf file; or the section. Not given: the base that the adapter names.
        output: file of JSON lines that answers to `file` go to; not given: nothing is written.
        stream: print the answer to `prompt` as it is generated; it then ends at Ctrl-C.
        generation: fields of that section, as `{"temperature": 0.7}`.

    Raises:
        UserError: anything the user can mend, before weights are read.
    """
    cfg = config_of("infer", {name: value for name, value in locals().items() if name != "stream"})
    if cfg.generation.prompt is None and cfg.generation.file is None:
        raise UserError("infer: give a prompt or a file")
    asked = _asked(cfg)
    if asked.prompts is None or asked.records is None:
        prompt = cfg.generation.prompt or ""
        ids = asked.renderer.turns([("user", prompt)]) if cfg.generation.chat else asked.renderer.plain(prompt)
        said = asked.generator.stream(ids) if stream else asked.generator.batch([ids])[0]
        return Answers([{"prompt": prompt, "generated": said}])
    texts = asked.generator.batch(asked.prompts)
    answers = Answers([{**record, "generated": said} for (_, record), said in zip(asked.records, texts, strict=True)])
    if place := _output(cfg):
        place.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(place) as lines:
            lines.writelines(_lines(answers))
    return answers


@dataclass(frozen=True)
class Asked:
    """What answers, and the prompts of a file; None: there is no file."""

    generator: "Generator"
    renderer: "Renderer"
    records: list[tuple[object, dict[str, Any]]] | None
    prompts: list[list[int]] | None


def run(cfg: Config) -> int:
    """The command. Answers are printed as they are generated; those to a `--file` go to `output` if it is given.

    A prompt is rendered as in training: records of turns by the tokenizer's chat template, others by `data.template`,
    which defaults to that of the run that made the adapter. With neither prompt nor file, a conversation begins: each
    prompt holds all earlier turns, or, with `--generation.chat false`, its own line alone.

    Raises:
        UserError: anything the user can mend, before weights are read.
    """
    if cfg.generation.prompt is None and cfg.generation.file is None:
        asked = _asked(cfg)
        converse(cfg, asked.generator, asked.renderer)
        return 0
    answers = infer(config=cfg, stream=True)
    if cfg.generation.file is not None:
        print(f"generated {place}\n" if (place := _output(cfg)) else "".join(_lines(answers)), end="", flush=True)
    return 0


def _lines(answers: Answers) -> list[str]:
    return [json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in answers.records]


def _asked(cfg: Config) -> Asked:
    """Find everything, check it, and load the model.

    Raises:
        UserError: anything the user can mend, before weights are read.
    """
    from ftray.adapters.discovery import base_of, check_chat_template, data_settings, find_adapter, saved_task

    asked = cfg.generation
    if asked.prompt is not None and asked.file is not None:
        raise UserError("infer: --prompt and --file don't go together")
    if len(cfg.adapters) > 1:
        raise UserError("infer: takes one adapter: combine several with ftray merge, compare them with ftray evaluate")
    if asked.file is not None and (output := _output(cfg)):
        output.parent.check_writable()
    adapters = [find_adapter(name) for name in cfg.adapters]
    if (task := saved_task(cfg, adapters).name) != "CAUSAL_LM":
        raise UserError(f"infer: only CAUSAL_LM answers prompts, this is for {task}: take ftray evaluate, or merge it")
    model_path = base_of(cfg, adapters)

    # these take seconds to import: a name misspelt has been found by now
    from ftray.data.inference import Renderer, mapped, read_records
    from ftray.models.load import load_tokenizer

    data = data_settings(cfg, adapters[0] if adapters else Path(model_path))
    if asked.chat is False and data.template == "auto":
        data = data.model_copy(update={"template": RAW})
    tokenizer = load_tokenizer(model_path, cfg.model.trust_remote_code, data.chat_template)
    if asked.chat and not tokenizer.chat_template:
        raise UserError(f"generation.chat: the tokenizer of {model_path} has no chat template")
    trained = adapters[0] if adapters else Path(model_path)
    check_chat_template(trained, data, tokenizer)
    trained_as = TaskSpec.read(trained)
    raw = bool(trained_as and trained_as.template not in (None, CHAT))
    renderer = Renderer(tokenizer, data, asked.system, raw)
    records = prompts = None
    if asked.file is not None:
        records = list(read_records(asked.file, data))
        prompts = [renderer.record(where, record, bool(asked.chat)) for where, record in mapped(records, data)]
    generator = Generator(cfg, model_path, adapters[0] if adapters else None, tokenizer)
    for (where, _), prompt in zip(records or (), prompts or (), strict=True):
        generator.room(prompt, where)
    return Asked(generator, renderer, records, prompts)


class Generator:
    """Generates with the model and its adapter, on a GPU if there is one."""

    def __init__(self, cfg: Config, model_path: str, adapter: Path | None, tokenizer: "PreTrainedTokenizerBase"):
        from peft import PeftModel
        from transformers import set_seed

        from ftray.adapters.discovery import refuse_settings
        from ftray.models.limits import text_positions
        from ftray.models.load import load_on_device
        from ftray.models.stops import stop_tokens

        self.tokenizer, self.cfg = tokenizer, cfg
        self.model = load_on_device(cfg.model, model_path).model
        if adapter:
            with refuse_settings(adapter):
                self.model = PeftModel.from_pretrained(self.model, str(adapter))
        self.model.eval()
        self.stops = stop_tokens(tokenizer, self.model.config, self.model.generation_config)
        self.positions = text_positions(self.model)
        given = cfg.generation
        self.sampling: dict[str, Any] = {"do_sample": given.temperature >= COLDEST}
        if given.repetition_penalty is not None:
            self.sampling["repetition_penalty"] = given.repetition_penalty
        if given.temperature >= COLDEST:
            self.sampling |= {"temperature": given.temperature, "top_p": given.top_p, "top_k": given.top_k}
        set_seed(given.seed)

    def room(self, prompt: list[int], where: object) -> int:
        """The most tokens that are generated after `prompt`.

        Raises:
            UserError: the model has learnt no position for any; names `where`.
        """
        asked = self.cfg.generation.max_new_tokens
        if self.positions is None:
            return asked
        if len(prompt) >= self.positions:
            raise UserError(
                f"{where}: has {len(prompt)} tokens, but the model has {self.positions} positions: shorten the prompt"
            )
        return min(asked, self.positions - len(prompt))

    def stream(self, prompt: list[int]) -> str:
        """Print the answer as it is generated; Ctrl-C ends it. Returns its text.

        Raises:
            UserError: the prompt is too long.
        """
        import torch

        from ftray.models.stops import answer_text

        room = self.room(prompt, "generation.prompt")
        streamer, said = _streamer(self.tokenizer, self.stops), StopOnInterrupt()
        ids = torch.tensor([prompt], device=self.model.device)
        heard = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGINT, said.interrupt) if heard else None
        try:
            self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=room,
                eos_token_id=self.stops or None,
                pad_token_id=self.tokenizer.pad_token_id,
                use_cache=True,
                streamer=streamer,
                stopping_criteria=[said],
                **self.sampling,
            )
        except KeyboardInterrupt:
            streamer.end()
        finally:
            if before is not None:
                signal.signal(signal.SIGINT, before)
        if said.interrupted and (not sys.stdin.isatty() or self.cfg.generation.prompt is not None):
            raise KeyboardInterrupt
        return answer_text(self.tokenizer, said.ids[len(prompt) :], self.stops)

    def batch(self, prompts: list[list[int]]) -> list[str]:
        """The answers, in the order of `prompts`, decoded `evaluation.batch_size` at once."""
        from ftray.evaluation.generation import generate

        settings = self.cfg.evaluation.model_copy(update={"max_new_tokens": self.cfg.generation.max_new_tokens})
        rows = [{"input_ids": prompt, "prompt_tokens": len(prompt)} for prompt in prompts]
        return generate(self.model, self.tokenizer, rows, settings, **self.sampling)


def _streamer(tokenizer: "PreTrainedTokenizerBase", stops: list[int]) -> "TextStreamer":
    """Prints an answer as it is generated, without the token that ends it."""
    from transformers import TextStreamer

    from ftray.models.stops import framing

    unsaid = framing(tokenizer).union(stops)

    class Streamer(TextStreamer):
        def put(self, value: "torch.Tensor") -> None:
            if self.next_tokens_are_prompt or value.item() not in unsaid:
                super().put(value)

    return Streamer(tokenizer, skip_prompt=True)


class StopOnInterrupt:
    """A stopping criterion that stops after Ctrl-C, and keeps prompt and answer as `ids`.

    Libraries may catch and print an exception that Ctrl-C raises in one of their callbacks.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.interrupted = False

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """The signal handler; a second Ctrl-C doesn't wait for the next token.

        Raises:
            KeyboardInterrupt: it is the second.
        """
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True

    def __call__(self, input_ids: "torch.Tensor", scores: "torch.Tensor", **kwargs: object) -> "torch.Tensor":
        import torch

        self.ids = input_ids[0].tolist()
        return torch.full((len(input_ids),), self.interrupted, device=input_ids.device)


def _output(cfg: Config) -> Location | None:
    """The file that answers go to; None: to standard output."""
    if "output" not in cfg.model_fields_set:
        return None
    if Path(cfg.output).is_dir():
        raise UserError(f"output {cfg.output}: is a directory: name a file")
    return parse_location(cfg.output)


def converse(cfg: Config, generator: Generator, renderer: "Renderer") -> None:
    """Answer each line of standard input, until it ends.

    With a chat template a prompt holds all earlier turns; else each line is a plain prompt.
    """
    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401  # lets input() edit lines and recall them

        print(HELP, flush=True)
    chat = cfg.generation.chat
    if chat is None:
        chat = bool(generator.tokenizer.chat_template) and not renderer.raw
    turns: list[tuple[str, str]] = []
    while True:
        try:
            line = input("> " if terminal else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
            continue
        if line.strip() == "/exit":
            return
        if line.strip() == "/reset":
            turns.clear()
        elif line.strip() and chat:
            turns.append(("user", line))
            turns.append(("assistant", generator.stream(renderer.turns(turns))))
        elif line.strip():
            generator.stream(renderer.plain(line))


if __name__ == "__main__":
    sys.exit(run_command("infer"))
