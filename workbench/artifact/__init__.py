"""One file for one model: no pickle, every byte accounted for, loadable without the code that made it."""

from workbench.artifact.format import decode, encode, ledger, load, pack, save
from workbench.artifact.ledger import Ledger, LedgerRow
from workbench.artifact.reader import ArtifactError

__all__ = ["ArtifactError", "Ledger", "LedgerRow", "decode", "encode", "ledger", "load", "pack", "save"]
