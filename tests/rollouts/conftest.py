"""Tiny policies, a naive rescoring that shares no code with the sampler, a stand-in server for vLLM and its engine."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
from torch import nn

from alignment_modules.rollouts import sampler
from alignment_modules.rollouts.decoders.base import RecomputeDecoder
from alignment_modules.rollouts.decoders.cached import CachedDecoder
from alignment_modules.rollouts.decoders.llama.decoder import FastDecoder
from alignment_modules.rollouts.engines import VLLMEngine
from tests.shapes import SIZES

DECODERS = {"recompute": RecomputeDecoder, "cached": CachedDecoder, "fast": FastDecoder}
BOUNDED = SIZES | {
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


class Bigram(nn.Module):
    """A policy without transformers: causal, no cache, ids to logits."""

    def __init__(self, vocabulary=12):
        super().__init__()
        self.table = nn.Embedding(vocabulary, vocabulary)
        self.past = nn.Embedding(vocabulary, vocabulary)

    def forward(self, ids):
        counts = torch.arange(1, ids.shape[1] + 1)[:, None]
        return 2 * self.table(ids) + self.past(ids).cumsum(1) / counts


@pytest.fixture
def make_policy():
    """Builds a small transformers model of a type in eval mode; norms get weights that are not all one."""

    def make(model_type="llama", **options):
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **{**BOUNDED, **options})
        policy = AutoModelForCausalLM.from_config(config).eval()
        for name, parameter in policy.named_parameters():
            if "norm" in name:
                nn.init.normal_(parameter, 1.0, 0.3)
            elif name.endswith("bias"):
                nn.init.normal_(parameter, 0.0, 0.3)
        return policy

    return make


@pytest.fixture
def bigram():
    torch.manual_seed(0)
    return Bigram()


@pytest.fixture
def force(monkeypatch):
    """Makes `sample` use a decoder by name."""

    def use(name):
        monkeypatch.setattr(sampler, "select_decoder", lambda policy, longest: DECODERS[name])

    return use


@pytest.fixture
def rescore():
    """Log-probabilities of completions from one plain forward per row, without padding or cache."""

    def naive(policy, prompt_ids, prompt_mask, completions, temperature=1.0):
        rows = len(completions.ids) // len(prompt_ids)
        result = torch.zeros(completions.ids.shape, dtype=torch.float64)
        for row, (ids, mask) in enumerate(zip(completions.ids, completions.mask, strict=True)):
            prompt = prompt_ids[row // rows][prompt_mask[row // rows].bool()]
            tokens = ids[mask]
            with torch.no_grad():
                output = policy(torch.cat((prompt, tokens))[None])
            logits = getattr(output, "logits", output)[0, len(prompt) - 1 : -1].double()
            logps = torch.log_softmax(logits / temperature, -1).gather(1, tokens[:, None]).squeeze(1)
            result[row, : len(tokens)] = logps
        return result

    return naive


class StandIn:
    """A server process (`tests/rollouts/http_server.py`), which can be killed, started again, and made to do wrong."""

    def __init__(self, launcher, folder):
        self.launcher, self.folder, self.port = launcher, folder, 0
        self.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def start(self):
        """Starts it, with the weights in its folder, at the address that it had."""
        self.launcher.stdin.write(f"start {self.folder} {self.port}\n")
        self.launcher.stdin.flush()
        _, port, pid = self.launcher.stdout.readline().split()
        self.port, self.pid = int(port), int(pid)

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)

    def wrong(self, **how):
        """From now on it does this wrong, and nothing else."""
        request = urllib.request.Request(f"{self.url}/control", json.dumps(how).encode(), method="POST")
        urllib.request.urlopen(request).read()

    def state(self):
        return json.loads(urllib.request.urlopen(f"{self.url}/control").read())

    def asked(self, route=""):
        """The bodies of the requests for a route, or all routes that were asked for."""
        log = self.state()["log"]
        return [body for path, body in log if path == route] if route else [path for path, _ in log]


@pytest.fixture(scope="session")
def launcher():
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.rollouts.http_server"],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "launched\n"
    yield process
    process.stdin.close()
    process.wait(20)


@pytest.fixture
def stand_in(launcher):
    """Starts servers of a folder's model; they are killed at the end."""
    started = []

    def start(folder):
        started.append(StandIn(launcher, folder))
        return started[-1]

    yield start
    for server in started:
        try:
            server.kill()
        except ProcessLookupError:
            continue


@pytest.fixture(scope="module")
def folder(built_llama, tmp_path_factory):
    """The tiny model, as the server is started with."""
    path = tmp_path_factory.mktemp("served")
    built_llama[0].save_pretrained(path)
    return str(path)


@pytest.fixture
def server(stand_in, folder):
    return stand_in(folder)


@pytest.fixture
def engine(server, tmp_path):
    return VLLMEngine(server.url, str(tmp_path / "weights"), timeout=20, retries=2)
