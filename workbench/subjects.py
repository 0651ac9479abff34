"""From a word to a model that can be measured: a name, a .wb file, an ONNX file, OpenVINO's IR, or module:function.

    subject = opened("torchvision.models:resnet18", (1, 3, 224, 224))
    profile(subject.model, subject.images)

Torch is imported inside the functions, so that a command line that uses them answers `--help` at once.
"""

from __future__ import annotations

import difflib
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

    from workbench.data import Data
    from workbench.runtimes import ModelFile


@dataclass(frozen=True)
class Subject:
    """A model, how it is called, and one batch that it takes: random numbers, or images of `data` where it has some."""

    name: str
    model: nn.Module | ModelFile
    example: Tensor
    data: Data | None = None

    @property
    def images(self) -> Data | Tensor:
        """What `profile` takes beside the model: the data where there is some, so that accuracy is counted too."""
        return self.example if self.data is None else self.data


def opened(word: str, shape: tuple[int, ...] | None = None, data: str | None = None, batch: int = 1) -> Subject:
    """Return the model that `word` means, with one batch for it.

    `shape`: of that batch, needed where nothing else tells what the model takes. `data`: the name of a data set, whose
    images are then used. Raises ValueError, RuntimeFailed or ArtifactError, each with what is wrong and what to do.
    """
    from workbench.data import load_data
    from workbench.runtimes import is_model_file, read_model_file

    if is_model_file(word):
        file = read_model_file(word)
        if data is None:
            return Subject(file.path.name, file, file.example(shape, batch))
        images = load_data(data)
        example = images.example(file.fixed_batch or batch)
        file.example(tuple(example.shape))  # refuses images that do not fit in
        return Subject(file.path.name, file, example, images)
    model, name = built(word)
    if shape is not None and data is None:
        return Subject(name, model, example_for(model, shape))
    if data is None and not architecture_of(model):
        raise ValueError("Nothing says what this model takes; give the shape of one batch, as in --input 1,3,224,224.")
    images = data_for(model, data)
    return Subject(name, model, images.example(batch), images)


def built(word: str) -> tuple[nn.Module, str]:
    """Return (model, name) for a model's name, a .wb file, or module:function; raises ValueError otherwise."""
    module, colon, function = word.partition(":")
    if not colon or Path(word).is_file():
        return model_named(word)
    sys.path.insert(0, str(Path.cwd()))  # where one's own modules lie, as `python -m` has it
    try:
        make = getattr(import_module(module), function)
    except ImportError as error:
        raise ValueError(f"The module {module!r} of {word!r} cannot be imported ({error}).") from error
    except AttributeError:
        raise ValueError(f"The module {module!r} has no {function!r}; name a function that builds a model.") from None
    except Exception as error:  # the module's own lines may raise anything
        raise ValueError(f"The module {module!r} fails while it is imported: {_said(error)}.") from error
    finally:
        sys.path.pop(0)
    return _called(make, word), function


def _called(make, word: str) -> nn.Module:
    """Return the model that `make()` gives; a model itself will do too."""
    from torch import nn

    try:
        model = make if isinstance(make, nn.Module) else make()
    except Exception as error:
        raise ValueError(f"{word}() fails: {_said(error)}; it is called without arguments.") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{word} gives a {type(model).__name__}, not a torch.nn.Module.")
    return model.eval()


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300] or 'no reason was given'}"


def model_named(word: str) -> tuple[nn.Module, str]:
    """Return (model, name): a shipped model, or one read from a .wb file; raise ValueError for anything else."""
    from workbench.models import MODELS, load_model

    if word in MODELS:
        return load_model(word), word
    if Path(word).suffix == ".wb" or Path(word).is_file():
        from workbench.artifact import load

        return load(word), word
    names = ", ".join(MODELS)
    raise ValueError(f"There is no model {word!r}; {near(word, MODELS)}choose from {names}, or give a .wb file.")


def architecture_of(model: nn.Module) -> str:
    """Return the name of the shipped model that this one was made from, or an empty string."""
    return (getattr(model, "architecture", None) or {}).get("name", "")


def data_for(model: nn.Module, named: str | None) -> Data:
    """Return the data named, else those that the model was trained on; raise ValueError where neither is known."""
    from workbench.data import load_data
    from workbench.models import MODELS

    name = architecture_of(model)
    if named is None and name not in MODELS:
        raise ValueError("Nothing says which images this model is for; name them with --data (see wb.DATA_SETS).")
    return load_data(named or MODELS[name].data)


def example_for(model: nn.Module, shape: tuple[int, ...] | None) -> Tensor:
    """Return one batch: random numbers of the shape given, else images that the model was trained on."""
    import torch

    from workbench.runtimes.files import random_batch

    if shape is not None:
        first = next((p for p in model.parameters() if p.is_floating_point()), None)
        return random_batch(shape, torch.float32 if first is None else first.dtype)
    if not architecture_of(model):
        raise ValueError("Nothing says what this model takes; give the shape of one batch, as in --input 1,3,224,224.")
    return data_for(model, None).example(2)


def near(word: str, known) -> str:
    """Return "did you mean …? " for a misspelled word, or nothing where none is near."""
    found = difflib.get_close_matches(word.lower(), list(known), 1, 0.5)
    return f"did you mean {found[0]!r}? " if found else ""
