"""guardrail attach: show the screen of a run, or print its lines without a terminal."""

from __future__ import annotations

import click

from guardrail.cli.common import (
    can_draw,
    complete_run,
    no_garbage_collection,
    open_run,
    root_option,
    screen_options,
    show_screen,
)


@click.command()
@click.argument("run", required=False, shell_complete=complete_run)
@click.option("--read-only", is_flag=True, help="Send no commands.")
@click.option(
    "--headless",
    is_flag=True,
    help="Print lines instead of the screen. The default without a terminal.",
)
@click.option(
    "--web",
    is_flag=True,
    help="Serve the screen to a browser on this machine (needs guardrail[web]).",
)
@click.option("--port", type=int, help="Port of --web; 0 takes any free one. Default: 8765.")
@click.option("--in-browser", is_flag=True, hidden=True, help="What --web runs for each visitor.")
@screen_options
@root_option
def command(
    run: str | None,
    read_only: bool,
    headless: bool,
    web: bool,
    port: int | None,
    in_browser: bool,
    theme: str | None,
    no_mouse: bool,
    root: str,
) -> int:
    """Watch RUN, or the newest run. Press q or Ctrl-C to leave: the run continues.

    Without a terminal, or with TERM=dumb, attach prints lines until the run has ended. The exit
    code of attach is the exit code of the run.
    """
    if web and headless:
        raise click.UsageError("--web and --headless exclude each other; give one of them")
    if port is not None and not web:
        raise click.UsageError("--port needs --web")
    found = open_run(run, root)
    if web:
        from guardrail.tui.app import web as browser

        port = browser.PORT if port is None else port
        return browser.serve_screen(
            str(found.path), name=found.name, port=port, read_only=read_only, theme=theme
        )
    if headless or not (in_browser or can_draw()):
        from guardrail.launch.log_printer import attach_run

        return attach_run(found)

    def screen() -> int:
        with no_garbage_collection():
            from guardrail.tui.app.app import run_screen

        return run_screen(found.path, read_only=read_only, theme=theme, mouse=not no_mouse)

    return show_screen(screen)
