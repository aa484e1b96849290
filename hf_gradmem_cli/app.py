"""The application, and the manners that every command has.

Exit codes: 0 done; 1 tried and failed; 2 the command cannot be carried out as it was given; 130 interrupted. What a
command is asked for goes to stdout, everything else to stderr.
"""

import functools
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from .plain import plain

FAILURE, MISTAKE, INTERRUPTED = 1, 2, 130
_EXAMPLE_SEPARATOR = "\n\n"

app = typer.Typer(
    name="hf-gradmem",
    epilog="First steps:  [cyan]hf-gradmem demo[/]\n\nHelp on a command:  [cyan]hf-gradmem write --help[/]",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


@dataclass
class Manners:
    """How much is said. Set anew by each call of the application.

    Attributes:
        quiet: nothing but what was asked for: no report of what was done, no progress, no warning.
        verbose: whatever the libraries underneath have to say, and the stack trace of an error.
        interrupted: whether the user has interrupted; libraries make other errors of that, or nothing.
    """

    quiet: bool = False
    verbose: bool = False
    interrupted: bool = False


manners = Manners()


def main() -> None:
    """Entry point of `hf-gradmem`. The process ends with 130 if it is interrupted, wherever it is by then."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it may be ignored, as in the background
        signal.signal(signal.SIGINT, _interrupt)
    try:
        app()
    finally:
        if manners.interrupted:
            _leave()
        if signal.getsignal(signal.SIGINT) is _interrupt:
            signal.signal(signal.SIGINT, _leave)  # nothing is left to be unwound


def _interrupt(*_: Any) -> NoReturn:
    manners.interrupted = True
    raise KeyboardInterrupt


def _leave(*_: Any) -> NoReturn:
    """End now: an interpreter that was interrupted within a library may end in another way."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(INTERRUPTED)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"hf-gradmem {version('hf-gradmem')}")
        raise typer.Exit


@app.callback()
def _options_of_every_command(
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print what was asked for alone: no report, progress or warning.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Let the libraries underneath speak; show where an error arose.")
    ] = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Write a context into a few memory vectors by gradient descent, and read from them with the context gone."""
    manners.quiet, manners.verbose = quiet, verbose
    if quiet and verbose:
        stop("Error: --quiet and --verbose contradict each other.", MISTAKE)


def command(*examples: str, name: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a command of the application, with examples below its help.

    It runs quietly. The user's mistakes and failures are reported in one line in place of a stack trace.
    """
    shown = _EXAMPLE_SEPARATOR.join(f"[cyan]{example}[/]" for example in examples)

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @app.command(name, epilog=f"Examples:{_EXAMPLE_SEPARATOR}{shown}")
        @functools.wraps(function)
        def run(*arguments: Any, **options: Any) -> None:
            try:
                with _notes_told(), nullcontext() if manners.verbose else _libraries_silenced():
                    function(*arguments, **{name: _at_home(value) for name, value in options.items()})
            except (typer.Exit, BrokenPipeError):  # the latter is a reader that has seen enough, as `head`
                raise
            except (KeyboardInterrupt, Exception) as error:
                if manners.verbose:
                    typer.echo(plain(traceback.format_exc()), err=True, nl=False)
                stop(*_explain(error))

        return run

    return decorate


def _at_home(value: Any) -> Any:
    """A path below ~, which a shell leaves to the program within quotes, or several; other values as they are."""
    if isinstance(value, list):
        return [_at_home(each) for each in value]
    return Path(os.path.expanduser(value)) if isinstance(value, Path) else value


def _explain(error: BaseException) -> tuple[str, int]:
    """One line on an error, and the exit code."""
    if manners.interrupted or isinstance(error, KeyboardInterrupt):
        return "Interrupted.", INTERRUPTED
    told = str(error).replace("the argument `trust_remote_code=True`", "--trust-remote-code")
    if isinstance(error, ImportError | ValueError | TypeError | OSError):
        return f"Error: {told}", MISTAKE
    if isinstance(error, FloatingPointError | MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"Error: {str(error) or 'out of memory'}", FAILURE
    # Nothing that this package raises: the kind of error says more than its message.
    return f"Error: {type(error).__name__}: {error} (hf-gradmem --verbose ... shows where)", FAILURE


def stop(message: str, code: int) -> NoReturn:
    """Leave with one line on stderr."""
    typer.echo(plain(" ".join(message.split())), err=True)
    raise typer.Exit(code)


def shows_progress(as_json: bool) -> bool:
    """Whether somebody is there to look at a progress bar."""
    return sys.stderr.isatty() and not as_json and not manners.quiet


class _Teller(logging.Handler):
    """Prints what is logged as a line on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        typer.echo(plain(record.getMessage()), err=True)


@contextmanager
def _notes_told() -> Iterator[None]:
    """Tell what this package logs of its own choices, for a span, unless nothing but what was asked for is wanted."""
    log, teller = logging.getLogger("hf_gradmem"), _Teller(logging.INFO)
    before = log.level
    if not manners.quiet:
        log.addHandler(teller)
        log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(teller)
        log.setLevel(before)


@contextmanager
def _libraries_silenced() -> Iterator[None]:
    """Silence the libraries underneath for a span; this package's own warnings become one line each."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    verbosity, hub_verbosity = logging.get_verbosity(), hub_logging.get_verbosity()
    bar_was_enabled, hub_bars_disabled = logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not hub_bars_disabled and not manners.quiet:
        enable_progress_bars()  # those of downloads, which the line before switched off as well
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not manners.quiet:
                warnings.filterwarnings("default", module=r"hf_gradmem\b")
            warnings.showwarning = lambda message, *_: typer.echo(plain(f"Warning: {message}"), err=True)
            yield
    finally:
        logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        if bar_was_enabled:
            logging.enable_progress_bar()
