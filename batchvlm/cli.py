"""The command line. `batchvlm run` is a Hydra app; errors are reported in one line."""

from __future__ import annotations

import atexit
import difflib
import errno
import io
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NoReturn

from batchvlm import __version__
from batchvlm.config import JobConfig
from batchvlm.errors import BatchvlmError, ConfigError, ExitCode, TooManyErrors
from batchvlm.runtime.launch import find_launch
from batchvlm.runtime.logs import set_up_logging
from batchvlm.runtime.signals import Interrupted, catch_signals, ignore_signals
from batchvlm.words import described

COMMANDS = ("run", "plan", "preview", "status", "verify", "report", "compare", "compact", "export")

_USAGE = """\
batchvlm: run a vision-language model over a whole dataset, one output row for every input row.

Try it (bundled images, bundled model):
  batchvlm run

Your own images, a model of the Hub; the same settings for all three:
  batchvlm plan     data=parquet data.path=F model=hub model.path=NAME     what the job will be
  batchvlm preview  data=parquet data.path=F model=hub model.path=NAME     a few rows answered here
  batchvlm run      data=parquet data.path=F model=hub model.path=NAME output.dir=OUT

Its output:
  batchvlm status OUT             how far the job is, running or dead; --watch
  batchvlm verify OUT             whether every input row is there exactly once
  batchvlm report OUT             one HTML file: counts, speed, errors, a gallery of rows
  batchvlm compare OUT_A OUT_B    two outputs of one input, row by row
  batchvlm compact OUT            merge the parts of a finished job into larger ones
  batchvlm export OUT --to openai --path FILE     the answers as an OpenAI batch output file
  batchvlm export OUT --to hub NAMESPACE/NAME     the output as a dataset of the Hugging Face Hub

More:
  batchvlm run --help                     groups, settings, examples
  batchvlm run --cfg job                  every setting with its value, and nothing else
  eval "$(batchvlm -sc install=bash)"     tab completion; also install=zsh, install=fish
  batchvlm --version
  --debug, with any command               an error also shows where it happened

Interrupted? Run the same command again: it goes on where it stopped.
Exit codes: 0 done, 1 failed, 2 wrong configuration or input, 3 more failed rows than
runtime.max_error_rate, 75 interrupted, run me again, 130 stopped by a second Ctrl-C.
"""


def program() -> NoReturn:
    """Run the `batchvlm` command as this process's program."""
    leave(main())


def leave(code: int) -> NoReturn:
    """End the process with an exit code, after all registered clean-ups.

    Python would then free its modules, while Arrow's and torch's own threads run on. One that asks
    for the interpreter meanwhile aborts the process: a job that is done would end with SIGABRT.
    """
    # As multiprocessing does in a child before os._exit.
    threading._shutdown()  # type: ignore[attr-defined]
    with suppress(Exception):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        # Closed, or nobody reads it any more.
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the `batchvlm` command."""
    args = _take_debug(sys.argv[1:] if argv is None else argv)
    match args:
        case ["--version"] | [_, "--version"] if args[0] in (*COMMANDS, "--version"):
            print(f"batchvlm {__version__}")
            return ExitCode.DONE
        case ["run", *rest]:
            return run_app("run", rest)
        case ["verify" | "status" | "compact" as name, *rest]:
            from batchvlm import commands

            return _run_command(getattr(commands, name), rest)
        case ["export", *rest]:
            from batchvlm.export.commands import export

            return _run_command(export, rest)
        case ["report" | "compare" as name, *rest]:
            from batchvlm.report import commands as report_commands

            return _run_command(getattr(report_commands, name), rest)
        case ["plan" | "preview" as name, *rest]:
            from batchvlm.before import commands as before

            try:
                job, overrides = getattr(before, name)(rest)
            except ConfigError as error:
                return _report(error)
            return run_app("run", overrides, program=f"batchvlm {name}", job=job)
        case ["-sc" | "--shell-completion", *_]:
            # Hydra's completion script passes the whole line; Hydra expects it without a command.
            line = os.environ.get("COMP_LINE", "")
            for word in ("run", "plan", "preview"):
                line = line.replace(f"batchvlm {word} ", "batchvlm ", 1)
            os.environ["COMP_LINE"] = line
            return run_app("run", args, program="batchvlm")
        case [] | ["-h" | "--help" | "help"]:
            print(_USAGE, end="")
            return ExitCode.DONE
        case _:
            near = difflib.get_close_matches(args[0], [*COMMANDS, "--help", "--version"], n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
            return _report(ConfigError(f"{args[0]} is no command", hint=hint))


_shows_tracebacks = False
"""Whether `--debug` is given."""


def _take_debug(args: Sequence[str]) -> list[str]:
    """Note whether the arguments hold `--debug`, and return the others."""
    global _shows_tracebacks
    _shows_tracebacks = "--debug" in args
    return [arg for arg in args if arg != "--debug"]


def _run_command(command: Callable[[Sequence[str]], ExitCode], argv: Sequence[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        return int(command(argv))
    except BatchvlmError as error:
        return _report(error)
    except BrokenPipeError:
        # The reader of stdout (such as `head`) has ended.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.FAILED
    except KeyboardInterrupt:
        return ExitCode.STOPPED
    except Exception as error:
        return _report(error)


def run_app(
    config_name: str,
    overrides: Sequence[str] | None = None,
    *,
    program: str = "batchvlm run",
    job: Callable[[JobConfig], None] | None = None,
) -> int:
    """Run the Hydra app on one of the primary configs and return the exit code.

    Args:
        config_name: run, caption, vqa or extract.
        overrides: arguments for Hydra; None for those of the process.
        program: the program's name for Hydra.
        job: called with the settings; None to run the job.
    """
    _open_streams()
    if "OMP_WAIT_POLICY" not in os.environ:
        # Must be set before torch loads OpenMP: idle threads then spin for some 20 us and sleep.
        # With longer spinning they would take cores from the workers.
        os.environ.update(OMP_WAIT_POLICY="passive", GOMP_SPINCOUNT="1000")
    if find_launch().world_size > 1:
        # If rank 0 is gone, print one line rather than pages of C++ frames.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    # Their warnings are for programmers; this program reports what matters to users.
    for library in ("TRANSFORMERS", "HF_HUB", "DATASETS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    # Makes Hydra raise errors instead of printing them.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    if overrides is None:
        sys.argv[1:] = _take_debug(sys.argv[1:])
    else:
        sys.argv = [program, *overrides]
    try:
        catch_signals()  # inside the try, because a signal may arrive during the call
        return _run_hydra(config_name, job or _run_job)
    except (Interrupted, KeyboardInterrupt):
        return _report_interrupted()
    except Exception as error:
        return _report(error)


def _open_streams() -> None:
    """Open missing standard streams as /dev/null.

    Otherwise an output file could get descriptor 0, 1 or 2, and a library could print into it.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


def _run_hydra(config_name: str, job: Callable[[JobConfig], None]) -> int:
    import hydra
    from omegaconf import DictConfig

    from batchvlm.pipeline.sweep import RefusedSweepError
    from batchvlm.settings.compose import (
        conf_dir,
        explain,
        is_mistake,
        names_the_time,
        read_config,
        register_schema,
    )

    codes = [ExitCode.DONE]
    pid = os.getpid()

    def task(node: DictConfig) -> None:
        try:
            register_schema()  # a launcher may run this job in a new process
            cfg = read_config(node)
            if names_the_time(node):
                _check_is_alone(cfg)
            _set_up_process(cfg)
            job(cfg)
        except BrokenPipeError as error:
            raise RuntimeError("a pipe within the job broke") from error
        except Exception as error:
            # Not raised through Hydra, so that the other jobs of a sweep still run.
            codes.append(_report(error))
            if os.getpid() != pid:
                # In a launcher's process the job would count as done. Hydra passes this exception
                # to the process that waits for the job.
                raise BatchvlmError(f"a job of the sweep failed: {error}") from None

    _check_flags()
    register_schema()
    app = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=config_name)
    try:
        with _ignore_closed_stdout(errno.EPIPE):
            app(task)()
    except RefusedSweepError as error:
        raise error.reason from error
    except Exception as error:
        if type(error).__module__.startswith("submitit."):
            raise BatchvlmError(
                "a job of the sweep failed without a word",
                hint="its log is below hydra.sweep.dir, in .submitit",
            ) from error
        if not is_mistake(error):
            raise
        raise explain(error) from error
    return max(codes)


def _run_job(cfg: JobConfig) -> None:
    from batchvlm.pipeline.follow import follow_job, follower_of
    from batchvlm.pipeline.pipeline import run_job
    from batchvlm.pipeline.summary import print_summary

    if (replica := follower_of(cfg)) is not None:
        follow_job(cfg, replica)
        return
    summary = run_job(cfg)
    with _ignore_closed_stdout(errno.EPIPE, errno.EIO):
        print_summary(summary)
    ignore_signals()


@contextmanager
def _ignore_closed_stdout(*codes: int) -> Iterator[None]:
    """Ignore these errors of stdout: EPIPE of a closed pipe (`| head`), EIO of a terminal."""
    try:
        yield
        print(end="", flush=True)
    except OSError as error:
        if error.errno not in codes:
            raise
        # Python flushes stdout again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _check_flags() -> None:
    """Check the flags, because Hydra would print a page of usage for a wrong one.

    Raises:
        ConfigError: a flag is unknown, or a setting follows a flag.
    """
    from hydra._internal.utils import get_args_parser

    def refuse(message: str) -> NoReturn:
        what = message.partition("unrecognized arguments: ")[2].split(" ")[0]
        named = sys.argv[0] if sys.argv[0].startswith("batchvlm ") else "batchvlm run"
        if not what:
            hint = f"{named} --help lists the flags"
        elif what.startswith("-"):
            message, hint = f"{what} is no flag", f"{named} --help lists the flags"
            if "." in what or "=" in what:
                hint = f"settings have no dashes: {what.lstrip('-')}"
        else:
            message = f"{what} follows a flag, other settings precede it"
            hint = "write the flags after all settings"
        raise ConfigError(message, hint=hint)

    parser = get_args_parser()
    setattr(parser, "error", refuse)  # noqa: B010
    parser.parse_args()


def _report_interrupted() -> ExitCode:
    _print_error("batchvlm: interrupted; run the same command again to go on")
    return ExitCode.INTERRUPTED


def _is_interruption(error: BaseException | None) -> bool:
    """Whether an `Interrupted` is among the causes, as when a library wraps it in its own error."""
    while error is not None and not isinstance(error, Interrupted):
        error = error.__cause__ or error.__context__
    return error is not None


def _report(error: Exception) -> ExitCode:
    """Print an error in one line, with `--debug` also its traceback; return its exit code."""
    if _shows_tracebacks:
        _print_error("".join(traceback.format_exception(error)).rstrip())
    # A disk that refuses the rows of an interrupted run is an error of its own.
    is_own = isinstance(error, OSError | BatchvlmError) and not isinstance(error, ConfigError)
    if not is_own and _is_interruption(error):
        return _report_interrupted()
    if isinstance(error, BatchvlmError):
        _print_error(f"batchvlm: error: {error}")
        if isinstance(error, TooManyErrors):
            _print_error("\n".join(error.causes))
        return error.exit_code
    # An unexpected error: a bug of this program or of a library.
    hint = "" if _shows_tracebacks else "; the same command with --debug shows where"
    _print_error(f"batchvlm: error: {described(error)}{hint}")
    return ExitCode.FAILED


def _print_error(text: str) -> None:
    """Print to stderr; nowhere if that is a closed terminal."""
    with suppress(OSError):
        print(text, file=sys.stderr)


def _check_is_alone(cfg: JobConfig) -> None:
    """Refuse an output folder named by the time if several processes are to share it."""
    if (size := find_launch().world_size) > 1:
        raise ConfigError(
            f"output.dir names the time: each of the {size} processes of this launch would "
            "answer every row into a folder of its own",
            hint="name one folder, with which a rerun goes on, too",
        )
    if (size := cfg.runtime.num_tasks) > 1:
        raise ConfigError(
            f"output.dir names the time: each of the {size} tasks of this array would write its "
            "rows into a folder of its own",
            hint="name one folder, with which a requeued task goes on, too",
        )


def _set_up_process(cfg: JobConfig) -> None:
    # Again, because the previous job of a sweep left signals ignored.
    catch_signals()
    set_up_logging(as_json=cfg.runtime.log_json)
    for name in ("accelerate", "fsspec", "httpx", "httpx2"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for stream in (sys.stdout, sys.stderr):
        # A character that the terminal's encoding lacks must not fail a finished run.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
