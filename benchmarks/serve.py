"""16 clients over 4 adapters of SmolLM2-135M: `ftray serve` beside a server that calls generate for each request.

    python -m benchmarks.serve [--quick]

The peer is what one writes by hand: FastAPI, one PEFT model that holds all adapters, `set_adapter` and
`transformers.generate` with a streamer for each request in turn. Both answer the same prompts with the same number of
tokens, in turns, streamed, greedy, in the precision that ftray picks here. Also shown: the 95th percentile of the time
to the first text, the seconds from command to health, and the resident memory of ftray's replica with four adapters
over that with one.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch

from benchmarks.measure import beside, busy, machine, parser, show, versions

MODEL = "smollm2-135m"
RANKS = (4, 8, 16, 32)
CLIENTS = 16
WORDS = ["time", "river", "stone", "light", "house", "green", "train", "music", "paper", "water", "north", "glass"]


def make_adapters(directory: Path) -> list[str]:
    """One LoRA adapter of each rank on all linear layers, its update not zero; returns their names."""
    from peft import LoraConfig, get_peft_model

    from ftray.config import ModelConfig
    from ftray.models.find import find
    from ftray.models.load import load_base

    for rank in RANKS:
        torch.manual_seed(rank)
        base = load_base(ModelConfig(), find(MODEL)).model
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=rank, target_modules="all-linear"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.002)
        model.save_pretrained(directory / f"rank-{rank}")
    return [f"rank-{rank}" for rank in RANKS]


def peer(directory: str, port: int) -> None:
    """The usual server."""
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import StreamingResponse
    from peft import PeftModel
    from transformers import TextIteratorStreamer

    from ftray.config import ModelConfig
    from ftray.models.find import find
    from ftray.models.load import load_base, load_tokenizer

    base, tokenizer = load_base(ModelConfig(), find(MODEL)).model, load_tokenizer(find(MODEL))
    base.config.use_cache = True
    names = [f"rank-{rank}" for rank in RANKS]
    model = PeftModel.from_pretrained(base, f"{directory}/{names[0]}", adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(f"{directory}/{name}", name)
    model.eval()
    app, one_at_a_time = FastAPI(), threading.Lock()

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/completions")
    async def completions(request: Request) -> StreamingResponse:
        asked = await request.json()

        def stream() -> Any:
            with one_at_a_time:
                model.set_adapter(asked["model"])
                inputs = tokenizer(asked["prompt"], return_tensors="pt")
                streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
                most = asked["max_tokens"]
                settings = {"do_sample": False, "min_new_tokens": most, "max_new_tokens": most, "streamer": streamer}
                thread = threading.Thread(target=model.generate, kwargs={**inputs, **settings})
                thread.start()
                for text in streamer:
                    yield f"data: {json.dumps({'choices': [{'text': text}]})}\n\n"
                thread.join()
            yield f"data: {json.dumps({'choices': [], 'usage': {'completion_tokens': most}})}\n\ndata: [DONE]\n\n"

        return StreamingResponse(stream(), media_type="text/event-stream")

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


def start(running: ExitStack, command: list[str], port: int) -> int:
    """Start a server, which ends with `running`, and wait until it is up; returns its process id."""
    environment = {k: v for k, v in os.environ.items() if k != "FTRAY_API_KEY"}
    process = running.enter_context(
        subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.DEVNULL, env=environment)
    )
    running.callback(process.terminate)
    while process.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                return process.pid
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")


async def ask(client: httpx.AsyncClient, name: str, prompt: str, tokens: int) -> tuple[float, int]:
    """Seconds to the first text, and tokens of the answer."""
    body = {"model": name, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    began, first, count = time.perf_counter(), 0.0, 0
    async with client.stream("POST", "/v1/completions", json=body | {"stream_options": {"include_usage": True}}) as got:
        got.raise_for_status()
        async for line in got.aiter_lines():
            if not line.startswith("data: {"):
                continue
            part = json.loads(line[6:])
            if not first and any(choice["text"] for choice in part["choices"]):
                first = time.perf_counter() - began
            count = (part.get("usage") or {}).get("completion_tokens", count)
    return first, count


@dataclass
class Load:
    """What a server has done: tokens, seconds, and seconds to the first text of each request."""

    tokens: int = 0
    seconds: float = 0.0
    firsts: list[float] = field(default_factory=list)

    @property
    def speed(self) -> float:
        """Output tokens a second."""
        return self.tokens / self.seconds

    @property
    def first(self) -> float:
        """95th percentile of the seconds to the first text."""
        return sorted(self.firsts)[int(0.95 * (len(self.firsts) - 1))]

    def ask(self, port: int, names: list[str], tokens: int, seed: int = 0) -> None:
        """All clients at once, one request each; the same prompts for the same `seed`."""
        draw = random.Random(seed)
        prompts = [" ".join(draw.choices(WORDS, k=draw.choice((8, 24, 60, 120)))) for _ in range(CLIENTS)]

        async def everyone() -> list[tuple[float, int]]:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=600) as client:
                return await asyncio.gather(
                    *(ask(client, names[i % len(names)], prompt, tokens) for i, prompt in enumerate(prompts))
                )

        began = time.perf_counter()
        answers = asyncio.run(everyone())
        self.seconds += time.perf_counter() - began
        self.tokens += sum(count for _, count in answers)
        self.firsts += [first for first, _ in answers]


def replica_memory(server: int) -> int:
    """Resident bytes of the replica that the process `server` has started."""
    below = psutil.Process(server).children(recursive=True)
    found = [process for process in below if "ServeReplica:ftray:replica" in " ".join(process.cmdline())]
    return sum(process.memory_info().rss for process in found)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    made = parser("serve", __doc__)
    made.add_argument("--quick", action="store_true", help="one turn instead of three, shorter answers")
    made.add_argument("--peer", nargs=2, metavar=("DIRECTORY", "PORT"), help=argparse.SUPPRESS)
    args = made.parse_args()
    if args.peer:
        peer(args.peer[0], int(args.peer[1]))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers end, too
    turns, tokens = (1, 32) if args.quick else (3, 48)
    print(f"serve{beside(args.busy)} on {machine()} with {versions()}", flush=True)
    with tempfile.TemporaryDirectory() as directory, ExitStack() as running:
        names, ports = make_adapters(Path(directory)), (free_port(), free_port())
        given = [f"--adapter={name}={directory}/{name}" for name in names]
        began = time.perf_counter()
        server = start(running, ["ftray.serve", "--model", MODEL, "--port", str(ports[0]), *given], ports[0])
        ready = time.perf_counter() - began
        start(running, ["benchmarks.serve", "--peer", directory, str(ports[1])], ports[1])
        Load().ask(ports[0], names[:1], 8)
        memory = replica_memory(server)
        Load().ask(ports[0], names, 8)
        grown = replica_memory(server) / memory
        asyncio.run(_warm(ports[1], names))
        ours, usual = Load(), Load()
        running.enter_context(busy(args.busy))
        for turn in range(turns):
            for load, port in zip((ours, usual), ports, strict=True):
                load.ask(port, names, tokens, turn)
            print(f"  ours {ours.speed:.1f} tokens/s, peer {usual.speed:.1f} tokens/s so far", flush=True)
    firsts = {"p95_first_ours": ours.first, "p95_first_peer": usual.first}
    also = firsts | {"memory_4_over_1": grown, "ready_seconds": ready}
    print(f"first text, p95: ours {ours.first:.1f} s, peer {usual.first:.1f} s; memory with 4 adapters {grown:.2f}x")
    print(f"ours was ready after {ready:.1f} s")
    show("serve", ours.speed, usual.speed, ours.speed / usual.speed, "output tokens/s", also, args.busy)


async def _warm(port: int, names: list[str]) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=600) as client:
        for name in names:
            await ask(client, name, "a warm day", 8)


if __name__ == "__main__":
    main()
