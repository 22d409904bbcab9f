"""`align inspect` of a policy that is to act: its prompts with the tools, how it calls them, and what is not judged."""

import contextlib
import io

import pytest

from alignment_modules.cli.inspect import inspect_command
from alignment_modules.cli.inspection.acting import actions_of
from alignment_modules.rollouts.codec import Codec
from alignment_modules.rollouts.environments import ToolOptions
from alignment_modules.rollouts.environments.making import make_episodes
from tests.rollouts.environments.acting import LettersFormat, Sum
from tests.rollouts.environments.conftest import acting_folder, tokenizer  # noqa: F401

ACTING = "tests.rollouts.environments.acting"


@pytest.fixture
def inspect(acting_folder, tmp_path):  # noqa: F811
    """Runs `align inspect` with GRPO; gives exit code and what was printed."""
    (tmp_path / "rows.jsonl").write_text(
        '{"prompt": [{"role": "user", "content": "go"}], "goal": 5, "how": "no"}\n'
        '{"prompt": [{"role": "user", "content": "on"}], "goal": 7, "how": "reset"}\n'
    )

    def run(*options):
        out = io.StringIO()
        given = [
            "--model=GRPOModule", f"--model.policy.path={acting_folder}", "--data=PromptDataModule",
            f"--data.train={tmp_path / 'rows.jsonl'}", "--data.batch_size=2", "--trainer.max_epochs=1",
            "--trainer.accelerator=cpu", "--trainer.devices=1", "--model.optimizer=torch.optim.SGD",
        ]  # fmt: skip
        with contextlib.chdir(tmp_path), contextlib.redirect_stdout(out):
            code = inspect_command([*given, *options])
        return code, out.getvalue()

    return run


def test_rows_are_shown_with_the_tools_and_what_environments_say(inspect):
    code, text = inspect(f"--model.environments={ACTING}.Sum", "--rows", "1", "--html", "page.html")
    assert code == 0, text
    assert "add <|user|>go\\n" in text, "the template writes the tools, and reset a line"
    assert "From" in text
    told = " ".join(text[text.rindex("Tools") :].split())
    assert "add of Sum (number: integer) Adds a number." in told
    assert 'calls as json_tags <tool_call>{"name": "add", "arguments": {"number": "..."}}</tool_call></s>' in told
    assert "a turn ends at </s>" in told
    assert "at most 8 turns any number of calls, 10 seconds a call, 1,024 tokens a result" in told
    assert "an empty completion" not in text, "a text alone has no reward"


def test_an_environment_that_fails_at_the_start_is_told(inspect):
    code, text = inspect(f"--model.environments={ACTING}.Broken", "--rows", "2")
    assert code == 0, text
    assert text.count("environment failed") == 1
    assert "nothing there" in text


def test_a_format_of_ones_own_is_named_with_its_stop_strings(tokenizer):  # noqa: F811
    options = ToolOptions(format=LettersFormat, time_limit=0.5)
    found = actions_of(make_episodes(Sum, None, codec=Codec(tokenizer), tool_options=options, max_tool_calls=1200))
    assert found.form == "LettersFormat"
    assert found.stops == ("</s>", *LettersFormat.stop_strings)
    assert found.limits == "8 turns, 1,200 calls, 0.5 seconds a call, 1,024 tokens a result"
