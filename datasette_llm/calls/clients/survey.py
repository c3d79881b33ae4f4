"""What a function reaches: where the code of ``execute()``, and the helpers it calls, make clients.

Code is only read here. Which value a name has is looked at when it is made anew, so that what a test or a
plugin puts in its place meanwhile counts.
"""

from __future__ import annotations

import dis
import importlib
import inspect
import sys
from dataclasses import dataclass, field
from types import CodeType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterator

#: How many calls deep helpers are followed, and how many functions are looked at.
MOST_DEPTH = 5
MOST_FUNCTIONS = 200

#: Where classes come from whose code is nobody's business here.
_NOBODYS = frozenset({"abc", "builtins", "typing"})

Way = Literal["name", "attribute", "method", "super", "cell"]


@dataclass(eq=False)
class Reached:
    """One function: the one asked about, or one that it calls.

    Attributes:
        function: as the plugin defines it.
        names: all names that its code uses, of globals and of attributes.
        makers: the globals among them that are wanted, or modules that hold a wanted one.
        imports: modules that it imports when it runs, which may hold client classes.
        calls: the helpers it calls, and how it finds each of them: by the name of a global, those of a
            module and of an attribute, that of a method, also of one that ``super()`` gives, or by the index
            of a cell of its closure.
        refused: why it cannot be made anew, if it cannot.
    """

    function: FunctionType
    names: tuple[str, ...]
    makers: tuple[str, ...] = ()
    imports: tuple[str, ...] = ()
    calls: list[tuple[Way, Any, Reached]] = field(default_factory=list)
    refused: str | None = None


@dataclass(frozen=True, eq=False)
class Survey:
    """All functions that must be made anew for something to stand for what is wanted.

    Attributes:
        start: the function asked about.
        anew: it and the helpers through which it reaches what is wanted; nothing if it reaches none.
        refused: what could not be made anew, and why.
    """

    start: Reached
    anew: tuple[Reached, ...]
    refused: str | None

    @property
    def names(self) -> tuple[str, ...]:
        """All names that the code of these functions uses."""
        return tuple(dict.fromkeys(name for reached in self.anew for name in reached.names))


def survey_of(
    kind: type, function: FunctionType, wanted: Callable[[Any], bool], but: Container[str] = ()
) -> Survey:
    """Read the code of a method, and of the helpers it calls.

    Args:
        kind: the class that it is a method of.
        function: the method.
        wanted: whether a value is one that something is to stand for.
        but: names of methods that are left as they are.
    """
    reader = _Reader(kind, function, wanted, but)
    start = reader.look_at(function, 0)
    reaches = {reached for reached in reader.seen.values() if reached.makers or reached.imports}
    while True:
        more = {
            reached
            for reached in reader.seen.values()
            if reached not in reaches and any(callee in reaches for _, _, callee in reached.calls)
        }
        if not more:
            break
        reaches |= more
    refused = next(
        (f"{reached.function.__qualname__} {reached.refused}" for reached in reaches if reached.refused), None
    )
    if refused or start not in reaches:
        return Survey(start, (), refused)
    return Survey(start, tuple(reached for reached in reader.seen.values() if reached in reaches), None)


class _Reader:
    """Reads the code of one method and of what it calls.

    Attributes:
        seen: the functions that were looked at.
    """

    def __init__(
        self, kind: type, function: FunctionType, wanted: Callable[[Any], bool], but: Container[str]
    ) -> None:
        self._kind = kind
        self._wanted = wanted
        self._own = {_root(base) for base in kind.__mro__} - _NOBODYS | {_root(function)}
        self._but = but
        self.seen: dict[FunctionType, Reached] = {}

    def look_at(self, function: FunctionType, depth: int) -> Reached:
        names = tuple(dict.fromkeys(_names(function.__code__)))
        reached = self.seen[function] = Reached(function, names)
        namespace = function.__globals__
        reached.makers = tuple(
            name for name in names if name in namespace and self._holds(namespace[name], names)
        )
        writes, modules = _writes_and_imports(function)
        reached.imports = tuple(module for module in modules if self._may_hold(module, names))
        if writes:
            reached.refused = "writes to the names of its module"
        if depth < MOST_DEPTH:
            for way, found_by, callee in self._callees(reached):
                known = self.seen.get(callee)
                if known is None and len(self.seen) < MOST_FUNCTIONS:
                    known = self.look_at(callee, depth + 1)
                if known is not None:
                    reached.calls.append((way, found_by, known))
        return reached

    def _holds(self, value: Any, names: tuple[str, ...]) -> bool:
        """Whether a value is wanted, or a module that holds a wanted one which is asked for."""
        if isinstance(value, ModuleType):
            namespace = vars(value)
            return any(name in namespace and self._wanted(namespace[name]) for name in names)
        return self._wanted(value)

    def _may_hold(self, module: str, names: tuple[str, ...]) -> bool:
        root = module.partition(".")[0]
        if not root or root in sys.stdlib_module_names or root == "llm":
            return False
        loaded = sys.modules.get(module)
        return loaded is None or self._holds(loaded, names) or self._holds(sys.modules.get(root), names)

    def _callees(self, reached: Reached) -> Iterator[tuple[Way, Any, FunctionType]]:
        function = reached.function
        for name in reached.names:
            value = function.__globals__.get(name)
            if isinstance(value, FunctionType) and self._is_followed(value):
                yield "name", name, value
            elif isinstance(value, ModuleType) and value.__name__.partition(".")[0] in self._own:
                for attribute in reached.names:
                    held = getattr(value, attribute, None)
                    if isinstance(held, FunctionType) and self._is_followed(held):
                        yield "attribute", (name, attribute), held
            method = inspect.getattr_static(self._kind, name, None)
            if isinstance(method, (staticmethod, classmethod)):
                method = method.__func__
            if name in self._but or not isinstance(method, FunctionType):
                continue
            if self._is_followed(method):
                yield "method", name, method
        yield from self._inherited(reached)
        for index, value in _cells(function):
            yield "cell", index, value

    def _inherited(self, reached: Reached) -> Iterator[tuple[Way, Any, FunctionType]]:
        """The methods that a function calls on ``super()``."""
        owner = _class_of(reached.function)
        if owner not in self._kind.__mro__ or "super" not in reached.names:
            return
        for name in reached.names:
            method = inherited(self._kind, owner, name)
            if name != "get_client" and method is not None and self._is_followed(method):
                yield "super", name, method

    def _is_followed(self, function: FunctionType) -> bool:
        """Helpers of the own package, and decorated ones, whose wrapper may be anybody's."""
        root = _root(function)
        if root in self._own:
            return root != "llm" or function.__module__.startswith("llm.default_plugins.")
        return any(True for _ in _cells(function))


def inherited(kind: type, owner: type, name: str) -> FunctionType | None:
    """Return what ``super()``, in a method of the class ``owner``, gives an instance of ``kind``.

    Returns:
        ``None`` if that is no plain method.
    """
    after = kind.__mro__[kind.__mro__.index(owner) + 1 :]
    held = next((vars(base)[name] for base in after if name in vars(base)), None)
    return held if isinstance(held, FunctionType) else None


def _class_of(function: FunctionType) -> Any:
    """The class in whose body a function was written, if it asks for that."""
    free = function.__code__.co_freevars
    if "__class__" not in free:
        return None
    cell = (function.__closure__ or ())[free.index("__class__")]
    try:
        return cell.cell_contents
    except ValueError:  # pragma: no cover - the class was never made
        return None


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _writes_and_imports(function: FunctionType) -> tuple[bool, list[str]]:
    writes, modules = False, []
    pending = [function.__code__]
    while pending:
        code = pending.pop()
        pending.extend(constant for constant in code.co_consts if isinstance(constant, CodeType))
        for instruction in dis.get_instructions(code):
            if instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
                writes = True
            elif instruction.opname == "IMPORT_NAME":
                modules.append(str(instruction.argval))
    return writes, modules


def _root(value: Any) -> str:
    return str(getattr(value, "__module__", "")).partition(".")[0]


def _cells(function: FunctionType) -> Iterator[tuple[int, FunctionType]]:
    """The functions that a function has in its closure: a decorator's wrapper has what it wraps there."""
    for index, cell in enumerate(function.__closure__ or ()):
        try:
            value = cell.cell_contents
        except ValueError:
            continue
        if isinstance(value, FunctionType):
            yield index, value


def load_imports(found: Survey) -> None:
    """Import what the functions would import when they run; for a thread."""
    for reached in found.anew:
        for module in reached.imports:
            try:
                importlib.import_module(module)
            except ImportError:
                continue
