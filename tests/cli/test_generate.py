"""`align generate`: completions shown, and rows to train on that no interruption changes."""

import io
import json
import sys

import pytest

from alignment_modules.cli.commands import run_command
from alignment_modules.cli.row_file import RowFile
from alignment_modules.cli.sampling import PromptSampler, Sampled

MADE = ("--num-samples", "4", "--max-completion-length", "3", "--batch-size", "5", "--rewards", "my_rewards.digits")


@pytest.fixture
def generate(workplace, monkeypatch, capsys):
    """Runs `align generate` in the user's folder; returns what it printed."""
    monkeypatch.chdir(workplace)
    monkeypatch.syspath_prepend(str(workplace))
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)

    def run(*arguments, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        given = ["--policy", "policy", "--max-completion-length", "4", *map(str, arguments)]
        assert run_command("generate", given) == 0
        return capsys.readouterr()

    return run


def rows_of(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_text_and_rows(generate, workplace):
    from alignment_modules import SFTModule
    from alignment_modules.rollouts import SamplingParameters

    module = SFTModule(policy=str(workplace / "policy"), tokenizer=str(workplace / "policy"))
    wanted = module.generate(["1+1=", "2+2="], SamplingParameters(max_completion_length=4, greedy=True))
    assert generate("1+1=", "2+2=").out.splitlines() == wanted
    assert generate(stdin="1+1=\n\n2+2=\n").out.splitlines() == wanted
    rows = [json.loads(line) for line in generate("--json", stdin='{"prompt": "1+1=", "id": 7}\n').out.splitlines()]
    assert rows == [{"index": 0, "id": 7, "prompt": "1+1=", "completion": wanted[0]}]


def test_samples_belong_to_their_row(generate):
    whole = generate("--json", "--num-samples", "3", "--prompts", "prompts.jsonl", "--rewards", "exact_match").out
    first = json.loads(whole.splitlines()[0])
    assert list(first) == ["index", "answer", "prompt", "completions", "rewards"]
    assert len(first["completions"]) == len(first["rewards"]) == 3
    assert len({json.loads(line)["completions"][0] for line in whole.splitlines()}) > 1
    alone = generate("--json", "--num-samples", "3", first["prompt"]).out
    assert json.loads(alone)["completions"] == first["completions"]


def test_messages_go_through_the_template(generate, model_folder):
    given = ("--policy", model_folder, "--json")
    said = generate(*given, stdin=json.dumps({"messages": [{"role": "user", "content": "hi"}]})).out
    assert json.loads(said)["prompt"] == [{"role": "user", "content": "hi"}]
    as_chat = generate(*given, "--as-chat", "hi").out
    assert json.loads(as_chat)["completion"] == json.loads(said)["completion"]
    as_text = generate(*given, "<|user|>hi<|assistant|>").out
    assert json.loads(as_text)["completion"] == json.loads(said)["completion"]


def test_continued_text_is_said_once_where_it_could_be_asked(generate, model_folder, tmp_path):
    note = "text is continued as it stands, without the chat template; --as-chat asks it as a message\n"
    given, message = ("--policy", model_folder), json.dumps({"prompt": [{"role": "user", "content": "hi"}]})
    assert generate(*given, "hi", "ho", "--batch-size", "1").err.count(note) == 1
    assert note in generate(*given, stdin=f'{message}\n{{"prompt": "hi"}}\n').err
    making = ("--num-samples", "2", "--rewards", "my_rewards.digits", "--write", "scored", tmp_path / "rows.jsonl")
    assert note in generate(*given, "hi", *making).err
    assert note not in generate(*given, "--as-chat", "hi", "ho").err
    assert note not in generate(*given, stdin=message).err
    assert note not in generate("1+1=").err  # there is no template to ask it with


def test_a_terminal_shows_which_completion_is_whose(generate, monkeypatch, model_folder):
    plain = generate("1+1=", "2+2=").out.splitlines()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert generate("1+1=", "2+2=").out.splitlines() == ["> 1+1=", plain[0], "> 2+2=", plain[1]]
    assert generate("1+1=").out.splitlines() == plain[:1]
    assert "> " not in generate("--json", "1+1=", "2+2=").out
    assert generate("--policy", model_folder, "--as-chat", "hi", "ho").out.startswith("> hi\n")


@pytest.mark.parametrize(
    ("kind", "module", "columns"),
    [
        ("scored", "PreferenceDataModule", ["completions", "rewards"]),
        ("pairs", "PreferenceDataModule", ["chosen", "rejected"]),
        ("best", "SFTDataModule", ["completion"]),
    ],
)
def test_rows_are_read_for_training(generate, workplace, tmp_path, kind, module, columns):
    import datamodules

    file = tmp_path / "made" / "rows.jsonl"
    told = generate("--prompts", "prompts.jsonl", *MADE, "--write", kind, file).err
    rows = rows_of(file)
    assert f"wrote {len(rows)} rows of 12 prompts" in told
    assert all(list(row) == ["index", "answer", "prompt", *columns] for row in rows)
    data = getattr(datamodules, module)(train=str(file), tokenizer=str(workplace / "policy"), batch_size=2)
    data.setup("fit")
    assert data.reports["train"]["kept"] > 0


def test_kinds_agree(generate, tmp_path):
    made = {}
    for kind in ("scored", "pairs", "best"):
        generate("--prompts", "prompts.jsonl", *MADE, "--write", kind, tmp_path / kind)
        made[kind] = {row["index"]: row for row in rows_of(tmp_path / kind)}
    assert len(made["scored"]) == len(made["best"]) == 12
    for index, row in made["scored"].items():
        rewards = row["rewards"]
        first = {value: row["completions"][rewards.index(value)] for value in (max(rewards), min(rewards))}
        assert made["best"][index]["completion"] == first[max(rewards)]
        if max(rewards) == min(rewards):
            assert index not in made["pairs"]
        else:
            assert made["pairs"][index]["chosen"] == first[max(rewards)]
            assert made["pairs"][index]["rejected"] == first[min(rewards)]


@pytest.mark.parametrize("kind", ["scored", "pairs", "best"])
def test_a_killed_run_ends_with_the_same_bytes(generate, tmp_path, kind):
    given = ("--prompts", "prompts.jsonl", *MADE, "--write", kind)
    generate(*given, tmp_path / "whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_bytes()
    broken = tmp_path / "broken.jsonl"
    for kept in (0, 1, 40, len(whole) // 2, len(whole) - 1, len(whole)):
        generate(*given, broken)
        broken.write_bytes(whole[:kept])
        generate(*given, broken)
        assert broken.read_bytes() == whole, kept


def test_a_failure_in_the_middle_keeps_what_is_whole(generate, tmp_path, monkeypatch):
    given = ("--prompts", "prompts.jsonl", *MADE, "--write", "scored", tmp_path / "rows.jsonl")
    complete = PromptSampler._complete

    def failing(self, numbers):
        if 5 in numbers:
            raise KeyboardInterrupt
        return complete(self, numbers)

    with monkeypatch.context() as patch:
        patch.setattr(PromptSampler, "_complete", failing)
        with pytest.raises(KeyboardInterrupt):
            generate(*given)
    assert len(rows_of(tmp_path / "rows.jsonl")) == 5
    assert "holds 5 rows; going on" in generate(*given).err
    assert [row["index"] for row in rows_of(tmp_path / "rows.jsonl")] == [*range(12)]


def test_other_options_are_refused(generate, tmp_path):
    file = tmp_path / "rows.jsonl"
    given = ("--prompts", "prompts.jsonl", *MADE)
    generate(*given, "--write", "scored", file)
    for more, message in (
        (("--write", "best", file), "was begun with kind='scored', now it is 'best'"),
        (("--seed", "1", "--write", "scored", file), "was begun with seed=0"),
        (("--dtype", "bfloat16", "--write", "scored", file), "was begun with policy="),
    ):
        with pytest.raises(ValueError, match=message):
            generate(*given, *more)
    (tmp_path / "notes.txt").write_text("mine\n")
    with pytest.raises(ValueError, match="holds something else"):
        generate(*given, "--write", "scored", tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine\n"


def test_what_is_left_out():
    def row(kind, rewards):
        return Sampled(0, {"prompt": "p"}, ["a", "b", "c"], rewards).training_row(kind)

    assert row("pairs", [1.0, 1.0, 1.0]) is None
    assert row("pairs", [None, 1.0, None]) is None
    assert row("pairs", [0.0, 1.0, None]) == {"index": 0, "prompt": "p", "chosen": "b", "rejected": "a"}
    assert row("scored", [None, 1.0, 0.0]) == {
        "index": 0,
        "prompt": "p",
        "completions": ["b", "c"],
        "rewards": [1.0, 0.0],
    }
    assert row("scored", [None, 1.0, None]) is None
    assert row("best", [None, -1.0, None]) == {"index": 0, "prompt": "p", "completion": "b"}
    assert row("best", [None, None, None]) is None


def test_a_damaged_row_is_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    with RowFile(file, {}) as rows:
        rows.append([{"index": 0}])
    file.write_text('{"index": 0}\n{"other": 1}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl:2: is no row of this file"):
        RowFile(file, {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-samples", "0", "x"], "num_samples=0 must be 1 or more"),
        (["--num-samples", "2", "--temperature", "0", "x"], "temperature=0 makes num_samples=2 equal"),
        (["x", "--prompts", "y"], "give one of the two"),
        (["x", "--write", "all", "f"], "write='all' must be scored, pairs or best"),
        (["x", "--write", "best", "f"], "needs rewards"),
        (["x", "--write", "pairs", "f", "--rewards", "ExactMatch"], "needs num_samples of 2 or more"),
        (["x", "--reward-weights", "1"], "needs rewards"),
        (["x", "--rewards", "exact_mtch"], "rewards[0]='exact_mtch' is neither"),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
        ([], "no prompt"),
        (["1+1=", "--rewards", "ExactMatch"], "asks for 'answer', which is not there"),
    ],
)
def test_mistakes(align, options, message, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    done = align("generate", "--policy", "policy", *options)
    assert done.code == 1
    assert done.error is None
    assert message in done.text


def test_bad_lines_of_standard_input(align, monkeypatch):
    for text, message in (
        ('{"prompt": "a"}\nb\n', "standard input:2: not valid JSON"),
        ('{"prompt": "a"}\n[1]\n', "standard input:2: holds a JSON list"),
        ('{"prompt": NaN}\n', "standard input:1: NaN"),
    ):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        done = align("generate", "--policy", "policy")
        assert done.code == 1
        assert message in done.text
