"""`bitfold inspect`, `formats`, `convert` and `upload`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from cli_runs import Bitfold, keys_are_documented


def test_inspect(bitfold: Bitfold, model: Path, quantized: Path) -> None:
    plain, packed = bitfold("inspect", model, "--json").json, bitfold("inspect", quantized, "--json").json
    keys_are_documented("inspect", packed)
    assert plain["kind"] == "safetensors"
    assert plain["bpw_quantized"] is None
    assert packed["kind"] == "bitfold"
    assert packed["numel"] == plain["numel"]
    on_disk = (quantized / "model.safetensors").stat().st_size
    assert 0 < on_disk - packed["bytes"] < 20_000  # nothing but the header is not a tensor
    assert packed["bytes"] == sum(t["nbytes"] for t in packed["tensors"]) == sum(f["nbytes"] for f in packed["formats"])
    words = bitfold("inspect", quantized).out
    assert re.search(r"^model\.layers\.0\.mlp\.up_proj\.weight +int4-asym-g32 +96x64 +4\.625", words, re.M)
    assert words.index("layers.0.") < words.index("layers.1.")


def test_formats(bitfold: Bitfold) -> None:
    result = bitfold("formats", "--json").json
    keys_are_documented("formats", result)
    assert {"int4-asym-g64", "nf4", "mxfp4", "q4_k"} <= {f["name"] for f in result["formats"]}
    assert re.search(r"^nf4 +4 +4\.25 +17/4 +16 +-1 \.\. 1 +2\d\.\d\d$", bitfold("formats").out, re.M)


def test_convert_dequantizes(bitfold: Bitfold, quantized: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from bitfold.checkpoints import open_source

    result = bitfold("convert", quantized, "-o", tmp_path / "plain", "--dtype", "float32", "--json").json
    keys_are_documented("convert", result)
    weights = load_file(tmp_path / "plain" / "model.safetensors")
    source = open_source(quantized)
    assert set(weights) == set(source.names())
    assert all(torch.equal(weights[name], source.read(name).float()) for name in weights)
    assert bitfold("inspect", tmp_path / "plain", "--json").json["kind"] == "safetensors"
    assert bitfold("convert", quantized, "-o", tmp_path / "again").out.startswith(str(tmp_path / "again"))


def test_convert_to_gguf_and_back(bitfold: Bitfold, quantized: Path, tmp_path: Path) -> None:
    """Types as they are, where GGUF has them; else named, and what is lost is told."""
    file, folder = tmp_path / "m.gguf", tmp_path / "q"
    refused = bitfold("convert", quantized, file, "--to", "gguf")
    assert refused.code == 3
    assert "no type of GGUF" in refused.err
    assert not file.exists()
    made = bitfold("convert", quantized, file, "--to", "gguf:Q4_0", "--json").json
    keys_are_documented("convert", made)
    assert (made["exact"], made["bytes"]) == (False, file.stat().st_size)
    assert bitfold("inspect", file, "--json").json["kind"] == "gguf"
    assert "exact: the same numbers" in bitfold("convert", file, folder, "--to", "bitfold").out
    assert bitfold("convert", folder, "-o", tmp_path / "again.gguf", "--to", "gguf", "--json").json["exact"]
    assert bitfold("convert", file).code == 2
    assert bitfold("convert", file, tmp_path / "x", "--to", "gguf", "--dtype", "float32").code == 2


def test_upload(bitfold: Bitfold, quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def record(folder: Path, repo: str, **options: object) -> str:
        assert (folder, repo) == (quantized, "me/q")
        assert options == {"private": True, "revision": "v1", "commit_message": "first"}
        return "https://hub/me/q"

    monkeypatch.setattr("bitfold.checkpoints.hub.upload.upload", record)
    args = ("upload", quantized, "me/q", "--private", "--revision", "v1", "--message", "first")
    assert bitfold(*args).out == "https://hub/me/q\n"
    result = bitfold(*args, "--json").json
    keys_are_documented("upload", result)
    assert result["url"] == "https://hub/me/q"
