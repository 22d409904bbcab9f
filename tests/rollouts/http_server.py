"""A stand-in for a vLLM server: its routes over this project's sampler, in processes of their own.

    python -m tests.rollouts.http_server

reads commands, `start FOLDER PORT`, and forks a server for each, so that one can be killed and started again at once.
A request's id says which sample it is, so that the uniforms are those that the engine in process draws with.
"""

import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import numpy as np
import torch

from alignment_modules.policies.adapter_folders import attach_adapter_folder
from alignment_modules.rollouts.decoders.select import select_decoder
from alignment_modules.rollouts.parameters import SamplingParameters
from alignment_modules.rollouts.prompts import Prompts
from alignment_modules.rollouts.sampler import draw
from alignment_modules.rollouts.seeds import Seeds
from alignment_modules.rollouts.stopping import StopStrings


class Refused(Exception):
    """An answer with another status than 200."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


class Served:
    """What a server holds, and what a test has it do wrong."""

    def __init__(self, folder):
        self.folder, self.model = folder, load(folder)
        self.tokenizer = None
        if os.path.exists(os.path.join(folder, "tokenizer.json")):
            from transformers import AutoTokenizer

            self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.version, self.adapters = "default", {}
        self.paused = self.asleep = self.updating = self.loaded = False
        self.wrong = {}
        self.log = []
        self.lock = threading.Lock()

    def answer(self, method, path, query, body):
        if path == "/control":
            if method == "GET":
                return {"log": self.log, "paused": self.paused, "asleep": self.asleep, "version": self.version}
            self.wrong = body
            return {}
        self.log.append([path, body])
        if self.wrong.get("slow", {}).get("route") == path:
            time.sleep(self.wrong["slow"]["seconds"])
        if self.wrong.get("busy", {}).get("route") == path and self.wrong["busy"]["times"] > 0:
            self.wrong["busy"]["times"] -= 1
            raise Refused(503, "busy")
        if path in self.wrong.get("missing", ()):
            raise Refused(404, "Not Found")
        name = "_".join(part for part in (method.lower(), *path.strip("/").replace(".", "_").split("/")))
        handler = getattr(self, name, None)
        if handler is None:
            raise Refused(404, "Not Found")
        return handler(query, body)

    def get_health(self, query, body):
        return None

    def get_weight_info(self, query, body):
        return {"weight_version": self.wrong.get("version", self.version)}

    def post_update_weight_version(self, query, body):
        self.version = body["new_version"]
        return {"success": True, "new_version": self.version}

    def post_pause(self, query, body):
        self.paused = True
        return {"status": "paused"}

    def post_resume(self, query, body):
        self.paused = False
        return {"status": "resumed"}

    def post_reset_prefix_cache(self, query, body):
        return None

    def post_collective_rpc(self, query, body):
        if body["method"] != "reload_weights":
            raise Refused(400, f"no method {body['method']}")
        self.exchange(body["kwargs"]["weights_path"])
        return {"results": [None]}

    def post_init_weight_transfer_engine(self, query, body):
        assert body == {"init_info": {}}
        return {"message": "initialized"}

    def post_start_weight_update(self, query, body):
        if self.updating:
            raise Refused(400, "an update is already active")
        self.updating, self.loaded = True, False
        return {"message": "started"}

    def post_update_weights(self, query, body):
        if not self.updating:
            raise Refused(400, "no update was started")
        self.exchange(body["update_info"]["path"])
        self.loaded = True
        return {"message": "updated"}

    def post_finish_weight_update(self, query, body):
        if not (self.updating and self.loaded):
            raise Refused(400, "nothing was updated")
        self.updating, self.version = False, body["weight_version"]
        return {"message": "finished"}

    def exchange(self, folder):
        if not self.paused:
            raise Refused(400, "weights are exchanged while requests run")
        if self.wrong.get("keeps_weights"):
            return
        self.model = load(folder)

    def get_v1_models(self, query, body):
        return {"data": [{"id": self.folder}, *({"id": name} for name in self.adapters)]}

    def post_v1_load_lora_adapter(self, query, body):
        if body["lora_name"] in self.adapters:
            raise Refused(400, f"{body['lora_name']} has already been loaded")
        self.adapters[body["lora_name"]] = attach_adapter_folder(load(self.folder), body["lora_path"]).eval()
        return f"Success: LoRA adapter '{body['lora_name']}' added successfully."

    def post_v1_unload_lora_adapter(self, query, body):
        if self.adapters.pop(body["lora_name"], None) is None:
            raise Refused(404, "no such adapter")
        return "Success"

    def post_sleep(self, query, body):
        self.asleep = True

    def post_wake_up(self, query, body):
        self.asleep = False

    def post_inference_v1_generate(self, query, body):
        while self.paused:
            time.sleep(0.01)
        if self.asleep:
            raise Refused(400, "asleep")
        with self.lock:
            model = self.model
            if "model" in body:
                if body["model"] not in self.adapters:
                    raise Refused(404, f"The model {body['model']} does not exist.")
                model = self.adapters[body["model"]]
            return self.written(model, body)

    @torch.no_grad()
    def written(self, model, body):
        given = body["sampling_params"]
        limit, greedy = given["max_tokens"], given["temperature"] == 0
        parameters = SamplingParameters(
            limit,
            given["temperature"],
            given.get("top_p", 1.0),
            given.get("top_k", 0),
            given.get("min_p", 0.0),
            given.get("stop", []),
            greedy=greedy,
            stop_token_ids=tuple(given["stop_token_ids"]),
        )
        prompts = Prompts.from_rows([body["token_ids"]], torch.device("cpu"))
        decoder = select_decoder(model, prompts.longest + limit)(model, prompts, 1, limit)
        strings = StopStrings(parameters.stop_strings, self.tokenizer) if parameters.stop_strings else None
        uniforms = None if greedy else uniforms_of(body["request_id"], given["seed"], limit)
        found = draw(decoder, 1, parameters, uniforms, stop_strings=strings)
        ids, logps = found.ids[0].tolist(), found.token_logps[0].tolist()
        if self.wrong.get("raw_logps"):
            logits = model(torch.tensor([body["token_ids"] + ids])).logits[0, len(body["token_ids"]) - 1 : -1]
            logps = logits.log_softmax(-1).gather(1, found.ids[0][:, None])[:, 0].tolist()
        choice = {
            "index": 0,
            "token_ids": ids,
            "finish_reason": self.wrong.get("finish_reason", "length" if bool(found.truncated[0]) else "stop"),
            "logprobs": {"content": [{"token_id": i, "logprob": p} for i, p in zip(ids, logps, strict=True)]},
            "weight_versions": [{"start": 0, "end": len(ids), "version": self.wrong.get("version", self.version)}],
        }
        if self.wrong.get("no_logps"):
            choice["logprobs"] = None
        if found.support is not None and not self.wrong.get("no_mask"):
            kept = ~found.support[0].excluded(slice(0, len(ids)), model.config.vocab_size)
            choice["sampling_mask"] = [row.nonzero().flatten().tolist() for row in kept]
        return {"request_id": body["request_id"], "model": body.get("model", self.folder), "choices": [choice]}


def uniforms_of(request, seed, limit):
    """[limit, 1]: of a sample as the engine in process has them, of anything else by its seed."""
    words = request.partition("-")[0].split(".")
    if len(words) != 6:
        return torch.from_numpy(np.random.default_rng(seed).random((limit, 1)))
    base, step, number, index, sample, turn = map(int, words)
    return Seeds([index], base, step, number).uniforms(sample + 1, limit, turn)[sample][:, None]


def end_with(parent):
    """Ends this process when the one that forked it has ended."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(0)


def serve(folder, port, parent):
    threading.Thread(target=end_with, args=[parent], daemon=True).start()
    served = Served(folder)

    class Handler(BaseHTTPRequestHandler):
        def reply(self, method):
            size = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(size)) if size else None
            url = urlsplit(self.path)
            try:
                status, answer = 200, served.answer(method, url.path, url.query, body)
            except Refused as error:
                status, answer = error.status, {"error": {"message": str(error)}}
            sent = (
                b"" if answer is None else answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
            )
            self.send_response(status)
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        def do_GET(self):  # the name that http.server calls
            self.reply("GET")

        def do_POST(self):  # likewise
            self.reply("POST")

        def log_message(self, *given):
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads, request_queue_size = True, 128

        def handle_error(self, request, client_address):
            if not isinstance(sys.exception(), ConnectionError):  # a client that gave up
                super().handle_error(request, client_address)

    server = Server(("127.0.0.1", port), Handler)
    print(f"ready {server.server_port} {os.getpid()}", flush=True)
    server.serve_forever()


def main():
    torch.set_num_threads(1)
    import peft  # noqa: F401  what a server needs is imported once, before the forks
    import transformers  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # whoever is killed is gone
    launcher = os.getpid()
    print("launched", flush=True)
    for line in sys.stdin:
        _, folder, port = line.split()
        if os.fork() == 0:
            serve(folder, int(port), launcher)
    os._exit(0)  # nothing is left to be tidied up


if __name__ == "__main__":
    main()
