"""EleutherAI's lm-eval against the endpoint: likelihoods through echo and logprobs."""

import json

import pytest
import torch
from helpers.servers import KEY, Server


@pytest.mark.slow
def test_lm_eval_reads_the_models_likelihoods(tiny_llama, tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval", reason="needs pip install lm-eval[api]")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    rows = [{"q": "the cat", "a": [" sat", " on a mat"], "t": 0}, {"q": "a b", "a": [" c d", " e"], "t": 1}] * 3
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    server = Server(tiny_llama, tmp_path)
    try:
        task = {
            "task": "tiny",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": str(tmp_path / "rows.jsonl")},
            "test_split": "train",
            "output_type": "multiple_choice",
            "doc_to_text": "{{q}}",
            "doc_to_choice": "{{a}}",
            "doc_to_target": "{{t}}",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}],
        }
        model = {"model": "lora", "base_url": f"{server.url}/v1/completions", "tokenizer": tiny_llama}
        results = lm_eval.simple_evaluate("local-completions", model_args=model, tasks=[task], log_samples=True)
    finally:
        server.process.terminate()
        server.process.wait(60)
    for sample in results["samples"]["tiny"]:
        row = sample["doc"]
        for choice, (got, _) in zip(row["a"], sample["filtered_resps"], strict=True):
            asked = server.tokenizer(row["q"])["input_ids"]
            ids = server.tokenizer(row["q"] + choice)["input_ids"]
            logprobs = torch.log_softmax(server.models["lora"](torch.tensor([ids])).logits[0].float(), -1)
            wanted = sum(logprobs[i - 1, ids[i]].item() for i in range(len(asked), len(ids)))
            assert float(got) == pytest.approx(wanted, abs=1e-3)
