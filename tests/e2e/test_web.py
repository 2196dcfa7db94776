"""The screen in a browser: loopback, only for the link; what it says where textual-serve is not
installed.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from guardrail.cli.main import main
from guardrail.tui.app import web
from tests.support.fake_run import example
from tests.support.lab import wait_for
from tests.support.places import ROOT


def test_without_textual_serve_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = example(1300).write(tmp_path)
    monkeypatch.setitem(sys.modules, "textual_serve.server", None)
    monkeypatch.setitem(sys.modules, "textual_serve", None)
    assert main(["attach", str(run.path), "--web", "--port", "0"]) == 2
    assert capsys.readouterr().err == f"guardrail: {web.MISSING}\n"


@pytest.mark.parametrize("options", [["--port", "1"], ["--web", "--headless"]])
def test_options_that_do_not_go_together(options: list[str], tmp_path: Path) -> None:
    assert main(["attach", str(example(1300).write(tmp_path).path), *options]) == 2


def test_a_port_that_is_taken_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind((web.HOST, 0))
        taken.listen()
        with pytest.raises(web.UsageError, match="not free"):
            web.check_port(taken.getsockname()[1])
    with pytest.raises(web.UsageError, match="not free"):
        web.check_port(70_000)
    assert web.check_port(0) > 0


def test_a_path_cannot_leave_its_word() -> None:
    path = '/runs/$(rm -rf x)/a\'b; "c" --read-only'
    words = shlex.split(web.screen_command(path, read_only=False))
    assert words[-2:] == ["--", path] and words[:4] == [sys.executable, "-m", "guardrail", "attach"]
    assert "--read-only" in shlex.split(web.screen_command("/r", read_only=True))
    assert shlex.split(web.screen_command("/r", read_only=True, theme="light"))[-4:] == [
        "--theme",
        "light",
        "--",
        "/r",
    ]


async def test_only_the_link_opens_it_and_a_visitor_sees_the_run(tmp_path: Path) -> None:
    pytest.importorskip("textual_serve")
    import aiohttp

    run = example(1300).write(tmp_path)
    port = web.check_port(0)
    arguments = [
        sys.executable,
        "-m",
        "guardrail",
        "attach",
        "--web",
        "--port",
        str(port),
        "--read-only",
        str(run.path),
    ]
    server = await asyncio.create_subprocess_exec(
        *arguments, stdout=asyncio.subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    try:
        assert server.stdout is not None
        async with asyncio.timeout(60):
            link = (await server.stdout.readline()).decode().split()[-1]
        base, _, token = link.partition("/?token=")
        assert base == f"http://{web.HOST}:{port}" and len(token) >= 32
        async with aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) as visitor:

            async def status(path: str, **headers: str) -> int:
                async with visitor.get(
                    base + path, headers=headers, allow_redirects=False
                ) as answer:
                    return answer.status

            for path in ("/", "/ws", "/static/js/textual.js", "/?token=x", "/?token=ü"):
                assert await status(path) == 403, path
            assert await status(f"/?token={token}", Host=f"evil.example:{port}") == 403
            assert await status(f"/?token={token}") == 302
            async with visitor.get(f"{base}/") as page:
                assert page.status == 200 and token not in await page.text()
                assert "'self'" in page.headers["Content-Security-Policy"]
            assert await status("/ws", Host=f"localhost:{port}") == 403
            assert await status("/ws", Origin="http://evil.example") == 403
            async with visitor.ws_connect(f"{base}/ws?width=100&height=30", origin=base) as socket:
                assert await shown(socket, b"1,300 / 6,000")
                (screen,) = screens_of(server.pid)
            wait_for(
                lambda: not screen.is_running() or screen.status() == "zombie",
                what="the visitor's screen to end",
            )
    finally:
        server.send_signal(signal.SIGINT)
        assert await server.wait() == 0


def screens_of(pid: int) -> list[psutil.Process]:
    """What the server runs for its visitors, its shell aside."""
    found = psutil.Process(pid).children(recursive=True)
    return [process for process in found if "--in-browser" in process.cmdline()]


async def shown(socket: Any, text: bytes) -> bool:
    """Whether the text reaches the visitor; what the terminal is told between letters does not
    matter here.
    """
    seen = b""
    async with asyncio.timeout(60):
        async for message in socket:
            seen += message.data if isinstance(message.data, bytes) else message.data.encode()
            if text in seen:
                return True
    return False
