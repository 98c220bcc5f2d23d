"""Calibration files: what is read of them, and what is refused."""

import pytest
import torch
from safetensors.torch import save_file

from zipage.eviction import registry
from zipage.eviction.calibration import file_digest, read_calibration, write_calibration

IDENTITY = {
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "inv_freq": [1.0, 0.1, 0.01, 0.001],
    "rope_attention_factor": 1.0,
    "qk_norm": True,
    "weights": "a" * 64,
}
SOURCE = {"corpus": "made up", "corpus_sha256": "b" * 64, "tokens": 100, "seed": 0}


def written(path, kind="q_filters", shape=(2, 2, 8), **changed) -> str:
    write_calibration(path, kind, {"filters": torch.randn(shape)}, IDENTITY | changed, SOURCE)
    return str(path)


def read(path, identity=IDENTITY, names=("filters",)):
    return read_calibration(str(path), "q_filters", names, identity)


def test_what_was_written_is_read(tmp_path):
    array = torch.randn(2, 2, 8, dtype=torch.float64)
    write_calibration(tmp_path / "new" / "file", "q_filters", {"filters": array}, IDENTITY, SOURCE)
    assert torch.equal(read(tmp_path / "new" / "file")["filters"], array.float())
    rounded = IDENTITY | {"inv_freq": [frequency * (1 + 1e-8) for frequency in IDENTITY["inv_freq"]]}
    assert read(tmp_path / "new" / "file", rounded)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_layers": 3}, "num_layers is 3, not 2"),
        ({"num_kv_heads": 4}, "num_kv_heads is 4, not 2"),
        ({"inv_freq": [1.0, 0.1, 0.01, 0.002]}, "inv_freq is of 4 numbers from 1 to 0.002, not of 4 numbers from 1"),
        ({"rope_attention_factor": 1.139}, "rope_attention_factor is 1.139, not 1.0"),
        ({"qk_norm": False}, "qk_norm is False, not True"),
        ({"weights": "c" * 64}, "weights is cccccccccccccccc, not aaaaaaaaaaaaaaaa"),
        ({"version": 2}, "version is 2, not 1"),
        ({"num_heads": 8, "head_dim": 4}, "num_heads is 8, not 4; head_dim is 4, not 8"),
    ],
)
def test_a_file_of_another_model_is_refused_by_what_differs(tmp_path, changed, message):
    path = written(tmp_path / "file", **changed)
    with pytest.raises(ValueError, match=r"q_filters\.calibration='.*file': made for another model") as refused:
        read(path)
    assert message in str(refused.value)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such file; make it: python"):
        read(tmp_path / "none")
    (tmp_path / "text").write_text("text")
    with pytest.raises(ValueError, match="no calibration file can be read there"):
        read(tmp_path / "text")
    save_file({"filters": torch.zeros(2, 2, 8)}, tmp_path / "weights")
    with pytest.raises(ValueError, match="kind is absent, not q_filters"):
        read(tmp_path / "weights")
    with pytest.raises(ValueError, match="kind is triattention, not q_filters"):
        read(written(tmp_path / "kind", "triattention"))
    with pytest.raises(ValueError, match="it has no mean, but filters"):
        read(written(tmp_path / "fine"), names=("mean",))
    with pytest.raises(ValueError, match=r"filters \[2, 3, 8\] is not of 2 layers"):
        read(written(tmp_path / "rows", shape=(2, 3, 8)))


def test_a_policy_that_needs_a_file_says_so_and_goes_by_its_content(tmp_path):
    with pytest.raises(ValueError, match=r"q_filters\.calibration: give the calibration file of the model"):
        registry.make("q_filters")
    labels = {}
    for name in ("one", "two"):
        path = written(tmp_path / name)
        labels[name] = registry.make("q_filters", {"calibration": path}).label
        assert labels[name] == f"Q-Filters (calibration={file_digest(path)[:8]})"
    assert labels["one"] != labels["two"]
