"""The stages of the quickstart, in order. Everything that a user would type is run as a command and shown."""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megalemur.config.load import load_run
from megalemur.config.run import RunConfig
from megalemur.quickstart.corpus import code_documents, text_documents, write_corpus
from megalemur.quickstart.proof import logits_difference, records, validation_losses

RUN_FILE = Path("launch/runs/quickstart.yaml")
LAUNCHER = Path("launch/local.sh")
_OTHER_LAYOUT = ("parallel.tensor=1", "parallel.pipeline=4", "parallel.chunks=1", "parallel.data=2")
_MOST_BYTES = {"code": 4_000_000, "text": 1_500_000}
_LOGITS_BOUND = 2e-5


class QuickstartFailed(RuntimeError):
    """A stage did not do what it claims."""


@dataclass
class Walk:
    """One quickstart: where it happens and what it has shown."""

    directory: Path
    console: Console = field(default_factory=Console)
    proven: list[tuple[str, str]] = field(default_factory=list)
    """(claim, evidence)."""

    def overrides(self) -> list[str]:
        """The run file's paths, moved to this directory."""
        here = self.directory
        sets = [("sources", 0, "code"), ("sources", 1, "text")]
        sets += [("validation", 0, "code_validation"), ("validation", 1, "text_validation")]
        return [
            *(f"data.{kind}.{number}.path={here / 'data' / name}" for kind, number, name in sets),
            f"data.tokenizer={here / 'tokenizer.model'}",
            f"checkpoint.directory={here / 'checkpoints'}",
            f"checkpoint.start_from={here / 'tiny-llama'}",
            f"log.directory={here / 'log'}",
        ]

    def config(self, *more: str) -> RunConfig:
        """The run of this directory."""
        return load_run(RUN_FILE, [*self.overrides(), *more])

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        """Print a stage's title before and its seconds after."""
        self.console.rule(f"[bold]{title}", align="left")
        started = time.monotonic()
        yield
        self.console.print(f"[green]done[/green] in {time.monotonic() - started:.1f} s\n")

    def command(self, *words: str) -> None:
        """Show and run a command; its output goes to this terminal."""
        self.console.print("$ " + " ".join(words), style="dim", soft_wrap=True, highlight=False)
        code = subprocess.run(words, check=False).returncode
        if code:
            raise QuickstartFailed(f"exit code {code} of: {' '.join(words)}")

    def show(self, claim: str, holds: bool, evidence: str) -> None:
        """Record a proof; a claim that does not hold ends the walk."""
        if not holds:
            raise QuickstartFailed(f"{claim}: {evidence}")
        self.proven.append((claim, evidence))
        self.console.print(f"[green]✓[/green] {claim}: {evidence}", highlight=False)


def walk(directory: Path) -> None:
    """Raw text to a trained model in `directory`; what an earlier walk left there is replaced.

    Raises:
        ValueError: not called from a checkout.
        QuickstartFailed: a stage failed or a claim does not hold.
    """
    if not (RUN_FILE.is_file() and LAUNCHER.is_file()):
        raise ValueError(f"{RUN_FILE} and {LAUNCHER} are not here; run the quickstart from the top of a checkout")
    this = Walk(directory)
    _make_room(this)
    started = time.monotonic()
    stages: Sequence[tuple[str, Callable[[Walk], None]]] = (
        ("Collect real text from this machine", collect),
        ("Train a SentencePiece tokenizer", train_tokenizer),
        ("Build indexed data sets", build_data_sets),
        ("Create a tiny Llama with transformers", create_model),
        ("Train the first half: TP2 x PP2 x DP2, interleaved, 8 processes", train_first_half),
        ("Resume in another layout: TP1 x PP4 x DP2", train_second_half),
        ("Read the result with transformers", compare_logits),
        ("Generate", generate),
    )
    for number, (title, run) in enumerate(stages, 1):
        with this.stage(f"{number}/{len(stages)}  {title}"):
            run(this)
    _finish(this, time.monotonic() - started)


def _make_room(this: Walk) -> None:
    """Delete what an earlier walk made, and nothing else."""
    made = ("corpus", "data", "tokenizer.model", "tokenizer.vocab", "tiny-llama", "checkpoints", "log")
    for name in made:
        path = this.directory / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    this.directory.mkdir(parents=True, exist_ok=True)


def collect(this: Walk) -> None:
    """Write the corpus."""
    for name, documents in (("code", code_documents()), ("text", text_documents())):
        corpus = write_corpus(documents, name, this.directory / "corpus", _MOST_BYTES[name])
        this.console.print(f"{name}: {corpus.documents:,} documents, {corpus.bytes / 1e6:.1f} MB in {corpus.train}")


def train_tokenizer(this: Walk) -> None:
    """BPE with byte fallback on both kinds of text, of the size that the model wants."""
    import orjson
    from sentencepiece import SentencePieceTrainer

    lines = [
        line
        for name in ("code", "text")
        for document in (this.directory / "corpus" / f"{name}.jsonl").read_bytes().splitlines()[:250]
        for line in orjson.loads(document)["text"].splitlines()
        if line.strip()
    ]
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(this.directory / "tokenizer"),
        vocab_size=this.config().model.vocab_size,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,  # as Llama's: else half of all tokens of code are single spaces
        add_dummy_prefix=True,
        input_sentence_size=40_000,
        shuffle_input_sentence=True,
        minloglevel=2,
    )
    this.console.print(f"{this.directory / 'tokenizer.model'}: trained on {len(lines):,} lines")


def build_data_sets(this: Walk) -> None:
    """Index the four files."""
    for name in ("code", "text", "code_validation", "text_validation"):
        this.command(
            _beside_python("megalemur-build-index"),
            *("--input", str(this.directory / "corpus" / f"{name}.jsonl")),
            *("--tokenizer", str(this.directory / "tokenizer.model")),
            *("--output", str(this.directory / "data" / name)),
        )


def create_model(this: Walk) -> None:
    """A random Llama, saved by transformers: what a user would bring along."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = this.config().model
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_query_groups,
        max_position_embeddings=model.max_position_embeddings,
        rms_norm_eps=model.norm_eps,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(this.directory / "tiny-llama")
    this.console.print(f"{model.parameters:,} parameters in {this.directory / 'tiny-llama'}")


def train_first_half(this: Walk) -> None:
    """Eight processes, stopped half-way."""
    config = this.config()
    _launch(this, config.parallel.world_size, f"run.stop_at={config.run.steps // 2}")


def train_second_half(this: Walk) -> None:
    """The same run, resumed by another layout, to its end."""
    config = this.config(*_OTHER_LAYOUT)
    half = config.run.steps // 2
    _launch(this, config.parallel.world_size, *_OTHER_LAYOUT)
    lines = records(config.log.directory / "metrics.jsonl")
    steps = [line["step"] for line in lines]
    this.show(
        "resumed in another layout, no step twice, none left out",
        steps == list(range(1, config.run.steps + 1)),
        f"steps 1 to {half} on TP2 x PP2 x DP2, {half + 1} to {steps[-1]} on TP1 x PP4 x DP2",
    )
    for name, first, last in validation_losses(lines):
        this.show(f"validation loss of {name} is down", last < first - 0.2, f"{first:.3f} to {last:.3f}")


def _launch(this: Walk, processes: int, *overrides: str) -> None:
    this.command("bash", str(LAUNCHER), str(processes), str(RUN_FILE), *this.overrides(), *overrides)


def _last_checkpoint(this: Walk) -> Path:
    config = this.config()
    return config.checkpoint.directory / f"step_{config.run.steps:06d}"


def compare_logits(this: Walk) -> None:
    """The checkpoint is a Hugging Face model, and both programs agree on what it says."""
    sample = (this.directory / "corpus" / "code_validation.jsonl").read_text("utf-8")[:2000]
    difference = logits_difference(_last_checkpoint(this), sample)
    this.show(
        "transformers and megalemur agree on the logits",
        difference < _LOGITS_BOUND,
        f"largest difference {difference:.1e} (bound {_LOGITS_BOUND:.0e}, fp32)",
    )


def generate(this: Walk) -> None:
    """A line of what it has learned."""
    this.command(
        *(_beside_python("megalemur"), "generate", str(_last_checkpoint(this))),
        *("--prompt", "def __init__(self", "--max-tokens", "40", "--temperature", "0.7", "--top-k", "40"),
    )


def _beside_python(name: str) -> str:
    """A console script of this environment."""
    path = Path(sys.executable).with_name(name)
    return str(path) if path.is_file() else name


def _finish(this: Walk, seconds: float) -> None:
    table = Table(title=f"Proven in {seconds:.0f} s", title_justify="left")
    table.add_column("claim")
    table.add_column("evidence")
    for row in this.proven:
        table.add_row(*row)
    this.console.print(table)
    files = Table(title="Files", title_justify="left", show_header=False)
    for what, name in (
        ("indexed data", "data"),
        ("checkpoints, each a Hugging Face model", "checkpoints"),
        ("metrics (JSON lines, TensorBoard)", "log"),
    ):
        files.add_row(what, str(this.directory / name))
    this.console.print(files)
