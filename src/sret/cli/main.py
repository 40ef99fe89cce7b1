"""The `sret` command: finds the requested command, parses its options, runs it, and prints errors as one line.

Wrong input gives one line on standard error and exit code 2. `predict` and `features` exit with 1 if some images could
not be read.
"""

import atexit
import gc
import importlib
import logging
import os
import signal
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from sret.cli.messages import normalize_options, shorten_error
from sret.errors import (
    InputError,
    InputWarning,
    describe_lost_worker,
    did_you_mean,
    first_line,
    is_out_of_memory,
    printable,
)
from sret.files import STATE
from sret.signals import exit_on_sigterm
from sret.version import __version__

# Each is a module of sret.cli.commands, imported only when the command runs.
COMMANDS = {
    "train": "train a model with a recipe",
    "soft-labels": "write a teacher's predictions for many crops of each image",
    "eval": "measure the accuracy of a checkpoint on labelled images",
    "predict": "classify images",
    "features": "write the features of images; measure k-NN and linear-probe accuracy",
    "bench": "compare the speed of models",
    "recursify": "share the blocks of a timm model, and train it to predict what the original predicts",
    "info": "list the published models, or show one model in detail",
    "convert": "convert the authors' checkpoints to safetensors, and back",
    "push": "upload a model to the Hugging Face Hub",
    "export": "export a model to ONNX Runtime or OpenVINO",
    "calibrate-exit": "choose when images leave a model with exits early",
}

# The extra that installs a missing package, if it is not `train`.
EXTRAS = {
    **dict.fromkeys(("datasets", "pyarrow"), "data"),
    **dict.fromkeys(("onnx", "onnx_ir", "onnxscript", "onnxruntime", "openvino"), "export"),
}

LONGEST_MESSAGE = 1200  # characters; the middle of a longer one is left out
OUT_OF_MEMORY = "memory ran out; use a smaller --batch_size, a smaller image size or a smaller model"

# At exit the garbage collector would search the millions of objects of torch and timm, which takes a second or two.
atexit.register(gc.freeze)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    0: success; 1: `predict` or `features` could not read some images; 2: wrong input; 130: Ctrl-C. After SIGTERM the
    process exits with 143.
    """
    with warnings.catch_warnings(), exit_on_sigterm():
        warnings.simplefilter("always", InputWarning)
        warnings.showwarning = _show_warning
        return _main(sys.argv[1:] if argv is None else argv)


def _main(argv: Sequence[str]) -> int:
    try:
        if argv and argv[0] in ("-h", "--help"):
            print(_help())
            return 0
        if argv and argv[0] == "--version":
            print(f"sret {__version__}")
            return 0
        return _run(_command_name(argv), argv[1:])
    except BrokenPipeError:  # the reader of the output, such as head, has closed the pipe
        sys.stdout = None  # nothing to flush at exit
        return 0
    except (InputError, OSError) as error:
        text = str(error)
        if isinstance(error, OSError) and error.filename is not None and error.strerror:
            text = f"{os.fspath(error.filename)}: {error.strerror}"  # without Python's [Errno 2]
        if text.startswith("Caught "):  # from a process that loads images: the message follows a traceback
            text = text.strip().splitlines()[-1].partition(": ")[2]
        text = printable(" ".join(text.split()))
        if len(text) > LONGEST_MESSAGE:
            text = f"{text[: LONGEST_MESSAGE // 2]} ... {text[-LONGEST_MESSAGE // 2 :]}"
        print(f"sret: error: {text}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(error.name or "", "train")
        print(f"sret: error: this command needs {error.name}; run: pip install 'sret[{extra}]'", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        advice = OUT_OF_MEMORY if is_out_of_memory(error) else describe_lost_worker(error)
        if advice is None:
            raise
        with suppress(AttributeError, ValueError):  # torch's handler would raise again for each process that ends
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        print(f"sret: error: {advice}{_resume_hint(argv)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"sret: interrupted{_resume_hint(argv)}", file=sys.stderr)
        return 130


def _resume_hint(argv: Sequence[str]) -> str:
    """How to continue a run of `train` or `recursify`; says if it has saved nothing yet."""
    if argv[:1] not in (["train"], ["recursify"]):
        return ""
    given = [part.removeprefix("--out=") for part in argv if part.startswith("--out=")]
    given += [value for option, value in pairwise(argv) if option == "--out"]
    if given and not Path(given[-1], STATE).exists():
        return "; nothing was saved yet"
    return "; --resume auto continues from the last saved state"


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {description}" for name, description in COMMANDS.items()]
    return "\n".join(
        [
            "usage: sret [--help] [--version] COMMAND ...",
            "",
            "Recursive vision transformers: build, train, evaluate and export them.",
            "",
            *lines,
            "",
            "`sret COMMAND --help` lists the options of a command.",
        ]
    )


def _command_name(argv: Sequence[str]) -> str:
    names = ", ".join(COMMANDS)
    if not argv:
        raise InputError(f"give a command: {names}; `sret COMMAND --help` lists its options")
    name = argv[0]
    if name.startswith("-"):
        options = ["help", "version"]
        raise InputError(
            f"unknown option {name!r}{did_you_mean(name.lstrip('-'), options, '--')}; the command comes first"
        )
    if name not in COMMANDS:
        raise InputError(f"unknown command {name!r}{did_you_mean(name, COMMANDS) or '; the commands are ' + names}")
    return name


def _run(name: str, argv: Sequence[str]) -> int:
    from jsonargparse import ArgumentParser, set_loader

    from sret.cli.help import HelpFormatter
    from sret.ranges import check_size
    from sret.safe_yaml import read_yaml

    command = importlib.import_module(f"sret.cli.commands.{name.replace('-', '_')}")
    set_loader("sret", read_yaml, (InputError,))
    parser = ArgumentParser(
        parser_mode="sret",
        prog=f"sret {name}",
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=HelpFormatter,
        description=COMMANDS[name][0].upper() + COMMANDS[name][1:],
    )
    command.add_arguments(parser)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns if nvcc is there, but no GPU
    try:
        arguments = parser.parse_args(normalize_options(argv))
        for option, value in vars(arguments.as_flat()).items():
            check_size(option, value)
        arguments = parser.instantiate(arguments)
    except InputError:
        raise
    except ArgumentError as error:
        options = [action.dest for action in parser._actions] + getattr(command, "NESTED_OPTIONS", [])
        positionals = {a.dest: str(a.metavar or a.dest) for a in parser._actions if not a.option_strings}
        raise InputError(shorten_error(str(error), options, positionals)) from error
    except UnicodeDecodeError as error:
        _, _, recipe = " ".join(argv).replace("--config=", "--config ").partition("--config ")
        raise InputError(f"{recipe.split(' -')[0]}: the recipe is not a text file ({error})") from error
    except Exception as error:  # jsonargparse passes on what odd values raise somewhere, such as OverflowError
        raise InputError(f"these options or this recipe cannot be read: {first_line(error)}") from error
    return command.run(arguments)


def _show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    is_first = os.environ.get("RANK", "0") == "0"  # all processes of torchrun give the same warnings
    if issubclass(category, InputWarning) and is_first:  # not the warnings of other libraries
        print(f"sret: warning: {printable(str(message))}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
