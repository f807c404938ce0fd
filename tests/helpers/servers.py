"""The endpoint as a user starts it, what it should answer, and a browser on its page."""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager

import httpx
import openai
import pytest
import torch
import yaml
from ray import serve
from selenium import webdriver
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
)

from ftray.cli import parse
from ftray.serving.app import application, check_catalog
from ftray.serving.catalog import model_of_run
from ftray.task_spec import TaskSpec
from helpers.browser import console
from helpers.packs import Trial
from helpers.ports import free_port


def generated(model, prompt, max_tokens):
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    output = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False, use_cache=True, pad_token_id=1
    )
    return output[0, len(prompt) :].tolist()


KEY = "correct horse battery"


class Server:
    """`python -m ftray.serve --run` and the models that it should answer like."""

    def __init__(self, tiny_llama, directory, extra=()):
        self.directory, self.url = directory, f"http://127.0.0.1:{free_port()}"
        self.base, self.tokenizer = os.path.basename(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)
        base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).requires_grad_(False)
        self.models = {self.base: base}
        run, kept = directory / "run", directory / "run" / "tune" / "trial-3" / "checkpoint_000001"
        places = {"best": run / "best/adapter", "trial-3": kept / "adapter", "lora": directory / "lora"}
        methods = {"best": "lora", "trial-3": "ia3", "lora": "lora", "extra": "oft"}
        for seed, (name, method) in enumerate(methods.items()):
            self.models[name] = Trial(method, seed=seed).model(base).eval()
            self.models[name].save_pretrained(places.get(name, directory / name))
        TaskSpec(template="say {prompt}:\n").save(places["best"])
        self.other = "<|system|>asked<|end|>" + self.tokenizer.chat_template  # that trial 3 was trained with
        TaskSpec(template="chat", chat_template=self.other).save(places["trial-3"])
        config = {"adapter": {"method": "ia3"}, "training": {"learning_rate": 0.01}}
        row = {"trial": 3, "status": "finished", "value": 1.25, "config": config, "checkpoint": str(kept)}
        gone = {**row, "trial": 4, "checkpoint": str(kept) + "-gone", "value": None, "status": "failed"}
        (run / "summary.json").write_text(json.dumps({"metric": "validation_loss", "trials": [row, gone]}))
        written = {"model": {"name": tiny_llama, "dtype": "fp32"}, "data": {"template": "say {prompt}:\n"}}
        (run / "config.yaml").write_text(yaml.safe_dump(written))
        command = [sys.executable, "-m", "ftray.serve", "--run", str(run), f"--adapter=lora={directory / 'lora'}"]
        command += ["--port", self.url.rpartition(":")[2], "--serving.adapter_sources", f"[{directory}]"]
        command += ["--serving.max_output_tokens", "480", "--serving.max_queue", "8", "--serving.slots", "4"]
        command += ["--serving.max_body_bytes", "20000", "--serving.max_prompt_tokens", "300"]
        command += ["--serving.max_adapters", "2", *extra]
        with open(directory / "log", "w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "FTRAY_API_KEY": KEY}
            )
        for _ in range(1200):
            if "endpoint http" in (directory / "log").read_text():
                break
            assert self.process.poll() is None, (directory / "log").read_text()
            time.sleep(0.1)
        else:
            raise AssertionError((directory / "log").read_text())

    def wanted(self, name, ids, max_tokens):
        new = generated(self.models[name], ids, max_tokens)
        ends = {self.tokenizer.eos_token_id, self.tokenizer.pad_token_id}  # other special tokens are part of an answer
        return self.tokenizer.decode([token for token in new if token not in ends]), new

    def client(self, kind=openai.OpenAI):
        return kind(base_url=self.url + "/v1", api_key=KEY, max_retries=0, timeout=120)

    def post(self, path, **kwargs):
        headers = {"Authorization": f"Bearer {KEY}", **kwargs.pop("headers", {})}
        return httpx.post(self.url + path, headers=headers, timeout=120, **kwargs)

    def metric(self, name):
        text = httpx.get(self.url + "/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))


@contextmanager
def serving_here():
    """Ray Serve on the `cluster` of this process; yields what serves, in place of what it has served before, as `ftray
    serve` does with some flags, and returns the URL.
    """
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})

    def begin(*flags: str) -> str:
        cfg = model_of_run(parse("serve", list(flags)))
        if "default" in serve.status().applications:
            serve.delete("default")
        serve.run(application(cfg, check_catalog(cfg), None, 1, 0))
        return f"http://127.0.0.1:{port}"

    try:
        yield begin
    finally:
        serve.shutdown()


@contextmanager
def chromium(url, profile):
    """The page at `url` in a real browser, at the end of which nothing must have gone wrong in it."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs Debian's chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    flags += f" disable-component-update disable-sync user-data-dir={profile} window-size=1100,1000"
    for flag in flags.split():
        options.add_argument(f"--{flag}")
    options.binary_location = shutil.which("chromium")
    with webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver"))) as browser:
        browser.get(url)
        yield browser
        browser.set_window_size(500, 900)
        left, right = (browser.find_element("id", f"answer-{side}").rect for side in (0, 1))
        assert left["y"] + left["height"] <= right["y"]  # one above the other
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        assert all("401" in message for message in console(browser, ("SEVERE",)))
