"""A server in a process of its own, as tests of serving/ and of the command line start it."""

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPMessage
from pathlib import Path
from typing import Any, NamedTuple


class Answer(NamedTuple):
    status: int
    headers: HTTPMessage
    content: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.content)


class Client:
    """Asks a server at `address`."""

    address: str

    def ask(self, path: str, body: object = None, kind: str = "application/json") -> Answer:
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": kind} if data is not None else {})
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return Answer(response.status, response.headers, response.read())
        except urllib.error.HTTPError as error:
            return Answer(error.code, error.headers, error.read())

    def refused(self, status: int, body: object, kind: str = "application/json", path: str = "/search") -> str:
        """What the server says against a body that it must refuse with this status."""
        answer = self.ask(path, body, kind)
        assert answer.status == status, answer
        return answer.json["error"]


class Served(Client):
    """An application in a thread of this process."""

    def __init__(self, app: Any) -> None:
        import uvicorn

        from cmr_fast.serving import listen

        listening = listen("127.0.0.1", 0)
        self.address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True).start()


class Server(Client):
    """A process that serves."""

    def __init__(self, process: "subprocess.Popen[str]", said: list[str]) -> None:
        self.process, self.said, self.address = process, said, said[-1].split()[0]

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


@contextmanager
def serving(folder: Path, *arguments: object) -> Iterator[Server]:
    """`cmr-fast serve` with these arguments, at a free port, until it is stopped."""
    command = [sys.executable, "-m", "cmr_fast", "serve", *map(str, arguments)]
    if "--port" not in command:
        command += ["--port", "0"]
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    errors = folder / "stderr"
    with open(errors, "w") as stderr:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=os.environ | {"PYTHONPATH": paths},
        )
    try:
        said: list[str] = []
        while not (said and said[-1].startswith("http://")):
            line = process.stdout.readline()
            assert line, errors.read_text()
            said.append(line.strip())
        yield Server(process, said)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
