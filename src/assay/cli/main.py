"""The application: commands by name, usage errors in one line."""

from __future__ import annotations

import difflib
import re
import sys
from typing import Annotated

import typer

from assay import __version__
from assay.cli import benchmark, compress, explore, export, inspect, methods, plan, profile, report, transform, verify
from assay.cli.answer import fail, interrupted, terminable, untold

USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]
USAGE = 2

app = typer.Typer(
    name="assay", pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)  # fmt: skip
for module in (inspect, transform, profile, plan, explore, compress, verify, report, export, methods, benchmark):
    app.command(module.__name__.rpartition(".")[2])(module.run)
app.command("convert")(export.run)


@app.callback(invoke_without_command=True)
def assay(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Make a trained model smaller: measure it, plan a budget, compress, prove what was lost."""
    if version:
        print(f"assay {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 fell short, 2 wrong input, 130 interrupted (143 by SIGTERM)."""
    given = sys.argv[1:] if arguments is None else arguments
    with terminable():
        try:
            code = _run(given)
            code = _code(interrupted()) if code and untold() else code
        except KeyboardInterrupt:
            code = _code(interrupted())
    sys.exit(code)


def _run(given: list[str]) -> int:
    try:
        return int(app(args=given, prog_name="assay", standalone_mode=False) or 0)
    except USAGE_ERROR as error:
        return _code(fail(_with_hint(error, given), USAGE))
    except typer.Abort:
        return _code(interrupted())
    except typer.Exit as stop:
        return _code(stop)


def _code(stop: typer.Exit) -> int:
    return int(stop.exit_code)


def _with_hint(error: Exception, given: list[str]) -> str:
    """The message of a usage error, with the nearest name for a typo and the way to help."""
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    message = re.split(r"\.? (?:\(Possible|Did you mean)", " ".join(message.split()))[0]
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "assay"
    typo = getattr(error, "option_name", None) or _unknown_command(message)
    near = difflib.get_close_matches(typo, _names(context), 1) if typo else []
    hint = f"did you mean {near[0]}?" if near else f"see {path} --help"
    return f"{message.rstrip('.')}; {hint}"


def _unknown_command(message: str) -> str | None:
    match = re.match(r"No such command '(.*)'", message)
    return match[1] if match else None


def _names(context: typer.Context | None) -> list[str]:
    if context is None:
        return []
    options = [name for parameter in context.command.params for name in parameter.opts]
    return options + list(getattr(context.command, "commands", ()))
