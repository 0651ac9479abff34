"""One file for one model: no pickle, every byte accounted for, loadable without the code that made it."""

from workbench.artifact.accounts import Ledger, LedgerRow
from workbench.artifact.format import ArtifactError
from workbench.artifact.reading import decode, load
from workbench.artifact.writing import encode, ledger, pack, save

__all__ = ["ArtifactError", "Ledger", "LedgerRow", "decode", "encode", "ledger", "load", "pack", "save"]
