"""The `megalemur` command. Imports what a subcommand needs only when it runs: --help must not wait for torch."""

import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megalemur.cli import exit_codes
from megalemur.cli.failures import reported

if TYPE_CHECKING:
    from megalemur.config.run import RunConfig
    from megalemur.observe.expectation import Expectation
    from megalemur.supervise.pulse import Pulse
    from megalemur.supervise.signals import StopRequest

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

RunFile = Annotated[Path, typer.Argument(help="run file (YAML)", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value …", show_default=False)]


@app.callback()
def megalemur() -> None:
    """3D-parallel training of Llama-class models, with proof before and after every step."""


@app.command()
@reported
def train(run_file: RunFile, overrides: Overrides = None) -> None:
    """Train as the run file says; resumes from its newest checkpoint. One process a GPU: see launch/."""
    from megalemur.config.load import load_run
    from megalemur.supervise.run import supervised

    config = load_run(run_file, overrides or ())
    _lint_before_training(config)
    raise typer.Exit(supervised(config, _train, requeue=exit_codes.REQUEUE))


def _lint_before_training(config: "RunConfig") -> None:
    """Errors end every rank alike, before any process group; warnings are rank 0's to tell."""
    from megalemur.plan.lint.run import lint_config, refuse

    findings = lint_config(config)
    refuse(findings)
    if os.environ.get("RANK", "0") == "0":
        for finding in findings:
            typer.echo(f"megalemur: warning: {finding.text} ({finding.rule})", err=True)


def _train(config: "RunConfig", stop: "StopRequest", pulse: "Pulse") -> int:
    """What a rank does. Its supervisor never imports torch: it stays small, and nothing in it can hang."""
    from megalemur.train.run import train

    stopped = train(config, stop, pulse, expectation=_expectation(config))
    return exit_codes.REQUEUE if stopped else exit_codes.DONE


def _expectation(config: "RunConfig") -> "Expectation | None":
    """What the plan says of this run here, for rank 0, which compares; None where there is no plan for it."""
    from megalemur.parallel.device import gpu_name

    gpu = gpu_name()
    if gpu is None or os.environ.get("RANK", "0") != "0":
        return None
    from megalemur.plan.expected import expectation

    try:
        return expectation(config, gpu)
    except Exception as error:  # whatever it is, it is no reason not to train
        typer.echo(f"megalemur: warning: no plan to compare with: {type(error).__name__}: {error}", err=True)
        return None


@app.command()
@reported
def lint(
    run_file: RunFile,
    overrides: Overrides = None,
    files: Annotated[bool, typer.Option("--files", help="look at the data, checkpoints, disk and machine too")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="warnings count as errors")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="of the cluster")] = 8,
) -> None:
    """Say what is wrong with a run file before it is launched. Exit code 11 where something is."""
    from rich.console import Console

    from megalemur.plan.lint import report
    from megalemur.plan.lint.run import lint_run_file

    findings = lint_run_file(run_file, overrides or (), files=files, gpus_per_node=gpus_per_node)
    if as_json:
        typer.echo(report.as_json(findings))
    else:
        Console().print(report.table(findings) if findings else "nothing to say against it")
    if any(strict or finding.level == "error" for finding in findings):
        raise typer.Exit(exit_codes.BAD_CONFIG)


@app.command("show-config")
@reported
def show_config(run_file: RunFile, overrides: Overrides = None) -> None:
    """Print the resolved run file, what follows from it, and what this machine does differently from a cluster."""
    from rich.console import Console

    from megalemur.config.load import dump_run, load_run
    from megalemur.observe.report import banner, table

    config = load_run(run_file, overrides or ())
    typer.echo(dump_run(config))
    from megalemur.parallel.device import describe

    console = Console()
    console.print(banner(config))
    console.print(table("On this machine", list(describe(config.parallel).items())))


@app.command()
@reported
def plan(  # noqa: PLR0913 - typer reads the options from the parameters
    run_file: Annotated[Path | None, typer.Argument(help="run file (YAML)", show_default=False)] = None,
    overrides: Overrides = None,
    cluster: Annotated[str, typer.Option(help="a file of launch/clusters, or the path of one")] = "h100_sxm",
    search: Annotated[bool, typer.Option("--search", help="rank all layouts")] = False,
    gpus: Annotated[int | None, typer.Option(min=1, help="of the search; unset: as in the run file")] = None,
    write: Annotated[Path | None, typer.Option(help="write the fastest layout's run file")] = None,
    html: Annotated[Path | None, typer.Option(help="write a page with charts")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON and nothing else")] = False,
    json_schema: Annotated[bool, typer.Option("--json-schema", help="print the schema of --json")] = False,
    failures: Annotated[float, typer.Option(min=0, help="failures a GPU and year")] = 0.17,
    disk: Annotated[float, typer.Option(min=0, help="GB/s that the file system takes from all ranks")] = 5.0,
    restart: Annotated[float, typer.Option(min=0, help="seconds from a failure until training goes on")] = 600.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="build and run chosen ranks on fake tensors")] = False,
    ranks: Annotated[str | None, typer.Option(help="of the dry run, as in 0,7,last; unset: 0,last")] = None,
    all_classes: Annotated[bool, typer.Option("--all-classes", help="dry-run a rank of every stage")] = False,
) -> None:
    """Say what a run needs, takes and costs, from the file that launches it. Without --dry-run no torch is needed."""
    from megalemur.plan.ask import Question, answer, print_schema

    if json_schema:
        return print_schema()
    if run_file is None:
        raise typer.BadParameter("a run file is needed", param_hint="RUN_FILE")
    question = Question(
        run_file=run_file,
        overrides=tuple(overrides or ()),
        cluster=cluster,
        search=search,
        gpus=gpus,
        write=write,
        html=html,
        as_json=as_json,
        failures_per_gpu_year=failures,
        disk_bytes_per_second=disk * 1e9,
        restart_seconds=restart,
        dry_run=dry_run,
        ranks=ranks,
        all_classes=all_classes,
    )
    found = answer(question)
    raise typer.Exit(
        exit_codes.BAD_CONFIG if found.wrong else exit_codes.DONE if found.fits else exit_codes.DOES_NOT_FIT
    )


@app.command()
def schema() -> None:
    """Print the JSON schema of a run file, for editors."""
    import orjson

    from megalemur.config.load import run_schema

    typer.echo(orjson.dumps(run_schema(), option=orjson.OPT_INDENT_2).decode())


@app.command()
def doctor() -> None:
    """Say what is installed, what is missing and what that costs."""
    from rich.console import Console

    from megalemur.observe.doctor import examine, render

    Console().print(render(examine()))


@app.command()
@reported
def generate(
    checkpoint: Annotated[Path, typer.Argument(help="checkpoint or Hugging Face Llama directory", show_default=False)],
    prompt: Annotated[str, typer.Option(help="text to continue")],
    max_tokens: Annotated[int, typer.Option(min=1, help="tokens to add at most")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="sample from the k likeliest tokens; 0: all")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="sample from the likeliest tokens of this mass")] = 1.0,
    seed: Annotated[int, typer.Option(help="of the sampling")] = 0,
) -> None:
    """Continue a prompt with a checkpoint's model, on the GPU where there is one."""
    from megalemur.generate.run import generate_text
    from megalemur.generate.sample import Sampling

    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    typer.echo(generate_text(checkpoint, prompt, max_tokens=max_tokens, sampling=sampling, seed=seed))


@app.command()
@reported
def quickstart(
    directory: Annotated[Path, typer.Option(help="where everything goes")] = Path("out/quickstart"),
) -> None:
    """Raw text to a trained Llama on this machine: eight processes, two layouts, each stage proven."""
    from megalemur.quickstart.walk import walk

    walk(directory)


def main() -> None:
    """Entry point of the console script."""
    # megatron-core says so at each import, on every rank; `megalemur doctor` says it once, with its cost
    warnings.filterwarnings("ignore", message=".*Apex (is|are) not installed", category=UserWarning)
    sys.exit(app())


if __name__ == "__main__":
    main()
