"""The command line: `mambacupy scan` and `mambacupy info`."""

import contextlib
import json as json_format
import os
import re
import signal
import sys
import time
from pathlib import Path

import click

import mambacupy
from mambacupy import environment, scan_files
from mambacupy.npy_files import FileError, Outputs


class OneLineError(click.ClickException):
    """Bad input or a missing piece: one line on stderr, exit code 2."""

    exit_code = 2

    def show(self, file=None):
        click.echo(f"mambacupy: {' '.join(self.format_message().splitlines())}", err=True)


class _Commands(click.Group):
    """Commands whose usage errors are one line too."""

    def invoke(self, context):
        try:
            return super().invoke(context)
        except click.UsageError as error:
            raise OneLineError(f"{error.format_message()} See {(error.ctx or context).command_path} --help") from None


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(mambacupy.__version__, prog_name="mambacupy")
def main():
    """Mamba's selective scan over .npy files, on a GPU or without one."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends like Ctrl-C: through every `finally`


def _file_options(command):
    for name in reversed(scan_files.NAMES):
        option = click.option(f"--{name}", name.lower() + "_file", metavar="FILE", help=f"{name} from this .npy file.")
        command = option(command)
    return command


@main.command()
@click.argument("inputs", required=False)
@_file_options
@click.option("-o", "--output", required=True, metavar="FILE", help="Where y goes (.npy).")
@click.option("--last-state", metavar="FILE", help="Where the state after the final step goes (.npy).")
@click.option("--softplus", is_flag=True, help="Apply softplus to delta + delta_bias.")
@click.option("--reverse", is_flag=True, help="Let time run from the last step to the first.")
@click.option(
    "--discretization",
    type=click.Choice(["euler", "zoh"]),
    default="euler",
    show_default=True,
    help="Input term: Mamba's Δ·B·u, or the exact zero-order hold.",
)
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda|cuda:N", help="Where to run.")
@click.option(
    "--block-length",
    type=click.IntRange(min=1),
    metavar="N",
    help="Steps read, scanned and written at a time.",
)
@click.option("--force", is_flag=True, help="Replace output files that exist.")
@click.option("--quiet", is_flag=True, help="No summary, no progress bar.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def scan(
    inputs,
    output,
    last_state,
    softplus,
    reverse,
    discretization,
    device,
    block_length,
    force,
    quiet,
    as_json,
    **named,
):
    """Scan INPUTS, a folder of u.npy delta.npy A.npy B.npy C.npy (and D.npy z.npy delta_bias.npy initial_state.npy if
    wanted) or an .npz file with these names, and write y.

    Files may be larger than memory: they are read, scanned and written block by block. Outputs appear when they are
    complete, or not at all.
    """
    overrides = {name: named[name.lower() + "_file"] for name in scan_files.NAMES if named[name.lower() + "_file"]}
    options = {"delta_softplus": softplus, "reverse": reverse, "discretization": discretization}
    with _errors_in_one_line():
        arguments, files, ignored = scan_files.read_inputs(inputs, overrides)
        targets = [output] + ([last_state] if last_state else [])
        _refuse_overwriting_inputs(inputs, files, targets)
        try:
            checked = scan_files.check(arguments, options)
        except (TypeError, ValueError) as error:
            raise OneLineError(_with_file(error, files)) from None
        gpu = _device(device)
        start = time.perf_counter()
        with Outputs(force) as outputs:
            y = outputs.create(output, checked.u.shape, checked.u.dtype)
            kept = None
            if last_state:
                kept = outputs.create(last_state, (checked.batch, checked.dim, checked.state), checked.A.dtype)
            blocks = scan_files.scan_blocks(arguments, options, y, gpu, block_length)
            state = _with_progress(blocks, checked.length, quiet or as_json)
            if kept is not None:
                kept[...] = state
        seconds = time.perf_counter() - start
    if not quiet or as_json:
        _summary(checked, arguments, gpu, seconds, targets, ignored, as_json)


@contextlib.contextmanager
def _errors_in_one_line():
    try:
        yield
    except FileError as error:
        raise OneLineError(str(error)) from None
    except MemoryError:
        raise OneLineError("out of memory; a smaller --block-length needs less") from None
    except KeyboardInterrupt:
        click.echo("mambacupy: interrupted; nothing was written", err=True)
        sys.exit(130)
    except Exception as error:
        if type(error).__name__ in (
            "OutOfMemoryError",
            "CUDARuntimeError",
            "CUDADriverError",
            "CompileException",
        ):
            text = str(error).splitlines()[0]
            raise OneLineError(f"on the GPU: {text}; a smaller --block-length or --device cpu may help") from None
        raise


def _with_file(error, files):
    """The gate's message with the file of the argument it names in front."""
    argument = re.match(r"\w+: (\w+)", str(error))
    text = str(error).removeprefix("scan: ")
    return f"{files[argument[1]]}: {text}" if argument and argument[1] in files else text


def _refuse_overwriting_inputs(inputs, files, targets):
    used = {os.path.realpath(name) for name in files.values()}
    if inputs is not None:
        used.add(os.path.realpath(inputs))
    seen = set()
    for target in targets:
        real = os.path.realpath(target)
        if real in used:
            raise OneLineError(f"{target}: is an input of this scan; write elsewhere")
        if real in seen:
            raise OneLineError(f"{target}: named for two outputs; each needs a file of its own")
        seen.add(real)


def _device(name):
    """CUDA device number, or None for the CPU."""
    match = re.fullmatch(r"cuda(?::(\d+))?", name)
    if name == "cpu":
        return None
    if name != "auto" and not match:
        raise OneLineError(f"--device {name}: wanted auto, cpu, cuda or cuda:N")
    missing = environment.explain_missing()
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


def _with_progress(blocks, length, hidden):
    """Run all blocks under a progress bar, shown on a terminal only; the last state."""
    shown = not hidden and sys.stderr.isatty()
    bar = click.progressbar(length=length, label="scanning", file=sys.stderr) if shown else contextlib.nullcontext()
    with bar:
        for after in blocks:
            if shown:
                bar.update(after[0] - bar.pos)
    return after[1]


def _summary(checked, arguments, gpu, seconds, targets, ignored, as_json):
    elements = checked.batch * checked.dim * checked.length
    if gpu is None:
        where = "cpu"
    else:
        import cupy

        where = f"cuda:{gpu} ({cupy.cuda.runtime.getDeviceProperties(gpu)['name'].decode()})"
    facts = {
        "shapes": {name: list(x.shape) for name, x in arguments.items() if x is not None},
        "dtype": checked.u.dtype.name,
        "device": where,
        "seconds": round(seconds, 6),
        "elements_per_second": round(elements / seconds) if seconds else None,
        "outputs": [str(Path(target)) for target in targets],
        "ignored": ignored,
    }
    if as_json:
        click.echo(json_format.dumps(facts))
        return
    click.echo(
        f"scanned u {tuple(checked.u.shape)} {facts['dtype']}, {checked.state} states a channel, on {where} "
        f"in {seconds:.3g} s ({elements / seconds:.3g} elements/s)"
    )
    click.echo(f"wrote {' and '.join(map(click.format_filename, facts['outputs']))}")
    if ignored:
        click.echo(f"ignored, no argument of a scan: {', '.join(map(click.format_filename, ignored))}")


@main.command()
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
    else:
        click.echo("NumPy arrays run on the CPU, CuPy arrays on their GPU. Nothing is missing.")


def _cuda(version):
    """CUDA's integer versions, as people write them."""
    return f"{version // 1000}.{version % 1000 // 10}" if version else "none"


if __name__ == "__main__":
    main()
