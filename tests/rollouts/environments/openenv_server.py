"""A small server that speaks OpenEnv's protocol: a number is to be guessed, with a session for each connection."""

import contextlib
import json
import threading
import time

from websockets.sync.server import serve

SCHEMA = {
    "action": {
        "description": "A guess.",
        "properties": {
            "metadata": {"type": "object", "description": "Additional metadata"},
            "guess": {"type": "integer", "description": "The number:\n  a whole one"},
            "mood": {"anyOf": [{"enum": ["sure", "unsure"]}, {"type": "null"}], "default": None, "title": "Mood"},
            "notes": {"type": "array", "items": {"$ref": "#/$defs/Note"}, "default": []},
        },
        "required": ["guess"],
        "$defs": {"Note": {"type": "string"}},
        "type": "object",
    }
}


def observation(text, reward=None, done=False):
    return {"type": "observation", "data": {"observation": {"text": text}, "reward": reward, "done": done}}


def error(code, message):
    return {"type": "error", "data": {"message": message, "code": code, "errors": [{"loc": ["guess"], "msg": "bad"}]}}


class Game:
    """What the server answers in one session; some guesses make it misbehave."""

    def answer(self, message):
        if message["type"] == "reset":
            self.number = message["data"].get("number", message["data"]["seed"] % 10)
            return observation(f"guess {sorted(message['data'])}")
        guess = message["data"]["guess"]
        odd = {
            -1: error("VALIDATION_ERROR", "Invalid message"),
            -2: error("SESSION_ERROR", "broken"),
            -3: {"type": "observation", "data": {"text": "no observation"}},
            -4: {"type": "observation", "data": {"observation": {}, "reward": "much"}},
            -5: "nonsense",
            -6: [1],
            -7: {"type": "observation", "data": {"observation": {}, "reward": 1e999}},
        }
        if guess == -8:
            time.sleep(2)
        right = guess == self.number
        return odd.get(guess) or observation("right" if right else "wrong", 1.0 if right else -0.25, right)


@contextlib.contextmanager
def serving():
    """A server of games; gives its address, and how many sessions were open after each began or ended."""
    sessions, open_now = [], 0

    def handle(connection):
        nonlocal open_now
        open_now += 1
        sessions.append(open_now)
        game = Game()
        with contextlib.suppress(Exception):
            for raw in connection:
                message = json.loads(raw)
                if message.get("data", {}).get("guess") == -9:
                    break  # the server is gone
                answer = game.answer(message)
                connection.send(answer if answer == "nonsense" else json.dumps(answer))
        open_now -= 1
        sessions.append(open_now)

    def route(connection, request):
        if request.path.endswith("/schema"):
            return connection.respond(200, json.dumps(SCHEMA))
        return None if request.path.endswith("/ws") else connection.respond(404, "nothing here")

    with serve(handle, "127.0.0.1", 0, process_request=route) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.socket.getsockname()[1]}", sessions
        server.shutdown()
        thread.join(10)
