"""The curves of a search as TensorBoard, MLflow and Weights & Biases have them afterwards."""

import json
import struct
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
from helpers.searches import command, run_here

from ftray.cli import main

SPACE = "method: {choice: [lora, ia3]}\nlearning_rate: {log: [1.0e-3, 1.0e-2]}\n"


@pytest.fixture(scope="module")
def tracked(cluster, tmp_path_factory, words, tiny_llama):
    """One search with every tracker that is installed, and the trials that it came to, by number."""
    names = ["tensorboard", *(name for name in ("mlflow", "wandb") if find_spec(name))]
    output = tmp_path_factory.mktemp("tracked") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        more = ["--trials", "2", "--search.scheduler", "none", "--search.trackers", ",".join(names)]
        done = run_here(command(output, words, tiny_llama, *more, space=SPACE))
    assert done.returncode == 0, done.stdout + done.stderr
    trials = json.loads((output / "summary.json").read_text())["trials"]
    return output, {trial["trial"]: trial for trial in trials}


def test_tensorboard_has_a_run_a_trial(tracked):
    from tensorboardX.proto.event_pb2 import Event

    output, trials = tracked
    for number, trial in trials.items():
        found: list[tuple[int, float]] = []
        for file in (output / "tune" / f"trial-{number}").glob("events.out.tfevents.*"):
            data, at = file.read_bytes(), 0
            while at < len(data):  # a TFRecord: length (8 bytes), its checksum (4), the event, its checksum (4)
                length = int.from_bytes(data[at : at + 8], "little")
                event = Event.FromString(data[at + 12 : at + 12 + length])
                at += 16 + length
                found += [
                    (event.step, value.simple_value)
                    for value in event.summary.value
                    if value.tag == "ray/tune/validation_loss"
                ]
        assert [value for _, value in found] == pytest.approx([point["validation_loss"] for point in trial["curve"]])


def test_mlflow_has_a_run_a_trial(tracked):
    mlflow = pytest.importorskip("mlflow")
    output, trials = tracked
    client = mlflow.MlflowClient(f"sqlite:///{output / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name != "Default"]
    assert experiment.name.endswith("out")
    runs = {int(run.data.params["number"]): run for run in client.search_runs([experiment.experiment_id])}
    assert runs.keys() == trials.keys()
    for number, run_ in runs.items():
        points = client.get_metric_history(run_.info.run_id, "validation_loss")
        values = [point.value for point in sorted(points, key=lambda point: point.step)]
        assert values == pytest.approx([point["validation_loss"] for point in trials[number]["curve"]])
        assert trials[number]["config"]["adapter"]["method"] in run_.data.params["adapter/method"]
        assert run_.info.status == "FINISHED"


def test_wandb_has_a_run_a_trial_to_sync_later(tracked):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    def records(data: bytes) -> Iterator[Record]:
        """LevelDB's log after a header of 7 bytes: blocks of 32 KiB; checksum, length, type, part of a record."""
        at, whole = 7, b""
        while at + 7 <= len(data):
            if 32768 - at % 32768 < 7:
                at += 32768 - at % 32768
            _, length, kind = struct.unpack("<IHB", data[at : at + 7])
            whole += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # whole, or the last part
                yield Record.FromString(whole)
                whole = b""

    output, trials = tracked
    for number, trial in trials.items():
        (file,) = (output / "tune" / f"trial-{number}").glob("wandb/offline-run-*/run-*.wandb")
        items = [item for record in records(file.read_bytes()) for item in record.history.item]
        found = [item for item in items if "validation_loss" in (item.key, *item.nested_key)]
        values = [json.loads(item.value_json) for item in found]
        assert values == pytest.approx([point["validation_loss"] for point in trial["curve"]])


def test_a_tracker_that_can_not_be_used_is_told_before_ray_starts(tmp_path, words, tiny_llama, monkeypatch, capsys):
    def refusal(*more: str) -> str:
        arguments = command(tmp_path / "out", words, tiny_llama, "--search.trackers", *more, space=SPACE)
        assert main(["tune", *arguments[3:]]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "'tensorboard', 'mlflow' or 'wandb'" in refusal("comet")
    monkeypatch.setattr("ftray.search.trackers.find_spec", lambda name: None)
    assert "mlflow: not installed: pip install 'ftray[mlflow]'" in refusal("mlflow")
    monkeypatch.setattr("ftray.search.trackers.find_spec", lambda name: name)
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "no key: wandb login, WANDB_API_KEY, or WANDB_MODE=offline" in refusal("wandb")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert "set MLFLOW_TRACKING_URI" in refusal("mlflow", "--output", "s3://runs/out")
