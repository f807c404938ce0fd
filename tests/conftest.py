"""Tiny random models made on the fly, each saved as a plain transformers directory with a real tokenizer."""

import os

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else each of the many processes compiles ftray anew
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")  # as all commands have it
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # as those have it that begin a cluster
os.environ.setdefault("WANDB_MODE", "offline")  # in the actors of `cluster` too
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # else a search waits for what the other test process computes
os.environ.setdefault("RAY_num_workers_soft_limit", "12")  # what has imported torch stays, for the next task
os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "600000")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads only wait for each other

import pytest
import torch
from helpers.ports import free_port
from helpers.views import guarded
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from ftray import cli

STORE_PORT = free_port()  # of the fixture `store`: known before `cluster` begins, whose workers look there too
os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{STORE_PORT}"

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(autouse=True)
def linear_stays_as_it_was(monkeypatch):
    """DeepSpeed's ZeRO 3 replaces it for the rest of the process, and autograd then keeps other tensors."""
    monkeypatch.setattr(functional, "linear", functional.linear)


@pytest.fixture(autouse=True)
def commands_read_what_they_say(monkeypatch):
    """Of the commands that a test runs in its own process, none may read what it would refuse on its command line."""
    parse = cli.parse
    monkeypatch.setattr(cli, "parse", lambda name, argv: guarded(name, parse(name, argv)))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text goes in and comes out unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["the cat sat on the mat", "a b c d e f g"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = {
        "vocab_size": 384,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    return LlamaForCausalLM(LlamaConfig(**config | changes))


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=384, n_embd=64, n_layer=2, n_head=4, n_positions=512))


def bert() -> BertLMHeadModel:
    config = BertConfig(
        vocab_size=384,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        is_decoder=True,
    )
    return BertLMHeadModel(config)


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = {"vocab_size": 384, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    special = {"decoder_start_token_id": 1, "pad_token_id": 1, "eos_token_id": 0}
    return T5ForConditionalGeneration(T5Config(**config, **special))


def encoder() -> BertModel:
    torch.manual_seed(0)
    config = {"vocab_size": 384, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertModel(BertConfig(**config, intermediate_size=128, pad_token_id=1))


# those that take longest, longest first: at the end both processes have work
FIRST = (
    "test_search.py",
    "test_serving_app.py",
    "test_storage.py",
    "test_training.py",
    "test_older_runs.py",
    "test_resume.py",
    "test_docs.py",
    "test_pack_worker.py",
    "test_stored.py",
    "test_serving_shared_cluster.py",
    "test_serving_pooling.py",
    "test_matrix.py",
    "test_commands.py",
    "test_tasks.py",
    "test_data_shards.py",
    "test_faults.py",
    "test_merge.py",
    "test_control.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files in the order of `FIRST`, then all others as they come."""
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory, tokenizer) -> str:
    """Directory of a 2-layer Llama."""
    directory = tmp_path_factory.mktemp("tiny-llama")
    llama().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory, tokenizer) -> str:
    """Directory of a 2-layer GPT-2 (Conv1D layers, learned positions)."""
    directory = tmp_path_factory.mktemp("tiny-gpt2")
    gpt2().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory, tokenizer) -> str:
    """Directory of a 2-layer BERT without a head."""
    directory = tmp_path_factory.mktemp("tiny-bert")
    encoder().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory, tokenizer) -> str:
    """Directory of a 2-layer T5."""
    directory = tmp_path_factory.mktemp("tiny-t5")
    t5().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture
def clean_cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("FTRAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def cluster():
    """A real Ray cluster of one node for the whole session; its four CPUs are slots, not cores."""
    import ray
    import ray.data

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


@pytest.fixture
def ray_undone(monkeypatch):
    """Ray is begun for show, as it is beside the last checks of a search, and must be ended if these fail."""
    import ray

    called = []
    monkeypatch.setattr(ray, "init", lambda **kwargs: called.append("init"))
    monkeypatch.setattr(ray, "shutdown", lambda: called.append("shutdown"))
    yield
    assert called[-1:] != ["init"]


@pytest.fixture(scope="session")
def words(tmp_path_factory) -> str:
    """A JSONL file of 120 records: spelt-out words and the same letters in capitals."""
    import json
    import random

    draw = random.Random(0)
    path = tmp_path_factory.mktemp("words") / "words.jsonl"
    with open(path, "w") as file:
        for _ in range(120):
            word = " ".join(draw.choices("abcdefgh", k=draw.randint(2, 9)))
            file.write(json.dumps({"input": word, "output": word.upper()}) + "\n")
    return str(path)


@pytest.fixture(scope="session")
def data(cluster, words, tiny_llama, tmp_path_factory):
    """The records of `words`, tokenized by the tiny Llama's tokenizer."""
    from ftray.config import DataConfig
    from ftray.data import prepare

    cache = tmp_path_factory.mktemp("shards")
    return prepare(DataConfig(source=words, cache=str(cache), max_length=64, template="{prompt}\n"), tiny_llama)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, words, tiny_llama) -> dict[int, list[tuple[int, float]]]:
    """Step and value of each report of each trial, by number, without any fault."""
    from helpers.faults import undisturbed

    return undisturbed(tmp_path_factory.mktemp("undisturbed") / "out", words, tiny_llama)


@pytest.fixture
def nodes():
    """A head that trains nothing, and two nodes of two CPUs; each a raylet of its own."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    others = [cluster.add_node(num_cpus=2) for _ in range(2)]
    yield cluster, others
    cluster.shutdown()


@pytest.fixture(scope="module")
def store():
    """An S3 server, with a bucket `runs`, where all clients look for it."""
    import boto3
    from helpers.object_store import Store

    store = Store(STORE_PORT)
    boto3.client("s3").create_bucket(Bucket="runs")
    yield store
    store.process.kill()
    store.process.wait()
