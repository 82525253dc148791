"""The command line: `mambacupy scan`, `mambacupy grad`, `mambacupy generate` and `mambacupy info`."""

import contextlib
import functools
import json as json_format
import re
import signal
import sys
import time
from pathlib import Path

import click
import numpy as np

import mambacupy
from mambacupy import arrays, environment, generate_command, grad_files, scan_files, streams
from mambacupy.npy_files import FileError, Outputs, refuse_overwriting


class OneLineError(click.ClickException):
    """Bad input or a missing piece: one line on stderr, exit code 2."""


def main(arguments=None):
    """Run the command line, of this process or as given, and end the process."""
    streams.mend()
    sys.exit(_run(arguments))


def _run(arguments):
    """The exit code. Whatever ends a run early, the user reads one line at most."""
    try:
        return _commands.main(arguments, standalone_mode=False) or 0
    except click.exceptions.NoArgsIsHelpError as error:
        streams.tell(error.format_message())
        return error.exit_code
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "mambacupy"
        streams.tell(f"mambacupy: {_one_line(error).removesuffix('.')}; see {command} --help")
        return 2
    except click.ClickException as error:
        streams.tell(f"mambacupy: {_one_line(error)}")
        return 2
    except click.Abort:  # Ctrl-C where nothing is written
        return 130
    except OSError as error:
        if error.filename is not None:
            raise
        # What files say is a FileError, so this is what standard output says; of a closed pipe click has seen to.
        streams.give_up(sys.stdout)
        streams.tell(f"mambacupy: standard output: {error.strerror or error}")
        return 1


def _one_line(error):
    return " ".join(error.format_message().splitlines())


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(mambacupy.__version__, prog_name="mambacupy")
def _commands():
    """Mamba's selective scan and its gradient over .npy files, on a GPU or without one."""
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", None)):
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, _end)


def _end(number, _):
    """End as Ctrl-C does, through every `finally`. A closed terminal may send its signal twice: one is enough."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


# ---------------------------------------------------------------------------------------------------- what commands share
class _Name(click.ParamType):
    """Name of a file or folder."""

    name = "name"

    def convert(self, value, parameter, context):
        if not value:
            self.fail("is empty (a shell variable that is not set?), wanted the name of a file or folder", parameter, context)
        return value


def _inputs(kind):
    """The argument INPUTS, and an option for every single file."""

    def decorate(command):
        for name in reversed(kind.names):
            spellings = dict.fromkeys((f"--{name.replace('_', '-')}", f"--{name}"))
            text = f"{name} from this .npy file."
            command = click.option(*spellings, name.lower() + "_file", type=_Name(), metavar="FILE", help=text)(command)
        return click.argument("inputs", required=False, type=_Name())(command)

    return decorate


_SETTINGS = (
    click.option("--softplus", is_flag=True, help="Apply softplus to delta + delta_bias."),
    click.option("--reverse", is_flag=True, help="Let time run from the last step to the first."),
    click.option(
        "--discretization",
        type=click.Choice(["euler", "zoh"]),
        default="euler",
        show_default=True,
        help="Input term: Mamba's Δ·B·u, or the exact zero-order hold.",
    ),
    click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda|cuda:N", help="Where to run."),
    click.option(
        "--block-length",
        type=click.IntRange(min=1),
        metavar="N",
        help="Steps read, computed and written at a time.",
    ),
    click.option("--force", is_flag=True, help="Replace output files that exist."),
    click.option("--quiet", is_flag=True, help="No summary, no progress bar."),
    click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON."),
)


def _settings(command):
    for option in reversed(_SETTINGS):
        command = option(command)
    return command


class _Job:
    """One run over files: its inputs and settings, what is shown while it runs, and its summary."""

    def __init__(
        self, kind, inputs, softplus, reverse, discretization, device, block_length, force, quiet, as_json, **single_files
    ):
        overrides = {name: single_files[name.lower() + "_file"] for name in kind.names}
        overrides = {name: path for name, path in overrides.items() if path is not None}
        self.kind, self.inputs = kind, inputs
        self.options = {"delta_softplus": softplus, "reverse": reverse, "discretization": discretization}
        self.device, self.block_length, self.force = device, block_length, force
        self.quiet, self.as_json = quiet, as_json
        self.arguments, self.files, self.ignored = scan_files.read_inputs(inputs, overrides, kind)

    def check(self, check, targets):
        """Refuse what cannot be run or would destroy its own inputs; finds the device."""
        self.targets = targets
        inputs = [*self.files.values(), *([] if self.inputs is None else [self.inputs])]
        refuse_overwriting(targets, inputs, self.kind.what)
        try:
            self.checked = check(self.arguments, self.options)
        except (TypeError, ValueError) as error:
            raise OneLineError(self._with_file(error)) from None
        self.gpu = _device(self.device)

    def _with_file(self, error):
        """The gate's message with the file of the argument it names in front."""
        argument = re.match(r"\w+: (\w+)", str(error))
        text = str(error).removeprefix(f"{self.kind.what}: ")
        return f"{self.files[argument[1]]}: {text}" if argument and argument[1] in self.files else text

    @contextlib.contextmanager
    def outputs(self):
        start = time.perf_counter()
        with Outputs(self.force) as outputs:
            yield outputs
        self.seconds = time.perf_counter() - start

    def run(self, label, parts):
        """Run all parts of the work, which say how much is done, under a progress bar that is shown on a terminal only."""
        shown = not (self.quiet or self.as_json) and sys.stderr.isatty()
        bar = click.progressbar(length=1000, label=label, file=sys.stderr) if shown else contextlib.nullcontext()
        with bar:
            for done in parts:
                if shown:
                    bar.update(round(1000 * done) - bar.pos)

    def report(self, did, wrote):
        """Print the summary. `did` stands before u's shape; `wrote` tells of the outputs."""
        if self.quiet and not self.as_json:
            return
        checked, gpu, seconds = self.checked, self.gpu, self.seconds
        elements = checked.batch * checked.dim * checked.length
        where = _place(gpu)
        facts = {
            "shapes": {name: list(x.shape) for name, x in self.arguments.items() if x is not None},
            "dtype": checked.u.dtype.name,
            "device": where,
            "seconds": round(seconds, 6),
            "elements_per_second": round(elements / seconds) if seconds else None,
            "outputs": [str(Path(target)) for target in self.targets],
            "ignored": self.ignored,
        }
        if self.as_json:
            click.echo(json_format.dumps(facts))
            return
        click.echo(
            f"{did} u {tuple(checked.u.shape)} {facts['dtype']}, {checked.state} states a channel, on {where} "
            f"in {seconds:.3g} s ({elements / seconds:.3g} elements/s)"
        )
        click.echo(f"wrote {wrote}")
        if self.ignored:
            ignored = ", ".join(map(click.format_filename, self.ignored))
            click.echo(f"ignored, no argument of a {self.kind.what}: {ignored}")


@contextlib.contextmanager
def _errors_in_one_line(relief="a smaller --block-length"):
    """Errors that the user can do something about, in one line; `relief` is what may help against too little memory."""
    try:
        yield
    except FileError as error:
        raise OneLineError(str(error)) from None
    except MemoryError:
        raise OneLineError(f"out of memory; {relief} needs less") from None
    except KeyboardInterrupt:
        streams.tell("mambacupy: interrupted; nothing was written")
        sys.exit(130)
    except Exception as error:
        if type(error).__name__ in (
            "OutOfMemoryError",
            "CUDARuntimeError",
            "CUDADriverError",
            "CompileException",
        ):
            text = str(error).splitlines()[0]
            raise OneLineError(f"on the GPU: {text}; {relief} or --device cpu may help") from None
        raise


def _device(name, multiplies=False):
    """CUDA device number, or None for the CPU. `multiplies`: for work that multiplies matrices."""
    match = re.fullmatch(r"cuda(?::(\d+))?", name)
    if name == "cpu":
        return None
    if name != "auto" and not match:
        raise OneLineError(f"--device {name}: wanted auto, cpu, cuda or cuda:N")
    missing = environment.explain_missing() or (environment.explain_missing_products() if multiplies else None)
    if missing:
        if name == "auto":
            return None
        raise OneLineError(f"--device {name}: {missing}")
    import cupy

    index = int(match[1] or 0) if match else 0
    count = cupy.cuda.runtime.getDeviceCount()
    if index >= count:
        raise OneLineError(f"--device {name}: there are {count} devices, cuda:0 to cuda:{count - 1}")
    return index


def _place(gpu):
    """A device as summaries name it."""
    if gpu is None:
        return "cpu"
    import cupy

    return f"cuda:{gpu} ({cupy.cuda.runtime.getDeviceProperties(gpu)['name'].decode()})"


# ---------------------------------------------------------------------------------------------------- commands
@_commands.command()
@_inputs(scan_files.SCAN)
@click.option("-o", "--output", required=True, type=_Name(), metavar="FILE", help="Where y goes (.npy).")
@click.option("--last-state", type=_Name(), metavar="FILE", help="Where the state after the final step goes (.npy).")
@_settings
def scan(output, last_state, **given):
    """Scan INPUTS, a folder of u.npy delta.npy A.npy B.npy C.npy (and D.npy z.npy delta_bias.npy initial_state.npy if
    wanted) or an .npz file with these names, and write y.

    Files may be larger than memory: they are read, scanned and written block by block. Outputs appear when they are
    complete, or not at all.
    """
    with _errors_in_one_line():
        job = _Job(scan_files.SCAN, **given)
        job.check(scan_files.check, [output] if last_state is None else [output, last_state])
        u, A = job.checked.u, job.checked.A
        with job.outputs() as outputs:
            y = outputs.create(output, u.shape, u.dtype)
            kept = None
            if last_state is not None:
                kept = outputs.create(last_state, (*u.shape[:2], A.shape[1]), A.dtype)
            job.run("scanning", scan_files.scan_blocks(job.arguments, job.options, y, kept, job.gpu, job.block_length))
    job.report("scanned", " and ".join(click.format_filename(Path(target)) for target in job.targets))


@_commands.command()
@_inputs(grad_files.GRADIENT)
@click.option("-o", "--output", required=True, type=_Name(), metavar="FOLDER", help="Where the gradients go.")
@_settings
def grad(output, **given):
    """Gradients of the scan of INPUTS, which is what `mambacupy scan` takes and with it dy.npy, the gradient of y (and
    dlast_state.npy, that of the last state, if wanted). Writes du.npy ddelta.npy dA.npy … into a folder, one for every
    argument that is given; the folder is made unless it exists.

    Files may be larger than memory: they are read, computed and written block by block. A block is a whole multiple of 64
    steps, to which --block-length is rounded up. Outputs appear when they are complete, or not at all.
    """
    with _errors_in_one_line():
        job = _Job(grad_files.GRADIENT, **given)
        arguments, options = job.arguments, job.options
        files = {name: Path(output, f"d{name}.npy") for name in grad_files.wanted(arguments)}
        job.check(grad_files.check, list(files.values()))
        blocks = grad_files.blocks_of_time(job.checked.u, job.block_length, options["reverse"])
        with job.outputs() as outputs:
            outputs.folder(output)
            grads = {name: outputs.create(path, arguments[name].shape, arguments[name].dtype) for name, path in files.items()}
            shape = (len(blocks), job.checked.batch, job.checked.dim, job.checked.state)
            states = outputs.scratch(Path(output, "states"), shape, job.checked.A.dtype)
            job.run("differentiating", grad_files.grad_blocks(arguments, options, blocks, grads, states, job.gpu))
    *names, last = (path.name for path in files.values())
    job.report("differentiated the scan of", f"{', '.join(names)} and {last} to {click.format_filename(Path(output))}")


@_commands.command()
@click.argument("model", type=_Name())
@click.option("--prompt", metavar="TEXT", help="Text to go on from; MODEL has a tokenizer.json.")
@click.option("--tokens", type=_Name(), metavar="FILE", help="Go on from these tokens: .npy, (length,) or (batch, length).")
@click.option("--pad", type=int, metavar="N", help="What is padding in --tokens, and fills rows that have ended.")
@click.option("-o", "--output", type=_Name(), metavar="FILE", help="Where the new tokens go (.npy).")
@click.option("-n", "--max-new-tokens", type=click.IntRange(min=0), default=100, show_default=True, metavar="N")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0: the most probable token. Above, draw.")
@click.option("--top-k", type=int, metavar="N", help="Draw from the N most probable tokens.")
@click.option("--top-p", type=float, metavar="P", help="Draw from the most probable tokens that sum up to P.")
@click.option("--min-p", type=float, metavar="P", help="Draw from tokens at least P times as probable as the most probable.")
@click.option("--repetition-penalty", type=float, default=1.0, show_default=True, help="Above 1: less of what has occurred.")
@click.option("--seed", type=click.IntRange(min=0), help="Draw the same tokens again.")
@click.option("--stop", multiple=True, metavar="TOKEN", help="End after this token (a number, or as the tokenizer spells it).")
@click.option("--no-stop", is_flag=True, help="Go on after MODEL's end-of-text token.")
@click.option("--tokenizer", type=_Name(), metavar="FILE", help="Another tokenizer.json than MODEL's.")
@click.option("--dtype", type=click.Choice(list(arrays.FLOAT_DTYPES)), help="What to compute in.  [default: as stored]")
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda|cuda:N", help="Where to run.")
@click.option("--force", is_flag=True, help="Replace the output file if it exists.")
@click.option("--quiet", is_flag=True, help="The text alone.")
@click.option("--json", "as_json", is_flag=True, help="Print text, tokens and summary as JSON when all is done.")
def generate(**given):
    """Go on from a prompt with MODEL, a folder with config.json, weights and tokenizer.json.

    Text appears as it is made. Ctrl-C ends it and keeps what there is.
    """
    # As on a GPU, what overflows is infinite without a word.
    with _errors_in_one_line("a smaller --dtype"), np.errstate(all="ignore"):
        job = generate_command.Job(given, functools.partial(_device, multiplies=True))
        code = job.run()
        job.report(_place(job.gpu))
    sys.exit(code)


@_commands.command()
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def info(as_json):
    """Say what is installed, what is missing, and the command that mends it."""
    facts = environment.report()
    if as_json:
        click.echo(json_format.dumps(facts))
        return
    builds = ", ".join(f"{name} {version}" for name, version in facts["cupy_builds"].items()) or "none"
    click.echo(f"mambacupy {facts['mambacupy']}, Python {facts['python']}, NumPy {facts['numpy']}")
    click.echo(f"CuPy build: {builds}")
    click.echo(
        f"CUDA: driver {_cuda(facts['cuda_driver'])}, runtime {_cuda(facts['cuda_runtime'])}, NVRTC {facts['nvrtc'] or 'none'}"
    )
    click.echo(f"CUDA headers (for CuPy's own kernels; ours need none): {facts['cuda_headers'] or 'not found'}")
    for device in facts["devices"]:
        click.echo(
            f"cuda:{device['id']}: {device['name']}, compute capability {device['compute_capability']}, "
            f"{device['memory_bytes'] / 2**30:.1f} GiB, {device['multiprocessors']} multiprocessors"
        )
    click.echo(f"kernel cache: {facts['kernel_cache']} ({facts['kernel_cache_bytes'] / 2**20:.1f} MiB)")
    if facts["missing"]:
        click.echo("NumPy arrays run on the CPU. CuPy arrays cannot run here:")
        click.echo(f"  {facts['missing']}")
        return
    if not facts["cuda_headers"]:
        click.echo("NumPy arrays run on the CPU, CuPy arrays on their GPU, but kernels of CuPy's own may need CUDA's headers:")
        click.echo(f"  {environment.headers_hint()}")
    if facts["missing_for_models"]:
        click.echo("The scan runs on the CPU and on the GPU, but models only on the CPU:")
        click.echo(f"  {facts['missing_for_models']}")
    if facts["cuda_headers"] and not facts["missing_for_models"]:
        click.echo("NumPy arrays run on the CPU, CuPy arrays on their GPU. Nothing is missing.")


def _cuda(version):
    """CUDA's integer versions, as people write them."""
    return f"{version // 1000}.{version % 1000 // 10}" if version else "none"


if __name__ == "__main__":
    main()
