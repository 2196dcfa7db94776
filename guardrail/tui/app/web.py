"""The screen in a browser, by textual-serve: on this machine only, for owners of the link only.

A page of any site may open a WebSocket to 127.0.0.1, and so may every user of this machine. So the
server answers only to the link that it prints: its token becomes a cookie that no other site can
send. Host names other than 127.0.0.1, and other origins, are refused (DNS rebinding, cross-site
WebSocket hijacking).
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
import shlex
import socket
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from guardrail.core.errors import UsageError

HOST = "127.0.0.1"
PORT = 8765
MISSING = "--web needs textual-serve\n  hint: pip install 'guardrail[web]'"
# The page of textual-serve loads a font from Google; nothing may be loaded from other sites.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'wasm-unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; connect-src 'self' ws://{place}; "
    "frame-ancestors 'none'"
)


def screen_command(path: str, *, read_only: bool, theme: str | None = None) -> str:
    """Return the shell command that runs one screen for one visitor."""
    words = [sys.executable, "-m", "guardrail", "attach", "--in-browser"]
    if read_only:
        words.append("--read-only")
    if theme:
        words += ["--theme", theme]
    return shlex.join([*words, "--", path])


def check_port(port: int) -> int:
    """Return the port, or a free one for 0.

    Raises:
        UsageError: the port is taken.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UsageError(
                f"port {port} of {HOST} is not free ({reason})\n  hint: --port 0 takes any"
            ) from error
        return int(probe.getsockname()[1])


def serve_screen(
    path: str, *, name: str, port: int = PORT, read_only: bool = False, theme: str | None = None
) -> int:
    """Serve the screen of the run at `path` until Ctrl-C; return 0. Training is not affected.

    Raises:
        UsageError: textual-serve is not installed, or the port is taken.
    """
    server = make_server(
        screen_command(path, read_only=read_only, theme=theme), title=name, port=check_port(port)
    )
    server.serve()
    return 0


def make_server(command: str, *, title: str, port: int) -> Any:
    """Return a server of textual-serve that checks each request.

    Raises:
        UsageError: textual-serve is not installed, or has no place for the check.
    """
    try:
        from aiohttp import web
        from textual_serve.server import Server
    except ImportError as error:
        raise UsageError(MISSING) from error
    if not hasattr(Server, "_make_app"):
        raise UsageError(
            "this version of textual-serve cannot be protected\n  hint: pip install 'textual-serve<2'"
        )

    class Guarded(Server):  # type: ignore[misc]
        """The server of one screen.

        Attributes:
            token: what the first request of a visitor must contain.
        """

        token = secrets.token_urlsafe(24)

        def initialize_logging(self) -> None:
            """Do nothing: guardrail prints its own messages."""

        async def on_startup(self, app: Any) -> None:
            self._printing = asyncio.create_task(self._print_link())

        async def _print_link(self) -> None:
            """Print the link once the socket accepts connections, some time after the start."""
            await _wait_until_open(port)
            print(f"{self.title}: {self.public_url}/?token={self.token}")
            print("only on this machine; Ctrl-C ends it, and training goes on", flush=True)

        async def _make_app(self) -> Any:
            app = await super()._make_app()
            app.middlewares.append(guard(self.token, f"{HOST}:{port}"))
            return app

    def guard(token: str, place: str) -> Any:
        cookie = f"guardrail-{port}"
        policy = _POLICY.format(place=place)

        @web.middleware  # type: ignore[untyped-decorator]
        async def only_the_link(request: Any, handler: Callable[[Any], Awaitable[Any]]) -> Any:
            if request.headers.get("Host") != place:
                raise web.HTTPForbidden(text=f"only as {place}\n")
            if request.headers.get("Origin", f"http://{place}") != f"http://{place}":
                raise web.HTTPForbidden(text="not from another site\n")
            if _same(request.query.get("token", ""), token):
                answer = web.HTTPFound("/")
                answer.set_cookie(cookie, token, httponly=True, samesite="Strict", path="/")
                answer.headers["Referrer-Policy"] = "no-referrer"
                raise answer
            if not _same(request.cookies.get(cookie, ""), token):
                raise web.HTTPForbidden(
                    text="use the link that guardrail attach --web has printed\n"
                )
            response = await handler(request)
            if not response.prepared:
                response.headers["Content-Security-Policy"] = policy
                response.headers["Referrer-Policy"] = "no-referrer"
            return response

        return only_the_link

    return Guarded(command, host=HOST, port=port, title=title)


async def _wait_until_open(port: int) -> None:
    while True:
        try:
            _, writer = await asyncio.open_connection(HOST, port)
        except OSError:
            await asyncio.sleep(0.02)
        else:
            writer.close()
            return


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "replace"), token.encode())
