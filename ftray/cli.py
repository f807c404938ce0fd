"""From command line and YAML to a :class:`~ftray.config.Config`, and from exceptions to exit codes.

Exit codes: 0 done, 1 a run failed, 2 the user's mistake (one line says which), 130 interrupted, 143 terminated.
"""

import argparse
import atexit
import errno
import gc
import importlib
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ftray.config import Config, at_home, config_from, parse_yaml, section_at
from ftray.errors import TERMINATED, RunFailed, Terminated, UserError, near
from ftray.runtime.threads import wait_briefly

atexit.register(gc.freeze)  # else a command that has imported torch collects garbage for a second before it is gone


@dataclass(frozen=True)
class Command:
    """What the command line knows of a command."""

    summary: str
    flags: dict[str, str]  # short flag -> dotted field of Config
    example: str  # one a line
    reads: tuple[str, ...]  # sections and fields that it reads beside those of its flags; others are refused
    module: str = ""  # ftray/<module>.py holds its `run(config)`; default: of the command's own name
    argument: str = ""  # the field that is given without a flag


DATA = {
    "data": "data.source",
    "validation-data": "data.validation",
    "test-data": "data.test",
    "model": "model.name",
    "task": "task",
}
START = {"from": "start.adapter", "from-as": "start.form", "stages": "stages"}
SCORING = ("evaluation.generate", "evaluation.max_new_tokens", "evaluation.batch_size")
COMMANDS = {
    "preprocess": Command(
        "tokenize a data set into cached shards and show statistics and a sample",
        {**DATA, "show": "show"},
        "ftray preprocess --data records.jsonl --model smollm2-135m --show 10\n"
        "ftray preprocess --data chats/ --model path/to/model --data.max_length 2048 --data.overlong drop\n"
        "ftray preprocess --data records.jsonl --data.group user_id\n"
        "ftray preprocess --data s3://bucket/records.parquet --data.limit 10000",
        ("data", "model", "scaling.gpus_per_worker", "scaling.address"),  # the pass over the model is that of `tune`
    ),
    "train": Command(
        "train one adapter",
        {**DATA, **START, "method": "adapter.method", "output": "output"},
        "ftray train --data records.jsonl --method lora --adapter.rank 16 --output runs/one\n"
        "ftray train --config run.yaml --training.epochs 3 --scaling.workers 4 --training.zero_stage 2\n"
        "ftray train --data pairs.jsonl --from runs/sft --output runs/dpo\n"
        "ftray train --config run.yaml --output runs/one --resume",
        (
            *("model", "data", "adapter", "training", "resume"),
            *("scaling.workers", "scaling.cpus_per_worker", "scaling.gpus_per_worker", "scaling.address"),
            "scaling.price_per_hour",
            *("search.metric", "search.direction", "search.max_failures"),  # which of its checkpoints is the best
            *SCORING,
        ),
    ),
    "tune": Command(
        "search for the best adapter, prove it against the base model and merge it",
        {
            **DATA,
            **START,
            "space": "search.space",
            "trials": "search.trials",
            "pack": "search.pack",
            "time-budget": "search.time_budget",
            "concurrency": "search.concurrency",
            "max-failures": "search.max_failures",
            "warm-start": "search.warm_start",
            "output": "output",
            "plan": "plan",
            "ui": "ui.serve",
            "host": "ui.host",
            "port": "ui.port",
        },
        "ftray tune --data records.jsonl --space methods --trials 32 --output runs/search\n"
        "ftray tune --data records.jsonl --space my-space.yaml --plan\n"
        "ftray tune --data records.jsonl --output runs/search --ui --port 9000\n"
        "ftray tune --data pairs.jsonl --output runs/preferred\n"
        "ftray tune --data judged.jsonl --training.beta 0.3\n"
        "ftray tune --data pairs.jsonl --from runs/sft --output runs/dpo\n"
        "ftray tune --data pairs.jsonl --stages sft,dpo --output runs/both\n"
        "ftray tune --data records.jsonl --space methods --trials 64 --output runs/search --resume",
        (
            *("model", "data", "training", "scaling", "search", "ui", "resume"),
            *(*SCORING, "evaluation.records", "evaluation.bootstrap", "evaluation.samples"),
        ),
    ),
    "status": Command(
        "show how far a search is, from any terminal that sees its output or its cluster",
        {"run": "output", "watch": "request.watch"},
        "ftray status --run runs/search\nftray status --run s3://bucket/runs/search --watch\n"
        "ftray status --run raysubmit_8tdZtxgNQxRVWq3f",
        ("scaling.address",),
    ),
    "stop": Command(
        "end a trial of a running search, or the search; what it has reached counts",
        {"run": "output", "prove": "request.prove"},
        "ftray stop 3 --run runs/search\nftray stop 12 --run /shared/runs/search\nftray stop --prove --run runs/search",
        ("scaling.address",),
        argument="request.trial",
    ),
    "pause": Command(
        "let a running search hold its trials where they are, or train on",
        {"run": "output", "off": "request.off"},
        "ftray pause --run runs/search\nftray pause --run runs/search --off",
        ("scaling.address",),
    ),
    "add": Command(
        "let a running search try a configuration of yours next",
        {"run": "output"},
        "ftray add '{adapter: {method: lora, rank: 64}, training: {learning_rate: 0.001}}' --run runs/search\n"
        'ftray add \'{"adapter": {"method": "ia3"}}\' --run runs/search',
        ("scaling.address",),
        argument="request.configuration",
    ),
    "clone": Command(
        "let a running search train a new trial from the weights of one, with other settings",
        {"run": "output"},
        "ftray clone 3 --run runs/search --training.learning_rate 1e-4\n"
        "ftray clone 12 --run runs/search --training.schedule constant --adapter.dropout 0.1",
        ("training", "adapter", "scaling.address"),
        argument="request.trial",
    ),
    "evaluate": Command(
        "score a base model and any number of adapters on the same records",
        {**DATA, "adapter": "adapters", "split": "evaluation.split", "suite": "suite.tasks", "output": "output"},
        "ftray evaluate --data records.jsonl --adapter runs/one/adapter\n"
        "ftray evaluate --model path/to/model --adapter runs/a --adapter runs/b --data held-out.jsonl --split all\n"
        "ftray evaluate --model runs/search/best/merged --data records.jsonl --output scores.json\n"
        "ftray evaluate --adapter runs/one --data records.jsonl --suite lm-eval:arc_easy,hellaswag --suite.limit 500",
        ("model", "data", "evaluation", "suite", "training.reward", "scaling.gpus_per_worker", "scaling.address"),
    ),
    "ui": Command(
        "serve a live page of a search: its report as it grows, with buttons to lead it; also of one that is over",
        {"run": "output", "host": "ui.host", "port": "ui.port"},
        "ftray ui --run runs/search\n"
        "ftray ui --run s3://bucket/runs/search --port 9000\n"
        "ftray ui --run /shared/runs/search --host 0.0.0.0 --ui.api_key_file key.txt",
        ("ui.api_key_file", "ui.endpoint", "ui.beside", "scaling.address"),
    ),
    "report": Command(
        "write report.html, one file that shows all of a search, a training run or an evaluation",
        {"run": "output", "png": "png"},
        "ftray report --run runs/search\n"
        "ftray report --run runs/search --png\n"
        "ftray report --run s3://bucket/runs/search --scaling.price_per_hour 2.5",
        ("scaling.price_per_hour", "scaling.address"),
    ),
    "infer": Command(
        "generate: one prompt, a file of prompts, or a conversation on the terminal",
        {
            "model": "model.name",
            "adapter": "adapters",
            "prompt": "generation.prompt",
            "file": "generation.file",
            "output": "output",
        },
        "ftray infer --adapter runs/one/adapter --prompt 'f o x'\n"
        "ftray infer --adapter runs/one/adapter --file prompts.jsonl --output answers.jsonl\n"
        "ftray infer --model path/to/model --generation.temperature 0.7 --generation.top_p 0.9",
        (
            *("model", "generation", "task", "evaluation.batch_size"),
            *("data.fields", "data.delimiter", "data.encoding", "data.template", "data.chat_template"),
        ),
    ),
    "merge": Command(
        "turn an adapter, several, or a sharded ZeRO checkpoint into a plain model or one adapter",
        {
            "model": "model.name",
            "adapter": "adapters",
            "weights": "merge.weights",
            "combination": "merge.combination",
            "density": "merge.density",
            "form": "merge.form",
            "output": "output",
        },
        "ftray merge --adapter runs/one/adapter --output merged\n"
        "ftray merge --adapter a --adapter b --weights 0.7,0.3 --combination ties --density 0.5 --output merged\n"
        "ftray merge --adapter runs/one/train/checkpoint_000003 --form adapter --output adapter",
        ("model", "merge", "task"),
    ),
    "export": Command(
        "take an adapter to other tools, and prove it again on what was written",
        {
            "run": "export.run",
            "trial": "export.trial",
            "adapter": "adapters",
            "to": "export.to",
            "precision": "export.precision",
            "repo": "export.repo",
            "form": "export.form",
            "dry-run": "export.dry_run",
            **DATA,
            "split": "evaluation.split",
            "output": "output",
        },
        "ftray export --run runs/search --to gguf\n"
        "ftray export --run runs/search --to ollama --precision q4_k_m --output my-model\n"
        "ftray export --run runs/search --trial 3 --to vllm\n"
        "ftray export --adapter runs/one/adapter --to mlx-adapter --output for-mlx\n"
        "ftray export --run runs/search --to onnx --precision int4\n"
        "ftray export --run runs/search --to hub --repo me/terse --dry-run\n"
        "ftray export --adapter path/to/adapter --data held-out.jsonl --split all --to gguf --output files",
        ("model", "data", "evaluation", "export", "scaling.address"),
    ),
    "config": Command(
        "print the reference of all configuration; with flags or a file, the configuration that they make",
        DATA,
        "ftray config\nftray config --config run.yaml --training.epochs 3 > resolved.yaml",
        tuple(Config.model_fields),
        "reference",
    ),
    "serve": Command(
        "answer over HTTP as OpenAI does: one base model, many adapters",
        {
            "run": "serving.run",
            "adapter": "adapters",
            "merged": "serving.merged",
            "engine": "serving.engine",
            "model": "model.name",
            "host": "serving.host",
            "port": "serving.port",
        },
        "ftray serve --run runs/search\n"
        "ftray serve --model path/to/model --adapter terse=runs/a/adapter --adapter kind=runs/b/adapter\n"
        "ftray serve --run runs/search --merged --port 9000\n"
        "ftray serve --run runs/search --engine vllm",
        (
            *("model", "serving", "task", "evaluation.batch_size"),
            *("scaling.cpus_per_worker", "scaling.gpus_per_worker", "scaling.address"),
        ),
    ),
}
# what the system says of a path that can't be had, whoever asked it
DENIED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR, errno.ENOTDIR)
IN_PLACE_OF = {"data.source": "data.sources", "data.sources": "data.source"}  # of which one is given
SEVERAL = ("adapters", "data.source", "data.validation", "data.test")
SWITCHES = {"resume": "resume", "verbose": "verbose"}
EXIT_CODES = (
    "exit codes: 0 done, 1 the run failed, 2 a mistake in what was asked (one line says which), 130 interrupted, "
    "143 terminated"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the `ftray` console command."""
    if "_ARGCOMPLETE" in os.environ:  # the shell asks what may follow
        complete()
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in COMMANDS:
        return run_command(argv[0], argv[1:])
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    print(f"usage: ftray COMMAND [--help] ...\n\n{listing}")
    if not argv or argv[0] in ("-h", "--help"):
        return 0
    print(f"ftray: no command {argv[0]!r}{near(argv[0], COMMANDS)}", file=sys.stderr)
    return 2


def run_command(name: str, argv: Sequence[str] | None = None) -> int:
    """Parse `argv`, run the command and turn what it raises into an exit code."""
    wait_briefly()
    try:
        config = parse(name, sys.argv[1:] if argv is None else argv)
        if not config.verbose:
            from ftray.runtime.cluster import quiet

            quiet()
        return importlib.import_module(f"ftray.{COMMANDS[name].module or name}").run(config) or 0
    except UserError as error:
        print(f"ftray {name}: error: {error}", file=sys.stderr)
        return 2
    except RunFailed as failure:
        print(f"ftray {name}: {failure}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in DENIED:
            raise
        print(f"ftray {name}: error: {error.filename or 'a file'}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"ftray {name}: interrupted", file=sys.stderr)
        return 130
    except Terminated:
        print(f"ftray {name}: terminated, with checkpoints: the same command with --resume continues", file=sys.stderr)
        return TERMINATED


def parse(name: str, argv: Sequence[str]) -> Config:
    """Build the configuration from the command line.

    A YAML file may hold sections that the command does not read, as several commands share one; the command line not.

    Raises:
        UserError: unknown flag or field, one that the command does not read, bad value, or a YAML file that can't be
            read.
    """
    parser = parser_of(name)
    try:
        known, rest = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from None
    values = read_yaml(known.config) if known.config else {}
    flags = {field: value for field, value in vars(known).items() if field != "config" and value is not None}
    pairs = _pairs(name, rest)
    give_way(values, {*flags, *(field for field, _ in pairs)})
    for field, value in flags.items():
        assign(values, field, value)
    for field, text in pairs:
        value = _value(field, text)
        for key in value if isinstance(value, dict) and field in sections() else ():
            refuse_unread(name, f"{field}.{key}")
        assign(values, field, value)
    return config_from(values)


def give_way(values: dict[str, Any], given: set[str]) -> None:
    """Take out of a YAML file's `values` what one of the `given` flags takes the place of."""
    for field in given & {*IN_PLACE_OF}:
        section, _, other = IN_PLACE_OF[field].partition(".")
        if IN_PLACE_OF[field] not in given and isinstance(values.get(section), dict):
            values[section].pop(other, None)


def _value(field: str, text: str) -> object:
    """A flag's value: text as it is typed where the field takes text, else what it says as YAML."""
    info = field_of(field) if field in fields() else None
    kinds = _kinds(info.annotation) if info else []
    is_yaml = (list in kinds and text.startswith("[")) or (dict in kinds and text.startswith("{"))
    if text in kinds or (str in kinds and not is_yaml):
        return text
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: 2000-99-99 looks like a date
        return text  # the field says what it takes instead


def _kinds(annotation: object) -> list[Any]:
    """The types that a field takes, of a choice its values."""
    if get_origin(annotation) in (list, dict):
        return [get_origin(annotation)]
    if not (parts := get_args(annotation)):
        return [annotation]
    if get_origin(annotation) is Literal:
        return list(parts)
    return [kind for part in parts for kind in _kinds(part)]


def reads(name: str, field: str) -> bool:
    """Whether a command reads a field, by its dotted name, or a whole section."""
    command = COMMANDS[name]
    view = {*command.reads, *command.flags.values(), command.argument, "verbose"}
    return field in view or field.partition(".")[0] in view


def view_of(name: str) -> str:
    """What a command reads beside its own flags: sections, with the fields where it doesn't read all of them."""
    command = COMMANDS[name]
    shown = [field for field in fields() if "." not in field and field in set(command.reads) - set(SWITCHES)]
    for section in sections():
        some = ", ".join(field.partition(".")[2] for field in _readable(name, section))
        if some:
            shown.append(section if reads(name, section) else f"{section} ({some})")
    return ", ".join(shown)


def _readable(name: str, section: str) -> list[str]:
    """The fields of a section that the command reads."""
    return [field for field in fields() if field.startswith(f"{section}.") and reads(name, field)]


def refuse_unread(name: str, field: str) -> None:
    """Refuse a field that the command does not read; a section is refused if it reads none of it.

    Raises:
        UserError: says who reads it, or what was probably meant.
    """
    section, dot, _ = field.partition(".")
    if section not in Config.model_fields:
        raise UserError(f"unknown option --{field}{near(section, Config.model_fields)}")
    if reads(name, field) or (not dot and _readable(name, field)):
        return
    if field not in fields() and (hint := near(field, _readable(name, section), otherwise="", likeness=0.8)):
        raise UserError(f"unknown option --{field}{hint}")
    others = [other for other in COMMANDS if other not in (name, "config") and _reads_any(other, field)]
    does = "do" if others[1:] else "does"
    raise UserError(f"--{field}: ftray {name} does not read it; {', '.join(others)} {does}")


def _reads_any(name: str, field: str) -> bool:
    """Whether the command reads the field, or, of a section or where there is no such field, any of the section."""
    return reads(name, field) if field in fields() else bool(_readable(name, field.partition(".")[0]))


def parser_of(name: str, parser: argparse.ArgumentParser | None = None) -> argparse.ArgumentParser:
    """The command's own flags, `--config` and switches; added to `parser` if one is given."""
    command = COMMANDS[name]
    parser = parser or argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    examples = "\n".join(f"  {line}" for line in command.example.splitlines())
    parser.prog, parser.description = f"ftray {name}", command.summary
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        f"fields: --section.key value of {view_of(name)}; see ftray config\n\nexamples:\n{examples}\n\n{EXIT_CODES}"
    )
    if given := command.argument:
        parser.add_argument(given, nargs="?", metavar=given.rpartition(".")[2].upper(), help=describe(given))
        for field in fields():  # else their values could be taken for the argument
            if reads(name, field) and field not in (*command.flags.values(), *SWITCHES.values(), given):
                said = describe(field).replace("%", "%%")
                parser.add_argument(f"--{field}", type=partial(_value, field), help=said)
    parser.add_argument("--config", metavar="FILE", help="YAML file; sections of other commands are left alone")
    switches = {flag: field for flag, field in SWITCHES.items() if reads(name, field)}
    for flag, field in {**command.flags, **switches}.items():
        annotation = field_of(field).annotation
        if annotation is bool:
            parser.add_argument(
                f"--{flag}", dest=field, action="store_true", default=None, help=describe(field).replace("%", "%%")
            )
            continue
        several = field in SEVERAL
        parser.add_argument(
            f"--{flag}",
            dest=field,
            action="append" if several else "store",
            help=describe(field).replace("%", "%%") + ("; again for each further one" if several else ""),
            metavar=flag.upper(),
        )
    return parser


def complete() -> None:
    """Answer the shell with commands, flags, every field and the values of those that are choices; then exit."""
    import argcomplete
    from argcomplete.completers import BaseCompleter, FilesCompleter

    class Values(BaseCompleter):
        def __call__(self, *, prefix: str, action: argparse.Action, **context: object) -> Iterable[str]:
            field = action.dest
            return dict.fromkeys(choices_of(field), describe(field)) or FilesCompleter()(prefix)

    parser = argparse.ArgumentParser(prog="ftray", allow_abbrev=False)
    commands = parser.add_subparsers()
    for name, command in COMMANDS.items():
        own = parser_of(name, commands.add_parser(name, help=command.summary, allow_abbrev=False))
        for field in fields():
            if "." in field and reads(name, field) and not command.argument:  # the others are flags already
                own.add_argument(f"--{field}", help=describe(field).replace("%", "%%"))
    argcomplete.autocomplete(parser, default_completer=Values())


def fields() -> list[str]:
    """The dotted name of every field of :class:`~ftray.config.Config`."""
    names = []
    for name, field in Config.model_fields.items():
        model: Any = field.annotation
        names += [f"{name}.{key}" for key in model.model_fields] if _is_model(model) else [name]
    return names


def _pairs(command: str, rest: list[str]) -> list[tuple[str, str]]:
    flags = [*COMMANDS[command].flags, *(flag for flag in SWITCHES if reads(command, flag)), "config"]
    pairs, i = [], 0
    while i < len(rest):
        name, equals, value = rest[i].partition("=")
        if not name.startswith("--"):
            raise UserError(f"unexpected argument {rest[i]!r}: options start with --")
        flag = name.removeprefix("--")
        if "." not in flag and flag not in Config.model_fields:
            others = [other for other in COMMANDS if flag in COMMANDS[other].flags]
            hint = f"; {', '.join(others)} {'has' if len(others) == 1 else 'have'} it" if others else near(flag, flags)
            raise UserError(f"unknown option {name}{hint}")
        refuse_unread(command, flag)
        if not equals:
            i += 1
            if i == len(rest) or rest[i].startswith("--"):
                raise UserError(f"{name} needs a value")
            value = rest[i]
        pairs.append((name.removeprefix("--"), value))
        i += 1
    return pairs


def read_yaml(path: str) -> dict[str, Any]:
    """The sections of a YAML file.

    Raises:
        UserError: it can't be read, or holds something else.
    """
    try:
        text = Path(str(at_home(path))).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    values = parse_yaml(text, path) or {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold a mapping of sections, not a {type(values).__name__}")
    return values


def assign(values: dict[str, Any], field: str, value: object) -> None:
    """Put a value at a dotted name.

    Raises:
        UserError: what should be its section is none.
    """
    *sections, key = field.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"{field}: {section} is not a section")
    values[key] = value


def sections() -> list[str]:
    """The fields of :class:`~ftray.config.Config` that hold others."""
    return [name for name, field in Config.model_fields.items() if _is_model(field.annotation)]


def _is_model(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def field_of(field: str) -> FieldInfo:
    """What a dotted name stands for."""
    *sections, key = field.split(".")
    return section_at(sections).model_fields[key]


def choices_of(field: str) -> list[str]:
    """The values of a field, by its dotted name; none: it is free."""
    if field not in fields():
        return []
    annotation = field_of(field).annotation
    if bool in (annotation, *get_args(annotation)):
        return ["true", "false"]
    parts = [annotation, *get_args(annotation)]
    return [str(value) for part in parts if get_origin(part) is Literal for value in get_args(part)]


def describe(field: str) -> str:
    """What a field means, and its default."""
    info = field_of(field)
    default = "" if info.default in (None, False, []) or info.is_required() else f" (default: {info.default})"
    return f"{info.description or field.rsplit('.', 1)[-1].replace('_', ' ')}{default}"
