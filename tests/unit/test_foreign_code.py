"""Nothing that is read, sent or set may run code: what the source says, in every file of the project."""

from pathlib import Path

import pytest

from tests.support.architecture import Source
from tests.support.foreign_code import EXCEPTIONS, all_sources, running_what_it_reads, unused_exceptions

ROOT = Path(__file__).parents[2]
FILE, STRICT = "src/megalemur/data/feed.py", "src/megalemur/config/load.py"


def test_the_source_keeps_the_rule():
    sources = all_sources(ROOT)
    assert len(sources) > 150
    problems = [problem for source in sources for problem in running_what_it_reads(source)]
    assert not problems, "\n".join(problems)


def test_every_exception_is_still_needed():
    assert unused_exceptions(ROOT) == []
    assert sum(path.startswith("src/") for path in EXCEPTIONS) == 1


BAD = [
    "import pickle",
    "import pickle as harmless",
    "from pickle import loads",
    "from _pickle import loads",
    "def f():\n    import dill",
    "import shelve",
    "from marshal import loads",
    "import joblib",
    "import multiprocessing",
    "from multiprocessing.connection import Client",
    "import torch.multiprocessing as mp",
    "from torch import load",
    "from torch import load as read",
    "torch.load(path, weights_only=True)",
    "import torch as t\nt.load(path)",
    "import torch\nread = torch.load",
    "getattr(torch, 'load')(path)",
    "torch.jit.load(path)",
    "torch.hub.load('repo', 'model')",
    "x = eval(text)",
    "run = eval",
    "exec(text)",
    "builtins = list(map(exec, texts))",
    "code = compile(text, 'f', 'exec')",
    "__import__(name)",
    "getattr(builtins, 'eval')(text)",
    "importlib.import_module(name)",
    "from importlib import import_module\nimport_module(name)",
    "subprocess.run(line, shell=True)",
    "subprocess.run(line, shell=flag)",
    "subprocess.getoutput(line)",
    "import subprocess as sp\nsp.getoutput(line)",
    "os.system(line)",
    "from os import system",
    "os.popen(line)",
    "runpy.run_path(path)",
    "np.load(path, allow_pickle=True)",
    "np.load(path, allow_pickle=flag)",
    "pandas.read_pickle(path)",
    "AutoModel.from_pretrained(path, trust_remote_code=True)",
    "dist.all_gather_object(found, value)",
    "dist.broadcast_object_list([value])",
    "from torch.distributed import all_gather_object\nall_gather_object(found, value)",
    "yaml.load(text, yaml.Loader)",
    "yaml.load(text, _StrictLoader)",
    "yaml.safe_load(text)",
    "import yaml as y\ny.full_load(text)",
    "from yaml import safe_load",
    "yaml.unsafe_load(text)",
]


@pytest.mark.parametrize("text", BAD)
def test_what_breaks_the_rule_is_found(text):
    assert list(running_what_it_reads(Source("", FILE, text)))


@pytest.mark.parametrize(
    "text",
    ["yaml.load(text, yaml.SafeLoader)", "yaml.load(text)", "yaml.safe_load(text)", "read = yaml.load"],
)
def test_the_module_that_reads_yaml_may_do_so_with_its_own_loader_only(text):
    assert list(running_what_it_reads(Source("", STRICT, text)))
    assert list(running_what_it_reads(Source("", STRICT, "yaml.load(text, _StrictLoader)"))) == []


@pytest.mark.parametrize(
    "text",
    [
        "chunk.eval()\nre.compile('a')\nsubprocess.run(['ls'], shell=False)",
        "np.load(path, allow_pickle=False)\nnp.load(path)",
        "json.load(file)\nmodel.load(path)\ntorch.loads",
        "importlib.import_module('megatron.core')",
        "dist.all_gather(found, tensor)\ngetattr(config, 'load')",
        "from importlib.metadata import version",
    ],
)
def test_what_keeps_the_rule_is_let_through(text):
    assert list(running_what_it_reads(Source("", FILE, text))) == []
