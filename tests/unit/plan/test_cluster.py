"""Cluster files: every figure has its source, peaks are those that a run's MFU is counted with, mistakes are named."""

from pathlib import Path

import pytest
import yaml

from megalemur.config.load import ConfigError, parse_settings
from megalemur.observe.throughput import known_peak_teraflops
from megalemur.plan.cluster import Cluster, load_cluster

FOLDER = Path(__file__).parents[3] / "launch" / "clusters"
FILES = sorted(FOLDER.glob("*.yaml"))
GIVEN = parse_settings((FOLDER / "h100_sxm.yaml").read_text(), "cluster")


def test_the_clusters_that_are_promised_are_there():
    assert {"h100_sxm", "h200_sxm", "a100_80gb_sxm", "a100_40gb_sxm", "b200_sxm"} <= {file.stem for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_figure_has_a_source_and_the_peak_is_the_one_of_mfu(file):
    cluster = load_cluster(str(file))
    assert cluster.name == file.stem
    figures = {
        key for key, value in parse_settings(file.read_text(), "cluster").items() if not isinstance(value, (str, dict))
    }
    assert set(cluster.sources) == figures and all(len(source) > 3 for source in cluster.sources.values())
    assert known_peak_teraflops(cluster.gpu) == cluster.peak_teraflops_16bit
    assert cluster.memory_bytes > 35e9 and cluster.node_gigabytes_per_second > cluster.network_gigabytes_per_second
    assert (cluster.peak_teraflops_fp8 is None) == (cluster.architecture == "ampere")


def test_a_figure_without_a_source_is_refused(tmp_path):
    bare = {**GIVEN, "sources": {k: v for k, v in GIVEN["sources"].items() if k != "multiprocessors"}}
    (tmp_path / "bare.yaml").write_text(yaml.safe_dump(bare))
    with pytest.raises(ConfigError, match="nothing is said about multiprocessors"):
        load_cluster(str(tmp_path / "bare.yaml"))
    more = {**GIVEN, "sources": {**GIVEN["sources"], "price": "a guess"}}
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(more))
    with pytest.raises(ConfigError, match="price is no figure"):
        load_cluster(str(tmp_path / "more.yaml"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"memory_bytes": -1}, "memory_bytes"),
        ({"gpus_per_node": True}, "gpus_per_node"),
        ({"achievable_fraction": 5}, "achievable_fraction"),
        ({"colour": "green"}, "colour"),
        ({"architecture": "volta"}, "architecture"),
    ],
)
def test_what_is_no_cluster_is_named(tmp_path, change, said):
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({**GIVEN, **change}))
    with pytest.raises(ConfigError, match=said):
        load_cluster(str(tmp_path / "bad.yaml"))


@pytest.mark.parametrize("text", ["- 1\n", "name: [\n", "!!python/object:os.system {}\n", "a: 1\na: 2\n"])
def test_what_is_no_mapping_is_refused(tmp_path, text):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError):
        load_cluster(str(tmp_path / "bad.yaml"))


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"no such cluster; there are .*h100_sxm"):
        load_cluster("h1000")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        load_cluster(str(tmp_path / "none.yaml"))


def test_a_name_is_found_near_the_run_file_before_the_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert isinstance(load_cluster("h100_sxm"), Cluster)  # the checkout's
    own = tmp_path / "mine" / "launch"
    (own / "clusters").mkdir(parents=True)
    (own / "runs").mkdir()
    (own / "clusters" / "ours.yaml").write_text(yaml.safe_dump({**GIVEN, "name": "ours", "gpus_per_node": 4}))
    (own / "clusters" / "h100_sxm.yaml").write_text(yaml.safe_dump({**GIVEN, "gpus_per_node": 4}))
    run = own / "runs" / "run.yaml"
    assert load_cluster("ours", beside=run).gpus_per_node == 4
    assert load_cluster("h100_sxm", beside=run).gpus_per_node == 4
    with pytest.raises(ConfigError):
        load_cluster("ours")
