import logging
import traceback

import pytest
import torch

from tests.models.tiny import make_model
from zipage.models.loading.loader import load_model
from zipage.models.loading.locate import WEIGHTS, locate_model


@pytest.mark.parametrize("model", ["a" * 5000, "~nobody-of-this-name/model", "a\0b"])
def test_names_that_no_file_can_have(model):
    with pytest.raises(FileNotFoundError, match=r"does not exist.*: pass a model folder"):
        locate_model(model, WEIGHTS)


@pytest.mark.parametrize("model", ["no-such-folder", "/no/such/folder", "owner/name/file", "owner/name.gguf", ""])
def test_paths_that_do_not_exist(model):
    with pytest.raises(FileNotFoundError, match="does not exist: pass a model folder"):
        locate_model(model, WEIGHTS)


def test_a_file_of_another_kind(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"12345678")
    with pytest.raises(ValueError, match="is not a GGUF file"):
        locate_model(str(path), WEIGHTS)


def test_a_hub_that_does_not_answer_gives_one_line_with_the_id(monkeypatch, caplog):
    def unreachable(*args, **kwargs):
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        raise ConnectionError("Name or service not known\nsecond line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(FileNotFoundError, match=r"owner/name: .*Name or service not known\): check") as caught:
        locate_model("owner/name", WEIGHTS)
    assert "\n" not in str(caught.value)
    assert "".join(traceback.format_exception(caught.value)).count("Traceback") == 1, "the client's own say no more"
    assert not caplog.records
    logging.getLogger("huggingface_hub").warning("shown")
    assert caplog.records, "its messages are silent for as long as it is asked, no longer"


def test_a_hub_id_is_downloaded_and_loaded(tmp_path, monkeypatch):
    make_model("Llama").save_pretrained(tmp_path)
    asked = {}

    def snapshot_download(model, **kwargs):
        asked.update(kwargs, model=model)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert load_model("owner/name", device="cpu").decoder.dtype is torch.float32
    assert asked["model"] == "owner/name"
    assert "*.safetensors" in asked["allow_patterns"]
    load_model("owner/name", device="cpu", load_format="dummy")
    assert asked["allow_patterns"] == ["*.json"]
