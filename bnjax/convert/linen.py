"""Replace the layers of a flax.linen model.

A linen model makes its layers inside its methods. Each layer is therefore replaced when
it is called. The new layer is bound to the scope of the old layer and reads the
variables there.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
from flax import linen as nn
from flax.core import unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax._validate import layer_name
from bnjax.convert.layers import EXCHANGED_KIND
from bnjax.convert.targets import Conversion, ToGroupNorm

# Set on a layer that replaced another layer, so that its call is not replaced again.
_EXCHANGED = "_exchanged"

# The conversions of the models that are being called, outermost first, each with the
# length of its model's path. The context is part of JAX's cache keys: a program that
# nn.jit compiled for the old model is not used for the new one.
_ACTIVE = jax.make_user_context(())


@contextlib.contextmanager
def _exchanging(depth: int, conversions: tuple[Conversion, ...]) -> Iterator[None]:
    here = depth, conversions
    if here in _ACTIVE.value:
        yield
        return
    with _ACTIVE((*_ACTIVE.value, here)), nn.intercept_methods(_exchange):
        yield


def _exchange(
    call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext
) -> Any:
    layer, own = context.module, context.method_name == "__call__"
    if not own or not isinstance(layer, nn.BatchNorm) or _EXCHANGED in vars(layer):
        return call(*args, **kwargs)
    new: Any = layer
    for depth, conversions in reversed(_ACTIVE.value):
        name = layer_name(layer.path[depth:])
        for conversion in conversions:
            if isinstance(new, nn.BatchNorm) and conversion.fits(name, new):
                new = conversion.to.linen(name, new)
    if new is layer:
        return call(*args, **kwargs)
    new = new.clone(parent=layer.scope, name=layer.name)
    object.__setattr__(layer, "exchanged_for", new)
    object.__setattr__(new, _EXCHANGED, True)
    if getattr(new, "use_running_average", None) is not None:
        args, kwargs = args[:1], {**kwargs, "use_running_average": None}
    return new(*args, **kwargs)


@functools.lru_cache(maxsize=256)
def _exchanged_class(
    kind: type[nn.Module], conversions: tuple[Conversion, ...]
) -> type[nn.Module]:
    """Return a subclass whose methods run with the new layers."""

    def exchanging(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            depth = 0 if self.scope is None else len(self.path)
            with _exchanging(depth, conversions):
                return method(self, *args, **kwargs)

        return call

    methods = {
        name: exchanging(getattr(kind, name))
        for name in dir(kind)
        if name != "setup" and hasattr(getattr(kind, name), "method_handler_wrapped")
    }
    members = {EXCHANGED_KIND: kind, "exchanged_conversions": conversions}
    members |= {"__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), {**members, **methods})


def _with_conversions(
    model: nn.Module, conversions: tuple[Conversion, ...]
) -> nn.Module:
    kind = _exchanged_class(getattr(model, EXCHANGED_KIND, type(model)), conversions)
    fields = {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(kind)
        if field.init and field.name != "parent"
    }
    return kind(**fields, parent=None)


@dataclasses.dataclass(eq=False)
class _Recorder:
    """Records the layers that are called, and does not change them."""

    layers: dict[str, nn.BatchNorm]

    def linen(self, name: str, layer: nn.BatchNorm) -> nn.BatchNorm:
        """Return the layer itself."""
        self.layers[name] = layer
        return layer


def convert_linen(
    model: nn.Module,
    variables: Mapping[str, Any],
    conversion: Conversion,
    compare: Callable[[Any, Any], None] | None,
    inputs: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[nn.Module, Mapping[str, Any]]:
    """Replace layers of a linen model; `compare` gets the old and the new outputs."""
    if model.scope is not None:
        raise ValueError(
            f"convert: the {type(model).__name__} is bound to variables; expected an "
            "unbound module: model.unbind()[0], outside of other modules."
        )

    def evaluated(*conversions: Conversion) -> nn.Module:
        modes = [each._replace(to=each.to.in_evaluation()) for each in conversions]
        return _with_conversions(model, tuple(modes))

    old = getattr(model, "exchanged_conversions", ())
    recorder = _Recorder({})
    try:
        with _exchanging(0, (Conversion(recorder, None),)):
            before: Any = evaluated(*old).apply(variables, *inputs, **kwargs)
    except Exception as error:
        error.add_note(
            "convert: this was the call of the unchanged model, with the given inputs "
            "and keywords; expected the keywords of evaluation, such as train=False."
        )
        raise
    chosen = conversion.choose(recorder.layers)
    for name, layer in chosen.items():
        # Refuse a layer that cannot be replaced now, not in the first call.
        conversion.to.linen(name, layer)
    new = _with_conversions(model, (*old, conversion))
    if isinstance(conversion.to, ToGroupNorm):
        _check_called(variables, recorder.layers, conversion)
        return new, _new_params(new, variables, chosen, conversion.to, inputs, kwargs)
    if compare is not None:
        compare(before, evaluated(*old, conversion).apply(variables, *inputs, **kwargs))
    return new, variables


def _check_called(
    variables: Mapping[str, Any], called: Iterable[str], conversion: Conversion
) -> None:
    """Refuse layers that need new parameters but are not called."""
    stats = flatten_dict(unfreeze(variables.get("batch_stats", {})))
    names = {layer_name(path[:-1]) for path in stats if path[-1] == "mean"}
    uncalled = names.difference(called)
    if not callable(conversion.layers):
        uncalled = {name for name in uncalled if conversion.fits(name, None)}
    if uncalled:
        raise ValueError(
            "convert: this call of the model does not reach the layers "
            f"{', '.join(sorted(uncalled))}, whose new parameters would be missing; "
            "expected a call that reaches all layers, or layers=... without these."
        )


def _new_params(
    new: nn.Module,
    variables: Mapping[str, Any],
    names: Iterable[str],
    to: ToGroupNorm,
    inputs: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> dict[str, Any]:
    """Return the variables with new parameters and no statistics for some layers."""
    rest = dict(variables)
    for collection in "params", "batch_stats":
        flat = flatten_dict(unfreeze(rest.pop(collection, {})))
        flat = {
            path: leaf
            for path, leaf in flat.items()
            if layer_name(path[:-1]) not in names
        }
        if flat:
            rest[collection] = unflatten_dict(flat)
    rngs = kwargs.get("rngs") or {}
    if isinstance(rngs, Mapping):
        rngs = {**rngs, "params": jax.random.key(to.seed)}
    options = {**kwargs, "rngs": rngs, "mutable": ["params"]}
    _, made = new.apply(rest, *inputs, **options)
    return {**rest, **unfreeze(made)}
