"""Load what is quantized: a skeleton on the meta device, quantized layers swapped in, tensors given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitfold.checkpoints import Source, open_source
from bitfold.checkpoints.bitfold_folder import quantization_config, stored_tensors
from bitfold.checkpoints.gguf.source import GgufSource
from bitfold.checkpoints.hub.fetch import resolve
from bitfold.checkpoints.safetensors import read_config
from bitfold.checkpoints.schema import Entry, read_entries
from bitfold.checkpoints.untrusted import read_json_object
from bitfold.errors import CheckpointError, ModelError
from bitfold.models import skeleton
from bitfold.models.mapping import Target, map_names
from bitfold.models.opening import open_skeleton, untie_stored
from bitfold.models.sites import Site, find_sites
from bitfold.models.swap import swap, swap_entries
from bitfold.nn import set_tensor
from bitfold.qtensor import QTensor
from bitfold.system import backend


def load(
    path: str | Path,
    *,
    module: nn.Module | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    token: str | None = None,
) -> nn.Module:
    """The model of a quantized folder, a Hub repository, a GGUF file or a folder that another program packed.

    Args:
        path: a folder that `bitfold quantize` or `bitfold.save` wrote, the id of a repository that holds one, or a GGUF
            file, whose blocks stay as they are, mapped from the file; or a folder of another program (GPTQ, AWQ ...),
            whose weights stay packed where one of our formats holds the same numbers.
        module: the skeleton to fill, for models that transformers does not know; its weights are replaced. For
            bitfold's own folders.
        dtype: of the tensors that are not quantized, and so of the activations; default: as stored.
        device: "cpu", "cuda", "mps", "xpu" or "auto", where it runs; `model.to(device)` moves it later, still packed.
        revision, token: of the repository.

    Returns:
        The model in eval mode. Its memory is the packed size: no float copy of a quantized weight is ever made.

    Raises:
        CheckpointError: the folder is not one of ours, or damaged.
        ModelError: tensors are missing, superfluous or misshapen; they are named.
        HubError: the repository cannot be fetched.
        UsageError, ResourceError: the device is not there, or its memory is not enough.
    """
    place = backend.find_device(device)
    found = resolve(str(path), revision=revision, token=token)
    if module is None and (found.is_file() or quantization_config(found) is None):
        source = GgufSource(found, weights_alone=True) if found.is_file() else open_source(found)
        try:
            return placed(load_packed(source, dtype), place)
        finally:
            source.close()
    return placed(load_folder(found, module=module, dtype=dtype), place)


def placed(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on that device; packed weights stay packed on the way.

    Raises:
        ResourceError: the memory of the device is not enough.
    """
    if device.type == "cpu":
        return model
    with backend.within_memory(device):
        return model.to(device)


def load_folder(folder: Path, *, module: nn.Module | None = None, dtype: torch.dtype | None = None) -> nn.Module:
    """`load` for a local folder."""
    config = quantization_config(folder)
    if config is None:
        raise CheckpointError(
            "was not written by bitfold", where=str(folder), hint="`bitfold quantize` makes such folders"
        )
    entries = read_entries(config)
    model = module if module is not None else _skeleton(folder, dtype)
    untie_stored(model, [*entries, *config.get("kept", ())])
    swap_entries(model, entries)
    assign(model, folder, entries, unused=set(config.get("unused", ())), dtype=dtype)
    _finish(model, folder, config)
    return model.eval()


def load_packed(source: Source, dtype: torch.dtype | None = None, module: nn.Module | None = None) -> nn.Module:
    """The model of what another program packed; linear layers and embeddings multiply by the packed weights.

    Args:
        source: a GGUF file, whose blocks are not copied; a folder of packed weights, which are repacked exactly, one
            after the other.
        dtype: of all that is not stored in blocks, and so of the activations; None: what suits the file.
        module: the skeleton to fill, with the names of the checkpoint; default: transformers' model.

    Raises:
        CheckpointError: nothing is packed in it; it is damaged, or of an architecture or a way of packing that is not
            supported.
        ModelError: transformers cannot build it, or tensors are missing.
    """
    if source.packed is None:
        hint = "`bitfold quantize` makes quantized folders"
        raise CheckpointError("was not written by bitfold, and holds nothing packed", where=str(source.path), hint=hint)
    model: Any = _model_of(source, dtype) if module is None else module
    sites = {name: site for site in find_sites(model) for name in (site.tensor, *site.aliases)}
    for target in map_names(source.names(), model):
        if target.used:
            _fill(model, target, source, sites, dtype)
    return _filled(model, source)


def load_plain(source: Source, dtype: torch.dtype | None = None, module: nn.Module | None = None) -> nn.Module:
    """The model, converted tensor by tensor: transformers would keep the whole file mapped beside the converted copy.

    Args:
        source: any checkpoint.
        dtype: of the parameters; None: what the config says, or that of the first float tensor where it says nothing.
        module: the skeleton to fill, with the names of the checkpoint; what is of its dtype stays mapped from the file.
            Default: transformers' model.

    Raises:
        ModelError: transformers cannot build it, or tensors are missing.
    """
    if dtype is None and not (source.config.get("dtype") or source.config.get("torch_dtype")):
        stored = (source.info(name).dtype for name in source.names())
        dtype = next((d for d in stored if d.is_floating_point), None)
    model: Any = _model_of(source, dtype) if module is None else module
    for target in map_names(source.names(), model):
        if target.used:
            for name, w in target.read(source.read, model).items():
                wanted = dtype or model.get_parameter(name).dtype
                own = w.to(wanted, copy=module is None) if w.is_floating_point() else w.clone()
                set_tensor(model, name, own)
    return _filled(model, source)


def _model_of(source: Source, dtype: torch.dtype | None) -> nn.Module:
    model = open_skeleton(source, dtype=dtype)
    if model is None:
        what = f"transformers does not have the class that its config names: {source.config.get('architectures')}"
        raise ModelError(what, where=str(source.path))
    return model


def _filled(model: nn.Module, source: Source) -> nn.Module:
    skeleton.retie(model)
    skeleton.give_generation(model, source.generation_config, str(source.path))
    _require_all(model, str(source.path))
    return model.eval()


def _fill(model: nn.Module, target: Target, source: Source, sites: dict[str, Site], dtype: torch.dtype | None) -> None:
    """Give the model one tensor of the file, packed if the model has a place for that."""
    first = target.names[0]
    assert source.packed is not None
    found = source.packed(target.sources[0]) if target.converter is None else None
    if isinstance(found, QTensor):
        site = sites.get(first)
        if site is not None and site.qshape == found.shape and source.info(target.sources[0]).shape == site.shape:
            swap(model, site, found)
            return
        found = None
    stored = {first: found} if found is not None else target.read(source.read, model)
    for name, w in stored.items():
        set_tensor(model, name, w.to(dtype or model.get_parameter(name).dtype) if w.is_floating_point() else w)


def _require_all(model: nn.Module, where: str) -> None:
    left = [name for name, p in model.named_parameters() if p.is_meta]
    if left:
        raise ModelError(
            f"{len(left)} tensors of {type(model).__name__} are missing, among them {left[0]}", where=where
        )


def _skeleton(folder: Path, dtype: torch.dtype | None) -> nn.Module:
    config = read_config(folder)
    model = skeleton.of_config(config, str(folder), dtype=dtype)
    if model is None:
        raise ModelError(
            f"transformers does not have the class that config.json names: {config.get('architectures')}",
            where=str(folder),
            hint="pass the module yourself: bitfold.load(path, module=MyModel(...))",
        )
    return model


def assign(
    model: nn.Module, folder: Path, entries: dict[str, Entry], *, unused: set[str], dtype: torch.dtype | None
) -> None:
    """Give the model the tensors of the folder, strictly."""
    quantized = tuple(f"{name}." for name in entries)
    state: dict[str, torch.Tensor] = {}
    for name, tensor in stored_tensors(folder):
        if name in unused:
            continue
        if dtype is not None and tensor.is_floating_point() and not name.startswith(quantized):
            tensor = tensor.to(dtype)
        state[name] = tensor
    _fill_aliases(model, state)
    for name, tensor in model.state_dict().items():  # what the family computes by itself
        if name not in state and isinstance(tensor, torch.Tensor) and not tensor.is_meta:
            state |= {name: tensor} if skeleton.may_be_absent(model, name) else {}
    _check_shapes(model, state, folder)
    model.load_state_dict(state, strict=True, assign=True)
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            parameter.requires_grad_(False)
    _require_all(model, str(folder))
    skeleton.retie(model)


def _fill_aliases(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Tied weights are stored once; strict loading wants every name that the model's state dict has."""
    pairs = list(skeleton.tied_names(model).items())
    pairs += [(alias, site.tensor) for site in find_sites(model) for alias in site.aliases]
    first: dict[int, str] = {}
    for named in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        pairs += [(name, first.setdefault(id(tensor), name)) for name, tensor in named]
    expected = set(model.state_dict())
    for pair in pairs:
        for name, other in (pair, pair[::-1]):
            if name in expected and other in state:
                state.setdefault(name, state[other])


def _check_shapes(model: nn.Module, state: dict[str, torch.Tensor], folder: Path) -> None:
    expected = model.state_dict()
    problems = [f"missing {name}" for name in expected if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in expected]
    problems += [
        f"{name} has shape {tuple(state[name].shape)} instead of {tuple(e.shape)}"
        for name, e in expected.items()
        if name in state and isinstance(e, torch.Tensor) and state[name].shape != e.shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ModelError(f"the tensors do not match the model: {'; '.join(problems[:5])}{more}", where=str(folder))


def _finish(model: Any, folder: Path, config: dict[str, Any]) -> None:
    """What transformers' own from_pretrained adds: generation defaults and the quantization config."""
    hf_config = getattr(model, "config", None)
    if hf_config is not None:
        hf_config._name_or_path = str(folder)
    generation = folder / "generation_config.json"
    skeleton.give_generation(model, lambda: read_json_object(generation) if generation.is_file() else {}, str(folder))
    model.bitfold_config = config
