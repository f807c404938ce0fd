"""What the serve command makes of its configuration before anything starts."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from ftray.adapters.lora_init import save
from ftray.adapters.methods import attach
from ftray.cli import parse, run_command
from ftray.config import AdapterConfig, Config, ModelConfig, ServingConfig
from ftray.errors import UserError
from ftray.models.load import load_base
from ftray.serving.api.models import check_addition
from ftray.serving.api.requests import AddAdapterRequest
from ftray.serving.app import build, key_digest
from ftray.serving.catalog import find_catalog
from ftray.serving.errors import APIError
from ftray.task_spec import CAUSAL

CLUSTER = Path(__file__).parent.parent / "cluster"


def test_the_deploy_files_make_the_application(tiny_llama, monkeypatch):
    from ray import serve
    from ray.serve.schema import ServeDeploySchema

    monkeypatch.setenv("FTRAY_API_KEY", "k")
    written = yaml.safe_load((CLUSTER / "serve.yaml").read_text())
    (app,) = ServeDeploySchema.model_validate(written).applications
    assert app.import_path == f"{build.__module__}:{build.__name__}"
    args = {**app.args, "model": {"name": tiny_llama}, "serving": {**app.args["serving"], "run": None}}
    monkeypatch.setattr("ftray.runtime.cluster.gpus_per_worker", lambda cfg: 0.0)  # would ask a cluster
    bind, bound = serve.Deployment.bind, []
    monkeypatch.setattr(serve.Deployment, "bind", lambda self, *a, **k: bound.append((self, a)) or bind(self, *a, **k))
    build(args)
    (replica, _), (_, given) = bound
    assert replica.name == "replica"
    assert [type(part) for part in given].count(serve.Application) == 1
    service = yaml.safe_load((CLUSTER / "rayservice.yaml").read_text())
    assert yaml.safe_load(service["spec"]["serveConfigV2"]) == written


def serving(**settings):
    return Config(serving=ServingConfig(**settings))


def test_no_key_no_listening_beyond_this_machine(monkeypatch, tmp_path):
    monkeypatch.delenv("FTRAY_API_KEY", raising=False)
    assert key_digest(serving()) is None
    assert key_digest(serving(host="0.0.0.0", anonymous=True)) is None
    with pytest.raises(UserError, match="others could ask without a key"):
        key_digest(serving(host="0.0.0.0"))
    file = tmp_path / "key"
    with pytest.raises(UserError, match="No such file"):
        key_digest(serving(api_key_file=str(file)))
    file.write_text(" \n")
    with pytest.raises(UserError, match="is empty"):
        key_digest(serving(api_key_file=str(file)))
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"serving\.api_key_file .*/key: 'utf-8' codec can't decode"):
        key_digest(serving(api_key_file=str(file)))
    file.write_text("secret\n")
    digest = key_digest(serving(host="0.0.0.0", api_key_file=str(file)))
    monkeypatch.setenv("FTRAY_API_KEY", "secret")
    assert digest == key_digest(serving())
    assert "secret" not in digest


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"run": "nowhere"}, "no finished search"),
        ({"adapters": ["nameless"]}, "must be NAME=DIRECTORY"),
        ({"adapters": ["../up=x"]}, "adapter name"),
        ({"adapters": ["a=nowhere"]}, "no PEFT adapter"),
        ({"adapters": ["tiny-llama0=x"]}, "the base model has that name"),
        *(({"registry": f"{place}/serving.json"}, "serving.registry") for place in ("/dev/null", "/proc/none")),
    ],
)
def test_what_is_not_there_is_told_before_ray_starts(tiny_llama, settings, reason):
    cfg = serving(run=settings.get("run"), registry=settings.get("registry"))
    cfg.adapters = settings.get("adapters", [])
    cfg.model.name = tiny_llama
    with pytest.raises(UserError, match=reason):
        find_catalog(cfg)


def test_an_endpoint_starts_again_beside_the_registry_that_it_left(tiny_llama, tmp_path):
    cfg = serving(registry=str(tmp_path / "serving.json"))
    cfg.model.name = tiny_llama
    for _ in range(2):
        catalog = find_catalog(cfg)
        (tmp_path / "serving.json").write_text('{"added": {}, "removed": {}}')
    assert catalog.adapters == {}


@pytest.mark.parametrize("inside", [".", "adapter", "best/adapter"])
def test_an_adapter_is_found_in_what_a_run_left(tiny_llama, tmp_path, monkeypatch, inside):
    monkeypatch.chdir(tmp_path)
    model = attach(load_base(ModelConfig(dtype="fp32"), tiny_llama), AdapterConfig(method="lora"), 1, 0)
    save(model, CAUSAL, tmp_path / "runs" / "one" / inside)
    place = str((tmp_path / "runs" / "one" / inside).resolve())
    cfg = Config(model=ModelConfig(name=tiny_llama), adapters=["a=runs/one", f"b=file://{tmp_path}/runs/one"])
    found = find_catalog(cfg).adapters
    assert {name: source.removeprefix("file://") for name, source in found.items()} == {"a": place, "b": place}

    here = ServingConfig(adapter_sources=[str(tmp_path)])
    endpoint = SimpleNamespace(cfg=here, base="m", registry=SimpleNamespace(entries={}))
    assert check_addition(endpoint, AddAdapterRequest(name="new", source=str(tmp_path / "runs" / "one"))) == place
    (tmp_path / "allowed" / "one").mkdir(parents=True)
    (tmp_path / "allowed" / "one" / "adapter").symlink_to(place)
    endpoint.cfg = ServingConfig(adapter_sources=[str(tmp_path / "allowed")])
    with pytest.raises(APIError, match="adapters may come from"):
        check_addition(endpoint, AddAdapterRequest(name="new", source=str(tmp_path / "allowed" / "one")))


def test_flags_of_the_command(capsys):
    cfg = parse("serve", ["--adapter", "a=x", "--adapter", "b=y", "--model", "m", "--port", "9"])
    assert (cfg.adapters, cfg.model.name, cfg.serving.port) == (["a=x", "b=y"], "m", 9)
    assert parse("serve", ["--run", "r", "--merged"]).serving.merged
    assert run_command("serve", ["--merged"]) == 2
    assert "name a --run" in capsys.readouterr().err


def test_a_model_alone_is_served_without_waiting_for_torch(tiny_llama):
    """The process that starts the endpoint computes nothing."""
    code = "import sys; from ftray.cli import parse; from ftray.serving.app import application, check_catalog; "
    code += "cfg = parse('serve', sys.argv[1:]); application(cfg, check_catalog(cfg), None, 1, 0); "
    code += 'sys.exit(f\'{[name for name in ("torch", "transformers", "peft") if name in sys.modules]}\')'
    done = subprocess.run([sys.executable, "-c", code, "--model", tiny_llama], capture_output=True, text=True)
    assert done.stderr.strip().splitlines()[-1] == "[]"
