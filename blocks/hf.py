"""The plug-in for transformers: a model without its experts, whose MoE layers call a runner.

`load_skeleton` builds the unmodified model class with experts modules that own no parameters and
loads the dense part alone. Each MoE layer then calls `ExpertRunner.run`, on the thread of the
forward pass: one request is one thread, so a runner keeps a request's context in
`threading.local`. Must not know where experts are or how they are fetched.

Invariants: patches of transformers are gone when `load_skeleton` returns or raises; nothing of the
checkpoint stays memory-mapped, since a mapped weight can be paged out at any time; the keys that
transformers did not use are exactly the experts'.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from hotset.blocks.checkpoint import Catalog
from hotset.blocks.naming import naming_for
from hotset.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hotset.blocks.experts import ExpertsModule

IMPLEMENTATION = "hotset"
"""Name under which the experts function is registered (`experts_implementation`)."""

_LOADING = threading.RLock()  # patches of transformers are process-wide


class ExpertRunner(Protocol):
    """Runs the experts of one MoE layer for the rows of one request."""

    def run(
        self,
        layer: int,
        module: ExpertsModule,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Give the layer's expert output [n, H].

        `hidden` [n, H], `top_k_index` [n, K] int64, `top_k_weights` [n, K]; `layer` is the decoder
        layer, `module` gives the activation. Called on the thread of the forward pass.
        """


class Binding:
    """The runner that the layers of one skeleton call; empty until `bind`."""

    def __init__(self) -> None:
        """Start without a runner."""
        self.runner: ExpertRunner | None = None

    def require(self) -> ExpertRunner:
        """Give the runner. Raises RuntimeError when none is bound."""
        if self.runner is None:
            raise RuntimeError("no runner is bound: call skeleton.bind(runner) before the model")
        return self.runner


@dataclass(slots=True, kw_only=True)
class Skeleton:
    """A transformers model without experts. `dense_bytes` is what it holds in memory."""

    model: Any
    catalog: Catalog
    dense_bytes: int
    layers: tuple[int, ...]
    experts: dict[int, ExpertsModule]
    binding: Binding

    def bind(self, runner: ExpertRunner) -> None:
        """Route all MoE layers to `runner` from now on."""
        self.binding.runner = runner


def run_layer(
    module: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Hand one MoE layer to the bound runner; transformers calls this as the experts' forward."""
    runner: ExpertRunner = module.hotset_binding.require()
    return runner.run(module.hotset_layer, module, hidden_states, top_k_index, top_k_weights)


def load_skeleton(
    path: str | Path,
    *,
    catalog: Catalog | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> Skeleton:
    """Load the dense part of the checkpoint at `path` to `device`, in the checkpoint's own type.

    Raises CheckpointError as `Catalog.open` does, for another `dtype` than the experts', and when
    transformers leaves out more than the experts or misses a tensor.
    """
    from transformers import AutoModelForCausalLM
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    catalog = catalog or Catalog.open(path)
    own = getattr(torch, catalog.dtype)
    if dtype not in {None, own}:
        raise CheckpointError(
            f"{path} holds experts in {catalog.dtype}, not {str(dtype).removeprefix('torch.')}",
            remedy="leave the type out, or save the checkpoint in the type you want",
        )
    with _LOADING:
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, run_layer)
        with _build_errors(str(path)), _hollow_experts(str(path)):
            model, info = AutoModelForCausalLM.from_pretrained(
                str(path),
                dtype=own,
                experts_implementation=IMPLEMENTATION,
                output_loading_info=True,
                local_files_only=True,
            )
    _check_loaded(str(path), info, catalog)
    model = model.eval().requires_grad_(requires_grad=False)
    _own_memory(model, str(path))
    model = model.to(device)
    binding = Binding()
    experts = _bind_layers(model, binding, catalog=catalog)
    return Skeleton(
        model=model,
        catalog=catalog,
        dense_bytes=_held_bytes(model),
        layers=catalog.layers,
        experts=experts,
        binding=binding,
    )


def import_model_code(model_type: str) -> None:
    """Import all that loading and generating will import, so that memory after it is the model's.

    Unknown families are left to transformers, which names what it lacks when it loads them.
    """
    for name in (
        "core_model_loading",
        "conversion_mapping",
        "generation",
        "models.auto.modeling_auto",
        f"models.{model_type}.modeling_{model_type}",
    ):
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(f"transformers.{name}")


def routers(model: Any) -> dict[int, torch.nn.Module]:
    """Map MoE layers to their router modules, which return (logits, weights, indices).

    For forward hooks that observe logits; the chosen experts reach the runner anyway.
    """
    found: dict[int, torch.nn.Module] = {}
    for name, module in model.named_modules():
        if not is_experts(module):
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        for child in parent.children():
            if type(child).__name__.lower().endswith("router"):
                found[layer_of(name)] = child
    return found


def is_experts(module: Any) -> bool:
    """Tell whether a module is transformers' experts module."""
    return hasattr(module, "has_gate") and hasattr(module, "is_transposed")


def layer_of(name: str) -> int:
    """Read the decoder layer from a module's name (`model.layers.3.mlp.experts` -> 3)."""
    parts = name.split(".")
    return int(parts[parts.index("layers") + 1])


def _hollow(original: type) -> type:
    """Derive an experts class that keeps every attribute of the original but no parameter."""

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        with torch.device("meta"):
            original.__init__(self, config, *args, **kwargs)  # type: ignore[misc] # a class of HF
        self._parameters.clear()
        self._is_hf_initialized = True  # else transformers initialises the absent parameters

    return type(original.__name__, (original,), {"__init__": init, "__module__": __name__})


def _experts_classes(path: str) -> dict[str, type]:
    """Find the model's experts classes by building it on the meta device, which holds no memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {type(m).__name__: type(m) for m in model.modules() if is_experts(m)}


@contextlib.contextmanager
def _hollow_experts(path: str) -> Iterator[None]:
    """Patch transformers so that models are built without experts; quiet while it lasts."""
    from transformers.monkey_patching import register_patch_mapping, unregister_patch_mapping

    originals = _experts_classes(path)
    hollows = {name: _hollow(cls) for name, cls in originals.items()}
    # Keys are searched for as patterns: anchors keep a name from matching inside a longer one.
    mapping = {f"^{name}$": hollow for name, hollow in hollows.items()}
    register_patch_mapping(mapping)
    try:
        with _quiet():
            yield
    finally:
        unregister_patch_mapping(list(mapping))
        _restore(originals, hollows)


def _restore(originals: dict[str, type], hollows: dict[str, type]) -> None:
    """Put back classes that transformers leaves patched when a constructor raises."""
    for module in list(sys.modules.values()):
        if not getattr(module, "__name__", "").startswith("transformers."):
            continue
        for name, original in originals.items():
            if vars(module).get(name) is hollows[name]:
                setattr(module, name, original)


@contextlib.contextmanager
def _build_errors(path: str) -> Iterator[None]:
    """Turn what transformers raises for a config that does not fit into a CheckpointError."""
    try:
        yield
    except (KeyError, ValueError, OSError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path}: transformers cannot load the dense part ({type(error).__name__}: {reason})",
            remedy="check that config.json belongs to these safetensors files",
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the load report, which would list every expert's tensor as unexpected."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _check_loaded(path: str, info: dict[str, Any], catalog: Catalog) -> None:
    naming = naming_for(path, {"model_type": catalog.model_type})
    strange = sorted(k for k in info["unexpected_keys"] if naming.place(k) is None)
    missing = sorted(info["missing_keys"])
    wrong = sorted(str(k) for k in info["mismatched_keys"])
    for what, keys in (("unknown", strange), ("missing", missing), ("mis-shaped", wrong)):
        if keys:
            raise CheckpointError(
                f"{path}: {len(keys)} tensors of the dense part are {what}, first {keys[0]}",
                remedy="check that config.json belongs to these safetensors files",
            )


def _own_memory(model: torch.nn.Module, path: str) -> None:
    """Clone what transformers left as views of mapped files, so that nothing can be paged out."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    maps = Path("/proc/self/maps")
    if not maps.exists() or str(Path(path).resolve()) in maps.read_text():
        gc.collect()  # a mapping goes with the last reference to it, and a cycle may hold one


def _bind_layers(model: Any, binding: Binding, *, catalog: Catalog) -> dict[int, ExpertsModule]:
    layers: dict[int, ExpertsModule] = {}
    for name, module in model.named_modules():
        if is_experts(module):
            module.hotset_binding = binding
            module.hotset_layer = layer_of(name)
            layers[module.hotset_layer] = module
    if tuple(sorted(layers)) != catalog.layers:
        raise CheckpointError(
            f"{catalog.path}: the model has MoE layers {sorted(layers)}, its files "
            f"{list(catalog.layers)}",
            remedy="check that config.json belongs to these safetensors files",
        )
    return layers


def _held_bytes(model: torch.nn.Module) -> int:
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in (*model.parameters(), *model.buffers())
    }
    return sum(held.values())
