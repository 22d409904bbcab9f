"""A vLLM server from the command line: by its overlay, by its short name, and with options that are refused."""

import contextlib
import io
from pathlib import Path

import pytest
import yaml

from alignment_modules.rollouts.engines import EngineError, VLLMEngine
from tests.configs.test_configs import QUIET, RECIPES, SHORT
from tests.paradigms import ROWS

OVERLAY = Path(__file__).parents[2] / "configs" / "engines" / "vllm.yaml"
ACTING = [name for name, row in ROWS.items() if row.kind == "acting"]
OPTIONS = {"distillation": ["--model.on_policy_share=0.5"]}


@pytest.fixture
def recipe(model_folder, data):
    def arguments(name):
        paths = [f"--model.policy.path={model_folder}", f"--data.train={data[name]}"]
        return [f"--config={RECIPES[name]}", f"--config={OVERLAY}", *paths, *SHORT.get(name, ()), *QUIET]

    return arguments


@pytest.mark.parametrize("name", [*ACTING, *OPTIONS])
def test_the_overlay_goes_with_every_recipe_that_samples(align, recipe, name):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stopped:
        align("fit", *recipe(name), *OPTIONS.get(name, ()), "--print_config")
    assert stopped.value.code == 0
    engine = yaml.safe_load(out.getvalue())["model"]["init_args"]["engine"]
    assert engine["class_path"].endswith(".VLLMEngine")
    assert engine["init_args"]["url"] == "http://localhost:8000"


def test_the_header_gives_the_launch_command():
    header = OVERLAY.read_text()
    assert "--config engines/vllm " in header
    assert "--logprobs-mode processed_logprobs" in header


def test_a_run_asks_the_server_that_it_was_given(align, recipe):
    nobody = ["--model.engine.init_args.url=http://127.0.0.1:9", "--model.engine.init_args.retries=0"]
    with pytest.raises(EngineError, match=r"optimizer step 1: http://127.0.0.1:9/weight_info cannot be reached"):
        align("fit", *recipe("grpo"), *nobody)


def test_an_option_out_of_range(align, recipe):
    with pytest.raises(ValueError, match=r"timeout=0\.0 must be a finite number > 0"):
        align("fit", *recipe("grpo"), "--model.engine.init_args.timeout=0")


def test_help_tells_the_options(align, capsys):
    with pytest.raises(SystemExit):
        align("fit", "--model=GRPOModule", f"--model.engine.help={VLLMEngine.__name__}")
    assert "probe_tolerance" in capsys.readouterr().out
