"""A stand-in for a chat server: OpenAI-compatible, on the loopback interface, answering as a test wants."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ChatStandIn:
    """``answers``: texts, one a request, the last one again and again; or callables ``(handler, request)`` that answer
    by hand. ``requests``: what was asked. ``pause``: seconds before each piece of a streamed answer."""

    def __init__(self, *answers, pause=0.0, finish="stop", stream=True, models=("stand-in",)):
        self.answers, self.pause, self.finish, self.stream = list(answers), pause, finish, stream
        self.models, self.requests, self.paths, self.headers = models, [], [], []
        self.gone = threading.Event()  # somebody hung up
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                outer.paths.append(self.path)
                outer.send_json(self, {"data": [{"id": name} for name in outer.models]})

            def do_POST(self):
                outer.paths.append(self.path)
                outer.headers.append(dict(self.headers))
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(request)
                answer = outer.answers[min(len(outer.requests), len(outer.answers)) - 1]
                try:
                    if callable(answer):
                        answer(self, request)
                    else:
                        outer.say(self, answer)
                except OSError:
                    outer.gone.set()

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def say(self, handler, text):
        if not self.stream:
            self.send_json(handler, {"choices": [{"message": {"content": text}, "finish_reason": self.finish}]})
            return
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.end_headers()
        for i in range(0, len(text), 40):
            time.sleep(self.pause)
            self.piece(handler, {"delta": {"content": text[i : i + 40]}})
        self.piece(handler, {"delta": {}, "finish_reason": self.finish})
        handler.wfile.write(b"data: [DONE]\n\n")

    @staticmethod
    def piece(handler, choice):
        handler.wfile.write(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
        handler.wfile.flush()

    @staticmethod
    def send_json(handler, value, status=200):
        body = json.dumps(value).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)
