"""transformers' own doors for block-sparse models: `save_pretrained`, `push_to_hub`, Trainer and `AutoModel*.from_pretrained`.

`import kronblocks` imports this file as soon as transformers' models are imported. It registers a method with transformers'
registry of quantisation methods, which reads the entry `quantization_config` of config.json, and wraps four methods. They behave
as before for models without block layers.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from kronblocks.algorithms.training import carried
from kronblocks.core.errors import KronblocksError
from kronblocks.core.limits import FREE, MOST_MISSING
from kronblocks.deploy import entry as entries
from kronblocks.deploy.cards import TAGS, write_card
from kronblocks.deploy.saving import remove_card
from kronblocks.nn.built import BuiltWeight
from kronblocks.surgery.records import RECORDED, layers_of

GUARD = "import kronblocks before from_pretrained: this model is block-sparse (pip install kronblocks)"
"""In config.json, in the place of a name of a file: without kronblocks, transformers refuses the name and prints it."""


_LOADED = "_is_hf_initialized"  # transformers initialises no tensor that has it


@register_quantization_config(entries.METHOD)
class KronblocksConfig(QuantizationConfigMixin):
    """The entry `quantization_config` of config.json."""

    def __init__(self, /, **entry: Any) -> None:
        self.__dict__.update(entries.checked(entry))


@register_quantizer(entries.METHOD)
class KronblocksLoader(HfQuantizer):
    """Puts the block layers of a folder into a new model before transformers loads its weights."""

    def update_attn_implementation(self, config: Any) -> Any:
        """Called before the model is built."""
        _without_guard(vars(config))
        return config

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> Any:
        files = [Path(each) for each in checkpoint_files or ()]
        entry = entries.checked(self.quantization_config.to_dict())
        self._sizes = _stored_bytes(files)
        self._is_same = type(model).__name__ in (model.config.architectures or ())
        self._entry = entry = entries.fitted(entry, model, whole=self._is_same)
        if tied := entries.tied_to_blocks(model.all_tied_weights_keys, entry["layers"]):
            raise KronblocksError(f"config.json ties {tied}, and says that it is block-sparse: save the model again")
        with entries.outlined(entry, model, self._sizes) as layers:
            entries.build_(model, layers)
        known = model._keys_to_ignore_on_load_unexpected
        model._keys_to_ignore_on_load_unexpected = {*(known or ()), rf"(^|\.){carried.KEY}$"}
        marked = model.mark_tied_weights_as_initialized

        def look_first(info: Any) -> None:
            try:
                self._check(model, info)
            except KronblocksError:  # transformers' table of all names, and its own error, would hide the sentence
                info.missing_keys, info.unexpected_keys, info.mismatched_keys = set(), set(), set()
                info.conversion_errors, info.error_msgs = {}, []
                raise
            marked(info)

        model.mark_tied_weights_as_initialized = look_first  # called after the files were read, before memory for the rest
        model.initialize_weights = _leaving_blocks(model.initialize_weights)
        return model

    def _check(self, model: Any, info: Any) -> None:
        """Raise unless the files hold the model's tensors, or the rest is small.

        Raises:
            KronblocksError: with one sentence.
        """
        where = model.config.name_or_path
        if info.mismatched_keys:
            name, found, wanted = min(info.mismatched_keys, key=str)
            raise KronblocksError(f"{where} is damaged: {name} is {tuple(found)} in the files, and {tuple(wanted)} in the model")
        errors = [*(info.conversion_errors or {}).values(), *(info.error_msgs or ())]
        if errors:
            raise KronblocksError(f"{where} is damaged: {str(errors[0]).strip().splitlines()[-1]}")
        missing = {name for name in info.missing_keys if name not in model.all_tied_weights_keys}
        inside = tuple(f"{name}." for name in layers_of(model, RECORDED))
        optional = _optional(model)
        if broken := [n for n in missing if n.startswith(inside) or (self._is_same and not optional(n))]:
            raise KronblocksError(f"{where} is damaged: {min(broken)} is not in its files")
        lost = [name for name in info.unexpected_keys if name.endswith(".block_mask")]
        if lost and self._is_same:
            raise KronblocksError(f"{where} is damaged: {min(lost)} is in its files, but config.json has no such layer")
        state = model.state_dict()
        rest = [state[name] for name in missing if name in state]
        rest += [buffer for _, buffer in model.named_non_persistent_buffers()]
        needed = sum(tensor.numel() * tensor.element_size() for tensor in rest)
        if needed > MOST_MISSING * self._sizes + FREE:
            raise KronblocksError(f"{where} lacks tensors of {needed:,} bytes, more than a model of its size needs")

    def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
        """Make the layers ready. From then on the model is an ordinary one, as `sparsify_` makes it."""
        del model.mark_tied_weights_as_initialized, model.initialize_weights, model._keys_to_ignore_on_load_unexpected
        try:
            entries.finish_(model, self._entry)
        except KronblocksError as error:
            raise KronblocksError(f"{model.config.name_or_path} is damaged: {error}") from error
        if resized := self._entry["resized"]:
            setattr(model, entries.RESIZED, list(resized))
        self.remove_quantization_config(model)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> Any:
        """True: the wrapped `save_pretrained` writes the entry."""
        return True

    @property
    def is_trainable(self) -> Any:
        """True."""
        return True


def _optional(model: Any) -> Callable[[str], bool]:
    """Whether a tensor of this name may be missing: the model computes it, such as positions that are sines."""
    saved = {re.escape(name) for name in model._keys_to_ignore_on_save or ()}
    patterns = [re.compile(each) for each in {*saved, *(model._keys_to_ignore_on_load_missing or ())}]
    return lambda name: any(pattern.search(name) for pattern in patterns)


def _leaving_blocks(initialize: Callable[[], Any]) -> Callable[[], Any]:
    """A model's `initialize_weights` that leaves loaded block layers as they are, like other loaded weights."""

    def initialize_weights() -> Any:
        setattr(BuiltWeight, _LOADED, True)
        try:
            return initialize()
        finally:
            delattr(BuiltWeight, _LOADED)

    return initialize_weights


def _stored_bytes(files: list[Path]) -> int:
    """Bytes of the tensors in files of weights.

    Raises:
        KronblocksError: a file is not of safetensors, and would be unpickled; is in another folder; or is damaged.
    """
    if not files:
        raise KronblocksError("a block-sparse model is loaded from the files of a folder: call from_pretrained(folder)")
    for path in files:
        if path.suffix != ".safetensors":
            raise KronblocksError(f"{path} is no safetensors file, and kronblocks unpickles nothing: save the model again")
        if os.path.abspath(path.parent) != os.path.abspath(files[0].parent):
            raise KronblocksError(f"{path} is outside of the model's folder: save the model again")
        try:
            with safe_open(path, framework="pt") as file:
                file.keys()
        except (OSError, SafetensorError) as error:
            raise KronblocksError(f"cannot read {path}: {error}") from error
    return sum(path.stat().st_size for path in files)


def _is_ours(entry: Any) -> bool:
    return isinstance(entry, dict) and entry.get("quant_method") == entries.METHOD


def _without_guard(config: dict[str, Any]) -> None:
    if config.get("transformers_weights") == GUARD:
        del config["transformers_weights"]


@contextlib.contextmanager
def _described(model: PreTrainedModel) -> Iterator[None]:
    """Let the model's config have the entry for a while."""
    config: Any = model.config
    config.quantization_config = entries.entry_of(model)
    try:
        yield
    finally:
        del config.quantization_config


def _saving(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `PreTrainedModel.save_pretrained`: write the entry, and a card."""

    @functools.wraps(method)
    def save_pretrained(self: PreTrainedModel, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        if not entries.is_sparse(self) or getattr(self, "_hf_peft_config_loaded", False):
            if _is_ours(getattr(self.config, "quantization_config", None)):  # of a dense model that was made from such a config
                delattr(self.config, "quantization_config")
            return method(self, save_directory, *args, **kwargs)
        self.add_model_tags(list(TAGS))
        with _described(self):
            found = method(self, save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", args[0] if args else True):
            remove_card(Path(save_directory))
            write_card(Path(save_directory), self)
        return found

    return save_pretrained


def _uploading(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `PreTrainedModel._upload_modified_files`, which `push_to_hub` calls: send our card instead of an empty one."""

    @functools.wraps(method)
    def upload(self: Any, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, PreTrainedModel) and entries.is_sparse(self):
            write_card(Path(working_dir), self)
        return method(self, working_dir, *args, **kwargs)

    return upload


def _writing(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `PreTrainedConfig.to_json_file`: add the guard, which transformers omits on purpose for other names."""

    @functools.wraps(method)
    def to_json_file(self: Any, json_file_path: Any, *args: Any, **kwargs: Any) -> None:
        method(self, json_file_path, *args, **kwargs)
        if _is_ours(getattr(self, "quantization_config", None)):
            path = Path(json_file_path)
            config = {**json.loads(path.read_text(encoding="utf-8")), "transformers_weights": GUARD}
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    return to_json_file


def _reading(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `PreTrainedConfig.get_config_dict`: check the sizes in a block-sparse model's config before anything is built."""

    @functools.wraps(method)
    def get_config_dict(cls: Any, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        config, rest = method(cls, pretrained_model_name_or_path, **kwargs)
        if isinstance(config, dict) and _is_ours(config.get("quantization_config")):
            entries.check_sizes({key: each for key, each in config.items() if key != "quantization_config"}, "config.json")
            code = config.get("attn_implementation")
            if isinstance(code, str) and re.search(r"[/\\]", code):
                raise KronblocksError(f"config.json names code to download, attn_implementation={code!r}: remove that line")
            _without_guard(config)
        return config, rest

    return get_config_dict


def _install() -> None:
    model: Any = PreTrainedModel
    config: Any = PreTrainedConfig
    model.save_pretrained = _saving(model.save_pretrained)
    model._upload_modified_files = _uploading(model._upload_modified_files)
    config.to_json_file = _writing(config.to_json_file)
    config.get_config_dict = classmethod(_reading(config.__dict__["get_config_dict"].__func__))


_install()
