"""The GPU benchmark runs on a CPU too, at a tiny size: a GPU box is not the first place where it is tried."""

import json
import sys

import torch

from benchmarks import gpu


def test_every_part_gives_figures_or_says_why_not(tmp_path, monkeypatch, capsys):
    output = tmp_path / "figures.json"
    monkeypatch.setattr(sys, "argv", ["gpu", "--smoke", "--output", str(output)])
    monkeypatch.setattr(gpu, "profile", lambda *args: 1 / 0)

    assert gpu.main() == 1  # a part failed, and the others ran

    figures = json.loads(output.read_text())
    assert figures["profile"] == {"failed": "ZeroDivisionError: division by zero"}
    assert figures["equality fp32"]["largest_relative_difference"] < 1e-5
    assert figures["tiny K=4"]["tokens_per_second"] > 0
    assert figures["tiny K=4"]["times_in_turn"] > 0
    assert figures["decode"]["isolation_reason"] is None
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures


def test_4_bit_weights_multiply_as_what_they_stand_for():
    base, stored = (gpu.llama("tiny", torch.float32, quantised=q) for q in (False, True))
    layer = stored.model.layers[0].mlp.up_proj
    x = torch.randn(3, layer.in_features)
    from bitsandbytes.functional import dequantize_4bit

    meant = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    assert (layer(x) - x @ meant.T).norm() < 0.02 * (x @ meant.T).norm()
    assert 0 < (meant - base.model.layers[0].mlp.up_proj.weight).norm() < 0.2 * meant.norm()
