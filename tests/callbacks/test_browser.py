"""What people open in a real browser: the page of samples, and TensorBoard's first screen."""

import html
import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from alignment_modules.callbacks import TensorBoard
from alignment_modules.callbacks.samples import write_page

pytestmark = pytest.mark.browser
EVIL = (
    "</script><script>document.documentElement.dataset.hacked='yes'</script><img src=x onerror=\"document.title='x'\">"
)


@pytest.fixture(scope="module")
def look(tmp_path_factory):
    """The document of a page once its script has run."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.fail("no chromium on the path: install it, or leave out -m browser")
    profile = tmp_path_factory.mktemp("profile")

    def run(path, address="", size="1280,800"):
        command = [chromium, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        url = path if str(path).startswith("http:") else f"file://{path}"
        options = [f"--window-size={size}", "--virtual-time-budget=10000", "--dump-dom", f"{url}{address}"]
        done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120, check=True)
        return done.stdout

    return run


def attribute(document, name):
    found = re.search(rf'<html[^>]* data-{name}="([^"]*)"', document)
    return found and found[1]


def visible(document):
    """The text of the page's body, without its data and script."""
    body = re.sub(r"<script.*?</script>", "", document[document.index("<body") :], flags=re.DOTALL)
    return html.unescape(re.sub(r"<[^>]*>", "", body))


def rows(steps=(1, 50), prompts=2, group=4, tokens=6):
    found = []
    for step in steps:
        for prompt in range(prompts):
            for sample in range(group):
                found.append(
                    {
                        "step": step,
                        "id": f"{step}/{prompt}/{sample}",
                        "prompt": f"<|user|>question {prompt}",
                        "messages": [{"role": "user", "content": f"question {prompt}"}],
                        "completion": f"answer {sample}",
                        "reward": sample / group,
                        "advantage": sample - 1.5,
                        "truncated": sample == 1,
                        "tokens": [f" word{place}" for place in range(tokens)],
                        "sampled_logps": [-0.5 * place for place in range(tokens)],
                        "reference_logps": [-0.25 * place for place in range(tokens)],
                    }
                )
    return found


@pytest.mark.parametrize("place", ["completion", "tokens", "prompt", "messages", "role", "expected", "column", "title"])
def test_markup_is_shown_and_not_run(tmp_path, look, place):
    row = {"step": 1, "id": "0/0/0", "prompt": "p", "completion": "c", "reward": 1.0}
    values = {
        "tokens": {"tokens": ["<b>", EVIL, "<|im_end|>"]},
        "messages": {"messages": [{"role": "user", "content": EVIL}]},
        "role": {"messages": [{"role": EVIL, "content": "", "tool_calls": [{"function": EVIL}]}]},
        "column": {EVIL: EVIL},
        "title": {},
    }
    title = EVIL if place == "title" else "Module"
    write_page([row | values.get(place, {place: EVIL})], tmp_path / "a.html", title=title)
    document = look(tmp_path / "a.html")
    assert attribute(document, "samples") == "1"
    assert attribute(document, "hacked") is None
    assert "<img" not in document[document.index("<body") :]
    shown = visible(document)
    assert EVIL.lower() in shown.lower()
    if place == "tokens":
        assert "<|im_end|>" in shown


@pytest.mark.parametrize(
    ("address", "count"),
    [
        ("", 16),
        ("#reward>0.4", 8),
        ("#reward%3E0.4&step=50", 4),
        ("#step<=1", 8),
        ("#truncated", 4),
        ("#-truncated", 12),
        ("#%22question%201%22", 8),
        ("#advantage=-1.5&reward>=0", 4),
        ("#length>5", 16),
        ("#nobody", 0),
    ],
)
def test_the_address_filters(tmp_path, look, address, count):
    write_page(rows(), tmp_path / "a.html")
    document = look(tmp_path / "a.html", address)
    assert attribute(document, "matching") == str(count)
    assert f"{count} of 16 samples" in visible(document)
    assert ("No sample fits the filter" in visible(document)) == (count == 0)


def test_an_unknown_column_is_named(tmp_path, look):
    write_page(rows(), tmp_path / "a.html")
    assert "no column rewrd: there are step, length, reward, advantage" in visible(
        look(tmp_path / "a.html", "#rewrd>1")
    )


def test_sorting_and_a_prompt_over_the_steps(tmp_path, look):
    found = rows()
    for row in found:
        row["reward"] += row["step"] == 1 and row["id"].split("/")[1] == "1"
    write_page(found, tmp_path / "a.html")
    assert "Step 1, prompt 1" in visible(look(tmp_path / "a.html", "#sort=reward"))
    assert "Step 50, prompt 0" in visible(look(tmp_path / "a.html", "#open=50/0"))
    over = visible(look(tmp_path / "a.html", "#open=50/0&view=steps"))
    assert "Step 1, mean reward 0.375" in over
    assert "Step 50, mean reward 0.375" in over


@pytest.mark.parametrize("shade", ["advantage", "surprise", "reference"])
def test_tokens_are_shaded(tmp_path, look, shade):
    write_page(rows(group=1), tmp_path / "a.html")
    document = look(tmp_path / "a.html", f"#shade={shade}")
    spans = re.findall(r'<span title="log p [^"]*" style="background: rgba\(var\(--(\w+)\), ([\d.]+)\);"', document)
    assert len(spans) == 6
    assert {name for name, strength in spans if float(strength)} == {"bad"}
    if shade == "surprise":
        strengths = [float(strength) for _, strength in spans]
        assert strengths == sorted(strengths)
    assert "rgba(var(--bad), 0." not in look(tmp_path / "a.html", "#shade=none").partition("<main")[2]


def test_tool_calls_and_what_others_wrote_are_blocks(tmp_path, look):
    call, result = '<tool_call>{"name": "add"}</tool_call>', "<tool_response>7</tool_response>"
    tokens = ["so ", "<tool_call>", '{"name": "add"}', "</tool_call>", "7", " done"]
    found = [
        {"step": 1, "id": "0/0/0", "prompt": "p", "completion": f"so {call}{result} done"},
        {"step": 1, "id": "0/0/1", "prompt": "p", "completion": "", "tokens": tokens, "own": [1, 1, 1, 1, 0, 1]},
    ]
    write_page(found, tmp_path / "a.html")
    document = look(tmp_path / "a.html")
    blocks = re.findall(r'<span class="block[^"]*"><span class="role">([^<]*)</span>(.*?)</span></span>', document)
    texts = [(name, html.unescape(re.sub("<[^>]*>", "", inner))) for name, inner in blocks]
    assert texts == [("tool call", call), ("result", result), ("tool call", call), ("not the policy's", "7")]


CALL, CALLED = '{"name": "add", "parameters": {"a": 1}}', {"function": {"name": "add", "arguments": {"a": 1}}}


@pytest.fixture
def episode():
    """A call without marks that is answered with markup and controls, one in marks that fails, and one too many."""
    marked, last = f"<tool_call>{CALL}</tool_call>", "<tool_response>so</tool_response>"
    tokens = [CALL, "<eot>", f"\n{EVIL}\x1b[31m\u202e", "\n", marked, "<eot>", "late", last]
    turn = {"role": "assistant", "content": "", "tool_calls": [CALLED]}
    results = [{"role": "tool", "name": "add", "content": text} for text in (EVIL, "late")]
    said = {"role": "assistant", "content": last}
    return {
        "step": 1, "id": "0/0/0", "prompt": "p", "completion": "".join(tokens), "tokens": tokens,
        "own": [1, 1, 0, 0, 1, 1, 0, 1], "stop_reason": "max_turns", "turns": 3, "truncated": True,
        "episode": [turn, results[0], turn, results[1] | {"failed": "time_limit"}, said],
    }  # fmt: skip


def test_an_episode_shows_calls_and_results_as_blocks_and_markup_as_text(tmp_path, look, episode):
    write_page([episode], tmp_path / "a.html")
    document = look(tmp_path / "a.html")
    assert attribute(document, "hacked") is None
    blocks = re.findall(r'<span class="block ([^"]*)"><span class="role">(.*?)</span><span', document)
    assert [(kind, re.sub("<[^>]*>", " ", name).strip()) for kind, name in blocks] == [
        ("", "tool call"), ("other", "result add"),
        ("", "tool call"), ("other failed", "result add failed (time_limit)"),
    ]  # fmt: skip
    shown = visible(document)
    assert EVIL in shown
    assert "\\u001b[31m\\u202e" in shown
    assert not {"\x1b", "\u202e"} & {*shown}
    assert "max_turns" in shown
    assert "turns 3" in shown
    assert "truncated" not in shown, "the reason says it"


def test_how_episodes_ended_filters(tmp_path, look, episode):
    write_page([episode, episode | {"id": "0/1/0", "stop_reason": "answer"}], tmp_path / "a.html")
    for address, count in (("#stop_reason=answer", 1), ("#stop_reason!=length", 2), ("#turns>2&stop_reason=length", 0)):
        assert attribute(look(tmp_path / "a.html", address), "matching") == str(count)


def test_two_thousand_samples_open_quickly(tmp_path, look):
    write_page(rows(steps=range(1, 126), prompts=2, group=8, tokens=256), tmp_path / "b.html")
    documents = [look(tmp_path / "b.html") for _ in range(3)]
    document, best = documents[0], min(int(attribute(found, "milliseconds")) for found in documents)
    assert attribute(document, "samples") == "2000"
    assert len(re.findall('class="group', document)) == 60  # the rest comes when it is asked for
    assert "190 more" in visible(document)
    assert best < 3000  # generous: other work may run beside it


def test_no_samples_yet(tmp_path, look):
    write_page([], tmp_path / "a.html")
    assert "No samples yet" in visible(look(tmp_path / "a.html"))


@pytest.fixture
def tensorboard(tmp_path):
    """The address of a TensorBoard that shows `tmp_path`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path), "--host", "127.0.0.1"]
    server = subprocess.Popen(
        [*command, "--port", str(port), "--load_fast", "false"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(120):
            try:
                with urllib.request.urlopen(f"{address}/data/runs", timeout=5) as answer:
                    if json.load(answer):
                        break
            except OSError:
                pass
            time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait()


def test_the_first_screen_of_tensorboard(tmp_path, look, request):
    """What matters comes first, under the names of the documentation; diagnostics come last; no card for epochs."""
    logger = TensorBoard(str(tmp_path / "run"))
    names = ["reward", "frac_reward_zero_std", "completions/mean_length", "kl", "entropy", "loss", "grad_norm"]
    names += ["clip_ratio/low_mean", "completions/min_length", "num_tokens"]
    for step in range(1, 4):
        logger.log_metrics({f"train/{name}": float(step) for name in names} | {"epoch": 0.5}, step)
    logger.log_metrics({"val/exact_match": 0.5}, 3)
    logger.finalize("success")
    address = request.getfixturevalue("tensorboard")
    document = look(f"{address}/", "#timeseries", size="1280,2000")
    groups = re.findall(r'title="(train|val|workings|epoch)"', document)
    assert groups == ["train", "val", "workings"]
    cards = re.findall(r'title="(train/[^"]*)"', document)
    assert cards == [
        "train/completions/mean_length", "train/entropy", "train/frac_reward_zero_std", "train/kl", "train/loss",
        "train/reward",
    ]  # fmt: skip
    with urllib.request.urlopen(f"{address}/data/plugin/custom_scalars/layout", timeout=30) as answer:
        [category] = json.load(answer)["category"]
    charts = [chart["title"] for chart in category["chart"]]
    assert charts[:3] == ["loss", "reward", "exact match"]
    assert {"groups without signal", "length", "KL", "entropy"} <= {*charts}
    assert "preferred over rejected" not in charts
