"""Somebody is told: by a command, a webhook, apprise; once, and never at the run's cost."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from guardrail.core.config import GuardConfig
from guardrail.core.errors import ConfigError
from guardrail.core.events.event import Event
from guardrail.core.sections import NotifySection
from guardrail.launch import preflight
from guardrail.launch.notify import Notifier, build_notice
from guardrail.rundir.run_directory import RunDirectory
from tests.support.events import make_line
from tests.support.lab import Lab
from tests.support.texts import numbers_in


def event(kind: str, message: str = "", **data: Any) -> Event:
    return make_line(seq=7, time=1.0, step=12, timeline=0, kind=kind, message=message, data=data)


@pytest.mark.parametrize(
    ("told", "word"),
    [
        (event("incident", state="open"), "incident"),
        (event("incident", state="recovered"), "recovered"),
        (event("incident", state="recovered with higher loss"), "recovered with higher loss"),
        (event("paused", proposals=[{"action": "rollback"}]), "paused"),
        (event("paused", proposals=[]), ""),
        (event("disk", state="failing"), "disk_failing"),
        (event("disk", state="ok"), "disk_ok"),
        (event("ended", phase="halted"), "halted"),
        (event("rank_hung"), "rank_hung"),
        (event("verdict"), ""),
        (event("notified", of=3), ""),
    ],
)
def test_what_is_told_under_which_word(told: Event, word: str) -> None:
    assert told.notice == word


def test_no_control_characters_and_no_text_of_the_data_leave_the_machine() -> None:
    documents = [{"path": "/secret/doc.txt", "excerpt": "private"}]
    proposals = [{"action": "rollback", "text": "rollback: step\x1b[2J 5"}]
    told = event(
        "paused", "loss \x1b]0;x\x07up", proposals=proposals, documents=documents, deadline=99.0
    )
    notice = build_notice(told, run="a\x1b[1mrun", path="/runs/a", host="h")
    assert notice.text == "arun, step 12: loss up" and notice.choices == ("rollback: step 5",)
    assert notice.data == {"deadline": 99.0}


def test_an_address_that_is_none_and_a_package_that_is_missing_are_refused_early(
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match=r"notify\.webhook = \(masked\): ") as caught:
        GuardConfig(notify=NotifySection(webhook="file:///etc/passwd")).check(base=tmp_path)
    assert caught.value.key == "notify.webhook" and "https://" in caught.value.expected
    found = [
        error.key
        for error in preflight.find_problems(
            GuardConfig(notify=NotifySection(apprise=("json://x",))), file="c"
        )
    ]
    assert ("notify.apprise" in found) is (not _has_apprise())


def _has_apprise() -> bool:
    import importlib.util

    return importlib.util.find_spec("apprise") is not None


# -- sending


class Server:
    """A webhook on the loopback; `status` is what it answers, `seconds` how long that takes."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.status, self.seconds = 200, 0.0
        self.authorization = ""  # of the last one
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                server.authorization = self.headers.get("Authorization", "")
                server.bodies.append(
                    json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                )
                time.sleep(server.seconds)
                self.send_response(server.status)
                self.end_headers()

            def log_message(self, *arguments: Any) -> None:
                pass

        self._http = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/hooks/a-secret"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        """May be called again."""
        if self._thread.is_alive():
            self._http.shutdown()
            self._thread.join()
            self._http.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.close()


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "runs", "told", "")


def outcomes(run: RunDirectory) -> list[tuple[str, bool, str]]:
    told = [event for event in run.events() if event.kind == "notified"]
    return [(event.data["way"], event.data["ok"], event.data["reason"]) for event in told]


def notifier(run: RunDirectory, **settings: Any) -> Notifier:
    return Notifier(NotifySection(**settings), run, record=run.write_event)


def test_each_event_is_posted_once_whoever_asks_again(run: RunDirectory, server: Server) -> None:
    run.append("started", "begins")
    run.append("incident", "incident 1: open", step=20, number=1, state="open", onset=19)
    first = notifier(run, webhook=server.url)
    first.send_new_events()
    first.send_new_events()
    run.append("incident", "incident 1: recovered", step=30, number=1, state="recovered")
    run.append("ended", "halted: budget", step=31, phase="halted", reason="budget")
    notifier(run, webhook=server.url).send_new_events()  # as after a restart of the supervisor
    notifier(run, webhook=server.url).send_new_events()
    assert [(body["event"], body["step"]) for body in server.bodies] == [
        ("incident", 20),
        ("halted", 31),
    ]
    incident = server.bodies[0]
    assert incident["text"] == f"{run.name}, step 20: incident 1: open"
    assert incident["path"] == str(run.path) and incident["data"] == {
        "state": "open",
        "number": 1,
        "onset": 19,
    }
    assert outcomes(run) == [("webhook", True, "")] * 2


@pytest.mark.fault("A3")
def test_user_and_password_of_an_address_go_into_a_header(
    run: RunDirectory, server: Server
) -> None:
    run.append("ended", "failed", phase="failed")
    notifier(run, webhook=server.url.replace("http://", "http://ann:p%40ss@")).send_new_events()
    assert outcomes(run) == [("webhook", True, "")]
    assert server.authorization == "Basic YW5uOnBAc3M="  # ann:p@ss


def test_a_supervisor_that_died_while_sending_does_not_tell_again(
    run: RunDirectory, server: Server
) -> None:
    told = run.append("ended", "failed", phase="failed")
    run.write_notified(told.seq)  # remembered first; whether it was sent nobody knows
    notifier(run, webhook=server.url).send_new_events()
    assert server.bodies == []


def test_what_happened_before_the_first_start_with_it_is_old_news(
    run: RunDirectory, server: Server
) -> None:
    run.append("ended", "failed", phase="failed")
    Notifier(
        NotifySection(webhook=server.url), run, record=run.write_event, since=time.time() + 1
    ).send_new_events()
    assert server.bodies == []


def test_failures_are_journal_lines_without_the_address(run: RunDirectory, server: Server) -> None:
    server.status = 500
    run.append("ended", "failed", phase="failed")
    notifier(run, webhook=server.url, command="echo bad luck >&2; exit 3").send_new_events()
    server.close()
    run.append("ended", "failed", phase="failed")
    notifier(run, webhook=server.url, command=["/no/such/program"]).send_new_events()
    told = outcomes(run)
    assert [(way, ok) for way, ok, _ in told[:2]] == [("command", False), ("webhook", False)]
    assert numbers_in(told[0][2]) == [3] and told[0][2].endswith(": bad luck")
    assert numbers_in(told[1][2]) == [500]
    assert [(way, ok) for way, ok, _ in told[2:]] == [("command", False), ("webhook", False)]
    assert "refused" in told[3][2]
    assert "a-secret" not in run.journal_path.read_text()


def test_who_is_too_slow_is_left(run: RunDirectory, server: Server, tmp_path: Path) -> None:
    server.seconds = 0.6
    run.append("ended", "failed", phase="failed")
    late = tmp_path / "late"
    notifier(
        run, webhook=server.url, command=f"sleep 5; touch {late}", seconds=0.3
    ).send_new_events()
    for outcome, slow in zip(outcomes(run), ("command", "webhook"), strict=True):
        way, ok, why = outcome
        assert (way, ok) == (slow, False) and why.endswith("notify.seconds = 0.3")
    assert not late.exists()


def test_a_command_gets_json_and_variables_and_is_no_process_of_the_run(
    run: RunDirectory, tmp_path: Path
) -> None:
    run.append(
        "paused", "loss is up", step=9, proposals=[{"action": "rollback", "text": "rollback: ..."}]
    )
    out, words = tmp_path / "out", tmp_path / "words"
    script = f'cat > {out}; echo "$GUARDRAIL_EVENT|$GUARDRAIL_STEP|$GUARDRAIL_DIRECTORY|$GUARDRAIL_RUN" > {words}'
    notifier(run, command=script).send_new_events()
    assert json.loads(out.read_text())["choices"] == ["rollback: ..."]
    assert words.read_text().strip() == f"paused|9|{run.path}|"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the library's own imports
def test_apprise(run: RunDirectory, server: Server) -> None:
    pytest.importorskip("apprise")
    run.append("ended", "finished", step=9, phase="finished")
    notifier(run, apprise=[server.url.replace("http://", "json://")]).send_new_events()
    assert outcomes(run) == [("apprise", True, "")]
    name, title = server.bodies[0]["title"].split(": ")
    assert name == run.name and title.startswith("finished ") and numbers_in(title) == [9]


# -- the supervisor


def test_the_supervisor_tells_and_a_dying_rank_does_not_take_the_messenger_along(lab: Lab) -> None:
    out = lab.folder / "told"
    lab.write_config(
        f"""
processes = 2
max_restarts = 1
[tensorboard]
enabled = false
[notify]
command = "sleep 1.5; echo $GUARDRAIL_EVENT >> {out}"
[fake]
steps = 100
fault = "exit"
rank = 0
""",
        name="told",
    )
    done = lab.guardrail("launch", "c.toml", "--headless")
    assert done.returncode == 0, done.stderr
    assert out.read_text().split() == ["rank_failed", "finished"]
    assert [ok for _, ok, _ in outcomes(lab.newest())] == [True, True]
