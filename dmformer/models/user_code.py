"""The user's code that makes a network: imported from a file or package, and called.

Whatever it raises becomes one line, whatever it prints is no output of a command, and what it changes for all of Python
does not last.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._triton import has_triton_package

from dmformer.errors import UsageError, first_line
from dmformer.process import printing_to_stderr

if TYPE_CHECKING:
    from collections.abc import Iterator


def import_named(reference: str, title: str) -> tuple[Any, Path | None]:
    """Import what a reference names, and return it with the file that it is in.

    Args:
        reference: ``FILE.py:NAME`` or ``package.module:NAME``.
        title: what messages call it.

    Raises:
        UsageError: it is no such reference, there is nothing of that name, or the code raised something.
    """
    where, _, name = reference.rpartition(":")
    if not where or not name:
        raise UsageError(f"{title}; expected FILE.py:NAME or package.module:NAME")
    if where.endswith(".py") and not Path(where).is_file():
        raise UsageError(f"{title}: there is no file {where!r}; expected a Python file and a name in it, FILE.py:NAME")
    expected = "a file that Python can import, with what it needs installed"
    if (Path(where).parent / "__init__.py").is_file():
        expected += "; as it is part of a package, package.module:NAME in the folder above that may do"
    with running_user_code(title, "while it was imported", expected):
        imported = _import_file(Path(where)) if where.endswith(".py") else _import_module(where)
    found: Any = imported
    for part in name.split("."):
        if not hasattr(found, part):
            raise UsageError(f"{title}: there is no {name!r} in it; it has {_candidates(imported)}")
        found = getattr(found, part)
    file = getattr(imported, "__file__", None)
    return found, Path(file) if file else None


def _import_file(path: Path) -> Any:
    """Import a file under its own name, anew each time; files beside it can be imported by it."""
    path = path.resolve()
    name = path.stem.replace(".", "_")
    if _is_taken(name, path):
        name = f"{name}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with _first_on_path(path.parent):
        spec.loader.exec_module(module)
    return module


def _is_taken(name: str, path: Path) -> bool:
    """Whether a module that is no such file has a name, or would get it: a file may be called ``onnx.py``."""
    module = sys.modules.get(name)
    spec = None if module is not None else importlib.util.find_spec(name)
    file = getattr(module, "__file__", None) if spec is None else spec.origin
    if module is None and spec is None:
        return False
    return not file or Path(file).resolve() != path


def _import_module(name: str) -> Any:
    with _first_on_path(Path.cwd()):
        return importlib.import_module(name)


@contextlib.contextmanager
def _first_on_path(folder: Path) -> Iterator[None]:
    """Look for modules in a folder first, and after the block last: what we import later may have the same name."""
    has_triton_package()  # PyTorch keeps what it finds, and would take a file or folder of that name for the package
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # a module may have changed it
            sys.path.remove(str(folder))
        if str(folder) not in sys.path:
            sys.path.append(str(folder))


def _candidates(imported: Any) -> str:
    """Name what a module defines that may make a network."""
    names = [
        name
        for name, value in vars(imported).items()
        if not name.startswith("_") and (isinstance(value, nn.Module) or inspect.isroutine(value) or _is_network(value))
        if getattr(value, "__module__", None) in (None, imported.__name__) or isinstance(value, nn.Module)
    ]
    return ", ".join(names) or "no function, class or network"


def _is_network(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)


@contextlib.contextmanager
def running_user_code(title: str, when: str, expected: str) -> Iterator[None]:
    """Run the user's code in the block: what it raises becomes one line, what it prints goes to standard error.

    Args:
        title: what messages call the code.
        when: what it was doing, for the message.
        expected: what it should have been, for the message.

    Raises:
        UsageError: it raised something.
    """
    number = torch.get_default_dtype()
    try:
        with printing_to_stderr():
            yield
    except UsageError:
        raise
    except (Exception, SystemExit) as error:  # a script without a main guard may exit
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UsageError(f"{title} raised {when}: {reason}; expected {expected}") from error
    finally:
        torch.set_default_dtype(number)  # a script may ask for another type of numbers, and for all that comes after it


def make_network(found: Any, options: dict[str, Any], title: str, seed: int) -> nn.Module:
    """Return the network that a function or class makes, its random weights from a seed; or the network itself.

    Args:
        found: a function, a class or a network.
        options: arguments of the function or class.
        title: what messages call it.
        seed: of the random weights.

    Raises:
        UsageError: it takes other arguments, raised something, or made no network.
    """
    if isinstance(found, nn.Module):
        if options:
            raise UsageError(f"`module_options` for {title}, which is made already; expected none")
        return unwrapped(found)
    if not callable(found):
        raise UsageError(f"{title} is of type {type(found).__name__}; expected a function, a class or an nn.Module")
    try:
        inspect.signature(found).bind(**options)
    except TypeError as error:
        given = ", ".join(options) or "no arguments"
        more = ", or a function that calls it" if "missing" in str(error) else ""
        raise UsageError(f"{title} with {given}: {error}; expected `module_options` that it takes{more}") from error
    except ValueError:  # of what is written in C, Python knows no signature: calling it tells
        pass
    expected = "a network on the CPU: look at `module_options`"
    with running_user_code(title, "while it made the network", expected), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = found(**options)
    if not isinstance(network, nn.Module):
        raise UsageError(f"{title} gave {type(network).__name__}; expected an nn.Module")
    return unwrapped(network)


def unwrapped(network: nn.Module) -> nn.Module:
    """Return the network that was compiled, spread over GPUs or averaged, out of what PyTorch put around it."""
    around = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)
    inner = getattr(network, "_orig_mod", network.module if isinstance(network, around) else None)
    return unwrapped(inner) if isinstance(inner, nn.Module) else network
