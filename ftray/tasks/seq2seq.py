"""SEQ_2_SEQ_LM: from one text to another, by an encoder and a decoder."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from ftray.config import DataConfig, EvaluationConfig
from ftray.data import records
from ftray.data.reading import Seen
from ftray.data.shapes import is_empty
from ftray.data.tokens import Tokens
from ftray.errors import UserError
from ftray.evaluation.metrics import Scores
from ftray.models.limits import positions
from ftray.models.stops import answer_text, stop_tokens
from ftray.task_spec import IGNORE, RAW
from ftray.tasks import task
from ftray.tasks.task import Batch, Row, encode, types_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Task(task.PaddedTask):
    """Cross-entropy of the decoder's next token; one item a target token, its end included."""

    auto_class = "AutoModelForSeq2SeqLM"
    pipeline_tag = "text2text-generation"
    metrics: ClassVar[Mapping[str, str]] = {**task.TEXT, "token_error_rate": "min", "character_error_rate": "min"}
    generated = task.GENERATED
    shapes = records.SHAPES
    record_keys = "input/output, instruction/input/output or prompt/completion"
    usage_example = (
        "python -c \"import transformers as t; k = t.AutoTokenizer.from_pretrained('{path}'); "
        "m = t.AutoModelForSeq2SeqLM.from_pretrained('{path}'); "
        "print(k.decode(m.generate(**k('TEXT', return_tensors='pt'))[0]))\""
    )

    def parse_and_see(self, record: dict[str, Any], where: object) -> tuple[records.Example, Seen]:
        # nothing is rendered as a conversation here, so empty keys of one change nothing
        given = {key: v for key, v in record.items() if key not in records.CONVERSATION or not is_empty(v)}
        example, seen = super().parse_and_see(given, where)
        if example.messages is not None or not example.prompt:
            raise UserError(
                f"{where}: SEQ_2_SEQ_LM learns one text from another: records must hold {self.record_keys}, "
                "without system or history"
            )
        return example, seen

    def tokenize(
        self, examples: list[Any], tokenizer: "PreTrainedTokenizerBase", cfg: DataConfig
    ) -> list[Tokens | None]:
        # white space around the prompt marks where a decoder continues: here it would only be noise
        template = RAW if cfg.template == "auto" else cfg.template
        prompts = [template.replace("{prompt}", e.prompt).strip() for e in examples]
        given, cut = encode(prompts, None, tokenizer, cfg)
        wanted, cut_too = encode(None, None, tokenizer, cfg, text_target=[e.target for e in examples])
        end, result = tokenizer.eos_token_id, []
        for i, (example, prompt) in enumerate(zip(examples, prompts, strict=True)):
            ids, labels, too_long = list(given["input_ids"][i]), list(wanted["input_ids"][i]), max(cut[i], cut_too[i])
            if end is not None and labels[-1:] != [end] and not cut_too[i]:
                labels.append(end)  # not every tokenizer puts it
            tokens = Tokens(ids, labels, prompt, example.target, len(ids), too_long, types_of(given, i))
            result.append(None if too_long and cfg.overlong == "drop" else tokens)
        return result

    def logits(self, model: "PreTrainedModel", batch: Batch) -> torch.Tensor:
        """[records, target tokens, vocabulary], without the tokens that a method puts before them."""
        adapted = getattr(model, "module", model)  # DeepSpeed engine -> PEFT model
        shifted = _shifted(adapted, batch["labels"])
        logits = self.forward(model, batch, decoder_input_ids=shifted)["logits"]
        return logits[:, -shifted.shape[1] :].float()

    def _below(self, records: list[torch.Tensor], device: torch.device) -> Batch:
        return super()._below(records, device) | {"labels": pad_sequence(records, True, IGNORE).to(device)}

    def loss(self, model: "PreTrainedModel", batch: Batch) -> torch.Tensor:
        logits = self.logits(model, batch)
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")

    @torch.inference_mode()
    def score(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", rows: list[Row], cfg: EvaluationConfig
    ) -> Scores:
        loss, tokens, texts = np.zeros(len(rows)), np.zeros(len(rows)), [""] * len(rows)
        stops = stop_tokens(tokenizer, model.config, model.generation_config)
        room = positions(model)  # the decoder's table may end before
        most = cfg.max_new_tokens if room is None else min(cfg.max_new_tokens, room)
        settings = {"max_new_tokens": most, "do_sample": False, "eos_token_id": stops or None}
        for part, batch in self.batches(model, rows, cfg.batch_size):
            logits = self.logits(model, batch)
            each = F.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none").double()
            loss[part] = each.sum(1).cpu().numpy()
            tokens[part] = (batch["labels"] != IGNORE).sum(1).cpu().numpy()
            if cfg.generate:
                source = {name: batch[name] for name in ("input_ids", "attention_mask")}
                output = model.generate(**source, **settings, use_cache=True)
                for i, answer in zip(part, output[:, 1:].tolist(), strict=True):  # the first starts the decoder
                    texts[i] = answer_text(tokenizer, answer, stops)
        scores = Scores(loss, tokens)
        if cfg.generate:
            scores.add_generated(texts, [row["target"] for row in rows])
        return scores


def _shifted(model: "PreTrainedModel", labels: torch.Tensor) -> torch.Tensor:
    """What the decoder is given, int64 [records, most labels]: the labels one later, after what starts it.

    Raises:
        UserError: the model says neither how it shifts them nor what it starts with.
    """
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        whole = labels.masked_fill(labels == IGNORE, model.config.pad_token_id)  # FSMT looks for where a text ends
        try:
            shifted: torch.Tensor = model.prepare_decoder_input_ids_from_labels(labels=whole)
        except ValueError as error:  # of an encoder and a decoder that were put together
            raise UserError(f"SEQ_2_SEQ_LM: {' '.join(str(error).split())}") from None
        return shifted
    start = model.config.decoder_start_token_id
    start = model.generation_config.decoder_start_token_id if start is None else start
    if start is None:
        raise UserError("SEQ_2_SEQ_LM: the model's config.json has no decoder_start_token_id: give it one")
    shifted = torch.cat([labels.new_full((len(labels), 1), start), labels[:, :-1]], 1)
    return shifted.masked_fill(shifted == IGNORE, model.config.pad_token_id)
