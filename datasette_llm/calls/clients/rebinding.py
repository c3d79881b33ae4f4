"""Functions made anew from the same code, with other values for some names.

A function that is made anew has the code, defaults, keyword defaults, closure and attributes of the one it
stands for; its globals are a copy of its module's, in which some names have other values. The function that
it was made from, its module and its class stay as they are.
"""

from __future__ import annotations

import builtins
import sys
from types import CellType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

from .survey import inherited

if TYPE_CHECKING:
    from collections.abc import Callable

    from .survey import Reached, Survey


def rebind(found: Survey, held_by: Any, stand_in: Callable[[Any], Any]) -> Callable[..., Any]:
    """Make a method anew, and the helpers through which it reaches what something is to stand for.

    Args:
        found: what must be made anew.
        held_by: the object that it is a method of; gets the other methods among them as instance attributes.
        stand_in: gives what is to stand for a value, for any that need not be replaced the value itself.

    Returns:
        the method, bound to the object.
    """
    spaces: dict[int, dict[str, Any]] = {}
    anew: dict[Reached, FunctionType] = {}
    cells: list[tuple[CellType, Reached]] = []
    for reached in found.anew:
        space = _space_of(reached.function, spaces)
        if reached.imports:
            # Read when the function is made.
            space["__builtins__"] = _importing(space["__builtins__"], stand_in)
        anew[reached] = _made_anew(reached, space, found, cells)
    for cell, callee in cells:
        cell.cell_contents = anew[callee]
    for reached in found.anew:
        namespace, space = reached.function.__globals__, spaces[id(reached.function.__globals__)]
        for name in reached.makers:
            if name in namespace:
                space[name] = replaced(namespace[name], stand_in)
        for way, name, callee in reached.calls:
            if callee not in anew:
                continue
            if way == "name":
                space[name] = anew[callee]
            elif way == "attribute":
                module, attribute = name
                stand_in_of = space[module]
                if not isinstance(stand_in_of, ModuleStandIn):
                    stand_in_of = space[module] = ModuleStandIn(stand_in_of, stand_in)
                vars(stand_in_of)[attribute] = anew[callee]
            elif way == "method":
                _give_method(held_by, name, anew[callee])
            elif way == "super":
                space["super"] = SuperStandIn({old.function: new for old, new in anew.items()})
    return MethodType(anew[found.start], held_by)


def _space_of(function: FunctionType, spaces: dict[int, dict[str, Any]]) -> dict[str, Any]:
    namespace = function.__globals__
    space = spaces.get(id(namespace))
    if space is None:
        space = spaces[id(namespace)] = dict(namespace)
        space.setdefault("__builtins__", builtins)
    return space


def _made_anew(
    reached: Reached, space: dict[str, Any], found: Survey, cells: list[tuple[CellType, Reached]]
) -> FunctionType:
    function = reached.function
    closure = list(function.__closure__ or ())
    for way, index, callee in reached.calls:
        if way == "cell" and callee in found.anew:
            closure[index] = CellType()
            cells.append((closure[index], callee))
    made = FunctionType(
        function.__code__,
        space,
        function.__name__,
        function.__defaults__,
        tuple(closure) if closure else None,
    )
    made.__kwdefaults__ = function.__kwdefaults__
    made.__qualname__ = function.__qualname__
    made.__module__ = function.__module__
    made.__doc__ = function.__doc__
    made.__dict__.update(function.__dict__)
    return made


def _give_method(held_by: Any, name: str, function: FunctionType) -> None:
    kind = next(base for base in type(held_by).__mro__ if name in vars(base))
    held = vars(kind)[name]
    if isinstance(held, staticmethod):
        method: Any = function
    else:
        method = MethodType(function, type(held_by) if isinstance(held, classmethod) else held_by)
    vars(held_by)[name] = method


class SuperStandIn:
    """What stands for ``super`` in the copy of a module: it finds the methods that were made anew."""

    def __init__(self, anew: dict[FunctionType, FunctionType]) -> None:
        self._anew = anew

    def __call__(self, *args: Any) -> Any:
        if not args:
            # As super() itself does it: from the class and the first argument of whoever calls.
            frame = sys._getframe(1)
            held = frame.f_locals
            args = held["__class__"], held[frame.f_code.co_varnames[0]]
        owner, held_by = args
        return _Inherited(super(owner, held_by), owner, held_by, self._anew)


class _Inherited:
    """An object as a method's ``super()`` gives it."""

    def __init__(self, real: Any, owner: type, held_by: Any, anew: dict[FunctionType, FunctionType]) -> None:
        self.__dict__.update(_real=real, _owner=owner, _held_by=held_by, _anew=anew)

    def __getattr__(self, name: str) -> Any:
        held_by = self._held_by
        if not isinstance(held_by, type):
            found = inherited(type(held_by), self._owner, name)
            if found in self._anew:
                return MethodType(self._anew[found], held_by)
        return getattr(self._real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._real, name, value)


def replaced(value: Any, stand_in: Callable[[Any], Any]) -> Any:
    """Return what stands for a client class, or for a module that holds client classes."""
    return ModuleStandIn(value, stand_in) if isinstance(value, ModuleType) else stand_in(value)


class ModuleStandIn:
    """A module as code sees it whose clients are leased: the module's attributes, client classes excepted."""

    def __init__(self, module: ModuleType, stand_in: Callable[[Any], Any]) -> None:
        self.__dict__.update(_module=module, _stand_in=stand_in)

    def __getattr__(self, name: str) -> Any:
        return replaced(getattr(self._module, name), self._stand_in)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._module, name, value)

    def __dir__(self) -> list[str]:
        return dir(self._module)

    def __repr__(self) -> str:
        return repr(self._module)


def _importing(known: Any, stand_in: Callable[[Any], Any]) -> dict[str, Any]:
    """Return builtins whose ``import`` statement gives modules whose clients are leased."""
    space = dict(known) if isinstance(known, dict) else dict(vars(known))
    real = space["__import__"]
    if isinstance(real, _Import):
        return space
    space["__import__"] = _Import(real, stand_in)
    return space


class _Import:
    def __init__(self, real: Callable[..., Any], stand_in: Callable[[Any], Any]) -> None:
        self._real = real
        self._stand_in = stand_in

    def __call__(self, name: str, *args: Any, **kwargs: Any) -> Any:
        module = self._real(name, *args, **kwargs)
        if not isinstance(module, ModuleType) or name.partition(".")[0] in sys.stdlib_module_names:
            return module
        return replaced(module, self._stand_in)
