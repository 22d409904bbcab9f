"""`align chat`: what is said, what is shown, what is kept."""

import io
import json
import sys

import pytest
import torch

from alignment_modules.cli.commands import run_command
from alignment_modules.cli.screen import Screen, printable
from alignment_modules.policies.load import build_policy
from alignment_modules.rollouts import SamplingParameters, sample


@pytest.fixture
def talk(monkeypatch, capsys):
    """Runs `align chat` on lines from a pipe; returns what it printed."""

    def run(folder, *lines, options=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        given = ["--policy", str(folder), "--max-completion-length", "12", "--seed", "3", *map(str, options)]
        assert run_command("chat", given) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def plain_folder(write_model, tmp_path):
    return write_model(tmp_path / "plain", "0123456789+=", initializer_range=0.3)


def saved(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def answers(text, prompt):
    """What stands below the echoed line of the user."""
    return text.split(f"> {prompt}\n")[1].split("\n(cut")[0].split("\n> ")[0]


def test_an_answer_is_what_the_sampler_writes_to_the_template(talk, model_folder, tmp_path):
    from alignment_modules.policies import load_tokenizer

    text = talk(model_folder, "hi", f"/save {tmp_path / 'out.jsonl'}")
    tokenizer, policy = load_tokenizer(model_folder), build_policy(model_folder).eval()
    ids = torch.tensor([tokenizer("<|user|>hi<|assistant|>", add_special_tokens=False)["input_ids"]])
    parameters = SamplingParameters(max_completion_length=12, temperature=0.7, stop_token_ids=(2,))
    wanted = sample(policy, ids, torch.ones_like(ids), parameters=parameters, seed=3, prompt_indices=[0])
    row = wanted.ids[0][wanted.mask[0]]
    expected = tokenizer.decode(row[row != 2])
    (kept,) = saved(tmp_path / "out.jsonl")
    assert kept == {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": expected}]}
    assert printable(expected) in text


def test_undo_retry_system_and_save(talk, model_folder, tmp_path):
    file = tmp_path / "out.jsonl"
    lines = (
        "one",
        "two",
        "/undo",
        f"/save {file}",
        "/retry",
        f"/save {file}",
        "/system Be brief.",
        f"/save {file}",
        "three",
        f"/save {file}",
    )
    text = talk(model_folder, *lines)
    first, again, last = (row["messages"] for row in saved(file))
    assert [message["content"] for message in first if message["role"] == "user"] == ["one"]
    assert again[0] == first[0]
    assert again[1] != first[1]  # other random numbers
    assert "(taken back; 1 message is left)" in text
    assert "(system prompt set; a new conversation begins)\n" in text
    assert "nothing was said yet" in text  # no row has a system prompt before answers that were given without it
    assert last[:2] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "three"}]
    assert [message["role"] for message in last] == ["system", "user", "assistant"]


def test_a_system_prompt_before_anything_was_said_begins_nothing_anew(talk, model_folder, tmp_path):
    for number, (lines, options) in enumerate(((["/system Be brief."], []), ([], ["--system", "Be brief."]))):
        text = talk(model_folder, *lines, "three", f"/save {tmp_path / str(number)}", options=options)
        assert "a new conversation" not in text
    assert saved(tmp_path / "0") == saved(tmp_path / "1")


def test_saved_rows_are_read_for_fine_tuning(talk, model_folder, plain_folder, tmp_path):
    from datamodules import SFTDataModule

    for folder, line in ((model_folder, "hi"), (plain_folder, "1+1=")):
        file = tmp_path / "rows.jsonl"
        file.unlink(missing_ok=True)
        talk(folder, line, f"/save {file}")
        data = SFTDataModule(train=str(file), tokenizer=str(folder), batch_size=1)
        data.setup("fit")
        assert len(data.train_dataloader()) == 1


def test_without_a_template_each_line_is_continued(talk, plain_folder, tmp_path):
    file = tmp_path / "out.jsonl"
    text = talk(plain_folder, "1+1=", "2+2=", "/system x", f"/save {file}", options=["--temperature", "0"])
    assert [row["prompt"] for row in saved(file)] == ["1+1=", "2+2="]
    assert "/system needs a chat template" in text
    assert "text is continued" in text
    again = talk(plain_folder, "2+2=", options=["--temperature", "0"])
    assert saved(file)[1]["completion"] in again


def test_another_temperature(talk, plain_folder, tmp_path):
    file = tmp_path / "out.jsonl"
    text = talk(plain_folder, "/temperature 0", "1+1=", f"/save {file}", "/temperature hot", "/temperature -1")
    talk(plain_folder, "1+1=", f"/save {file}", options=["--temperature", "0"])
    greedy, same = saved(file)
    assert greedy == same
    assert "(temperature 0)" in text
    assert "/temperature hot: could not convert" in text
    assert "/temperature -1: temperature=-1.0 must be" in text


def test_text_mode_of_a_policy_with_a_template(talk, model_folder, tmp_path):
    talk(model_folder, "hi", f"/save {tmp_path / 'x.jsonl'}", options=["--text"])
    assert saved(tmp_path / "x.jsonl")[0]["prompt"] == "hi"


def test_two_policies_answer_the_same_message(talk, model_folder, write_model, tmp_path):
    from tests.conftest import CHAT_TEMPLATE

    characters = [*map(chr, range(32, 127)), "\n"]
    chat = {"special": ("<|user|>", "<|assistant|>"), "template": CHAT_TEMPLATE}
    other = write_model(tmp_path / "other", characters, **chat, seed=5, initializer_range=0.3)
    file = tmp_path / "out.jsonl"
    text = talk(model_folder, "hi", f"/save {file}", options=["--against", other])
    assert text.index(f"{model_folder}:\n") < text.index(f"{other}:\n")
    first, second = saved(file)
    assert first["messages"][0] == second["messages"][0]
    assert first["messages"][1] != second["messages"][1]


def test_adapter_on_and_off(talk, model_folder, tmp_path):
    from alignment_modules import LoraConfig, PolicyConfig
    from alignment_modules.policies import load_tokenizer
    from alignment_modules.policies.export import export_policy

    policy = build_policy(PolicyConfig(path=model_folder, lora=LoraConfig(r=4)))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    adapter = export_policy(policy, tmp_path / "adapter", load_tokenizer(model_folder), lora="adapter")
    merged = export_policy(policy, tmp_path / "merged", load_tokenizer(model_folder))
    greedy = ["--temperature", "0"]
    rows = {}
    for name, folder in (("adapter", adapter), ("merged", merged), ("base", model_folder)):
        switch = ["/adapter off", "/retry", f"/save {tmp_path / name}.jsonl"] if name == "adapter" else []
        text = talk(folder, "hi", f"/save {tmp_path / name}.jsonl", *switch, options=greedy)
        rows[name] = [row["messages"][1]["content"] for row in saved(tmp_path / f"{name}.jsonl")]
    assert rows["adapter"] == [*rows["merged"], *rows["base"]]
    assert rows["merged"] != rows["base"]
    assert "adapter on;" in talk(adapter, "/quit")
    assert "(adapter off:" not in text
    assert "no folder here holds an adapter" in talk(model_folder, "/adapter off")
    assert "must be on or off" in talk(adapter, "/adapter")


def test_an_interrupt_stops_the_answer_and_not_the_chat(talk, model_folder, monkeypatch, tmp_path):
    from alignment_modules.rollouts import streaming

    calls = []
    original = streaming.TextStream.__call__

    def interrupted(self, ids):
        original(self, ids)
        calls.append(len(ids))
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(streaming.TextStream, "__call__", interrupted)
    text = talk(model_folder, "hi", f"/save {tmp_path / 'a.jsonl'}", "more", f"/save {tmp_path / 'b.jsonl'}")
    assert "(interrupted)" in text
    assert calls[:3] == [1, 2, 3]
    short = saved(tmp_path / "a.jsonl")[0]["messages"][1]["content"]
    assert short
    assert saved(tmp_path / "b.jsonl")[0]["messages"][1]["content"] == short


def test_mistakes_are_told_and_the_chat_goes_on(talk, model_folder, tmp_path):
    text = talk(
        model_folder,
        "/undo",
        "/unod",
        "/save",
        f"/save {tmp_path / 'no' / 'x'}",
        "//hi",
        "/save " + str(tmp_path / "x"),
    )
    assert "nothing was said yet" in text
    assert "/unod is no command; did you mean /undo?" in text
    assert "/save needs a file" in text
    assert saved(tmp_path / "x")[0]["messages"][0]["content"] == "/hi"


def test_bad_options(align, model_folder):
    def message(*options):
        done = align("chat", *options)
        return done.code, done.text

    assert message("--policy", model_folder, "--temperature", "-1")[1].startswith(
        "align: error: temperature=-1.0 must be"
    )
    assert "top_p=2.0 must be" in message("--policy", model_folder, "--top_p", "2")[1]
    assert "seed=-1 must be" in message("--policy", model_folder, "--seed", "-1")[1]
    code, text = message("--policy", "nowhere/at/all")
    assert code == 1
    assert "policy.path='nowhere/at/all' is missing" in text
    assert "device='cuda:9' cannot be used" in message("--policy", model_folder, "--device", "cuda:9")[1]
    code, text = message("--polcy", "x")
    assert code == 2
    assert "--policy" in text


def test_nothing_can_steer_the_terminal():
    assert printable("a\x1b[2Jb\x07\r\n\tc\u200dé") == "a\ufffd[2Jb\ufffd\ufffd\n    c\u200dé"


def test_words_are_not_broken_at_the_edge(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Screen()
    screen.console.file = Terminal()
    monkeypatch.setattr(type(screen.console), "width", property(lambda self: 20))
    monkeypatch.setattr(type(screen.console), "is_terminal", property(lambda self: True))
    text = "The quick brown fox jumps over the lazy dog, " + "x" * 30 + " 漢字漢字漢字漢字漢字漢字"
    with screen.answers(["one"]) as begin, begin(0) as show:
        for piece in text:
            show(piece)
    lines = render(screen.console.file.getvalue())
    assert all(len(line) < 20 for line in lines)
    assert lines[:2] == ["The quick brown fox", "jumps over the lazy"]
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def render(output):
    """The lines that a terminal shows: text, line breaks, cursor left and erase to the end of the line."""
    lines, position = [""], 0
    while position < len(output):
        if output[position] == "\x1b":
            end = next(i for i in range(position, len(output)) if output[i] in "DK")
            if output[end] == "D":
                lines[-1] = lines[-1][: -int(output[position + 2 : end])]
            position = end
        elif output[position] == "\n":
            lines[-1] = lines[-1].rstrip()
            lines.append("")
        else:
            lines[-1] += output[position]
        position += 1
    return lines
