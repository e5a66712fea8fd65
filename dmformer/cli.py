"""The command line: registers the commands, and turns every failure into one line and an exit code."""

from __future__ import annotations

import io
import os
import signal
import sys
import traceback
from typing import Annotated, Any

import typer

from dmformer import __version__
from dmformer.commands import _present as present
from dmformer.commands._options import DEBUG, json_to_output
from dmformer.commands.bench import bench
from dmformer.commands.build import build
from dmformer.commands.cache import cache
from dmformer.commands.check import check
from dmformer.commands.doctor import doctor
from dmformer.commands.eval import evaluate
from dmformer.commands.export import export
from dmformer.commands.inspect import inspect
from dmformer.commands.pack import pack
from dmformer.commands.predict import predict
from dmformer.commands.report import report
from dmformer.commands.serve_layout import serve_layout
from dmformer.commands.sign import sign
from dmformer.commands.train import train
from dmformer.commands.tune import tune
from dmformer.commands.unpack import unpack
from dmformer.commands.verify import verify
from dmformer.errors import DMFormerError, first_line
from dmformer.text import plain, plain_lines

app = typer.Typer(
    name="dmformer",
    help="Take a trained DMFormer from PyTorch to the machine at the edge: export, verify, bench, predict.",
    pretty_exceptions_enable=False,
    add_completion=False,
)
for _command in (
    export, train, sign, cache, build, verify, bench, tune, predict, inspect, report, doctor, check, pack, unpack,
):  # fmt: skip
    app.command()(_command)
app.command("eval")(evaluate)
app.command("serve-layout")(serve_layout)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dmformer {__version__}")
        raise typer.Exit


@app.callback(
    invoke_without_command=True,
    epilog="Exit codes: 0 done, 1 a check or the work failed, 2 wrong usage or input, 3 cannot run here.",
)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option(DEBUG, help="Print the traceback of a failure; legal anywhere.")] = False,
) -> None:
    del version, debug  # a callback has acted; main() looks for the other itself, because parsing may fail before it
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """Run the command line in this process."""
    command: Any = typer.main.get_command(app)
    present.FLAGS.update(_flags(command))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # bars and dots in tables, where output is not UTF-8
    for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP; nohup has it ignored
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:
            signal.signal(getattr(signal, name), _stop)
    try:
        # Not standalone: Typer would print its own panels, and end with codes of its own.
        code = command(args=_completed(sys.argv[1:]), prog_name="dmformer", standalone_mode=False)
        if code == 128 + signal.SIGINT:  # what Typer makes of Ctrl-C, without a word
            code = _report(KeyboardInterrupt())
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - every failure becomes one line
        if DEBUG in sys.argv:
            sys.stderr.write(plain_lines(traceback.format_exc()))
        sys.exit(_report(error))
    sys.exit(code if isinstance(code, int) else 0)


def _flags(command: Any) -> dict[str, str]:
    """Return the flags of all commands by the names of their parameters, which are those of Python's arguments."""
    parameters = (parameter for one in command.commands.values() for parameter in one.params)
    return {parameter.name: parameter.opts[0] for parameter in parameters if parameter.opts[0].startswith("--")}


def _completed(arguments: list[str]) -> list[str]:
    named = next((argument for argument in arguments if not argument.startswith("-")), None)
    return json_to_output(arguments) if named in ("inspect", "doctor", "cache") else arguments


def _stop(number: int, _frame: object) -> None:
    """End by an exception, so that temporary folders go and child processes end with this one."""
    raise SystemExit(128 + number)


def _report(error: BaseException) -> int:
    """One line on standard error; returns the exit code."""
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        sys.stderr.write("stopped\n")
        # Where it came out of a library's exec() or eval(), Python remembers it until the next one, and `python -m`
        # would end by the signal after all.
        exec("")  # noqa: S102
        return 128 + signal.SIGINT
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at exit
        return 128 + signal.SIGPIPE
    if isinstance(error, DMFormerError):
        message, code = present.in_flags(str(error)), error.exit_code
    elif hasattr(error, "format_message"):  # what Typer raises for wrong usage
        wrong = error.format_message().replace("Value error, ", "")  # the words of a library behind Typer
        message, code = f"{wrong} Try 'dmformer --help'.", 2
    elif isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        message, code = "not enough memory; expected more, or a smaller image size, batch or network", 1
    elif isinstance(error, OSError):
        message, code = f"{type(error).__name__}: {first_line(error)}", 1
    else:
        message, code = f"{type(error).__name__}: {first_line(error)} (a defect of dmformer; add --debug)", 1
    sys.stderr.write(f"error: {plain(' '.join(message.split()))}\n")
    return code


if __name__ == "__main__":
    main()
