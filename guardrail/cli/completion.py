"""guardrail completion: the script that completes commands, options and runs in a shell."""

from __future__ import annotations

import click

PLACES = {
    "bash": '~/.bashrc:  eval "$(guardrail completion bash)"',
    "zsh": '~/.zshrc:  eval "$(guardrail completion zsh)"',
    "fish": "~/.config/fish/config.fish:  guardrail completion fish | source",
}


@click.command(
    epilog="\b\n" + "\n".join(f"Add to {line}" for line in PLACES.values()),
)
@click.argument("shell", type=click.Choice(tuple(PLACES)))
def command(shell: str) -> int:
    """Print the script that lets SHELL complete commands, options, runs and files."""
    from click.shell_completion import get_completion_class

    from guardrail.cli.main import COMPLETION_VARIABLE, guardrail

    shell_class = get_completion_class(shell)
    assert shell_class is not None, "click supports the shells of PLACES"
    script = shell_class(guardrail, {}, "guardrail", COMPLETION_VARIABLE)
    click.echo(script.source_template % script.source_vars())
    return 0
