"""Every error that fsu_ray raises on purpose. The message is one line and says what to do next.

    FsuError                      exit 1
    ├── UserError                 exit 2   the caller can mend it
    │   ├── NotFound                       no such model, version, request, generator
    │   ├── AlreadyExists                  a name that is taken
    │   ├── AlreadyErased                  the behaviour is gone already
    │   ├── InvalidBehaviour               target classes that cannot be erased
    │   ├── InvalidSamples                 target samples that cannot be read or do not fit the model
    │   ├── GeneratorUnfit                 a generator that cannot serve the request that asks for it
    │   ├── InvalidWeights                 weights that do not fit, are cut short, or are not safetensors
    │   ├── UnsupportedModel               no such architecture, or one that cannot be inverted
    │   ├── InvalidData                    a data set that cannot be read
    │   └── InvalidConfig                  settings or a recipe that do not parse, an unusable folder or ledger
    ├── StorageError              exit 2   artifacts: not writable, disk full, missing, or not what their digest says
    │   └── LedgerUnavailable              the ledger's database is away or locked: what was asked may be tried again
    ├── ClusterUnavailable        exit 2   no Ray head answers, or it refuses the token
    ├── TransitionRefused         exit 1   a guarded update matched nothing: somebody else was faster
    │   └── LeaseLost                      this worker's claim on a request has ended
    ├── Stopped                   exit 1   a run ended at its next step because it was told to
    ├── AuditFailed               exit 3   the ledger, an artifact or a bundle is not what the audit chain says
    └── RunFailed                 exit 1   a Ray run broke

All of them take one message, so they survive pickling between Ray processes unchanged.
"""

from __future__ import annotations


class FsuError(Exception):
    """Root of all errors raised on purpose; `exit_code` is what the command line ends with.

    `agreed`: every process of a run has raised it, so none of them waits for another.
    """

    exit_code = 1
    agreed = False


class UserError(FsuError):
    """The caller can mend this: nothing was written."""

    exit_code = 2


class NotFound(UserError):
    """No such model, version, request or generator."""


class AlreadyExists(UserError):
    """The name is taken."""


class AlreadyErased(UserError):
    """The behaviour is already gone from the current version."""


class InvalidBehaviour(UserError):
    """Target classes out of range, all classes at once, or none."""


class InvalidSamples(UserError):
    """Target samples that cannot be read, or whose size or channels do not fit the model."""


class GeneratorUnfit(UserError):
    """The generator that a request asks for is retired, sealed, or draws something else than the model takes."""


class InvalidWeights(UserError):
    """Weights that do not fit the architecture, are cut short, or are not safetensors."""


class UnsupportedModel(UserError):
    """An unknown architecture, or one without what the inversion needs."""


class InvalidData(UserError):
    """A data set that cannot be read."""


class InvalidConfig(UserError):
    """Settings, a recipe, or a ledger that this version cannot use."""


class StorageError(FsuError):
    """An artifact cannot be written, is missing, or does not match its digest."""

    exit_code = 2


class LedgerUnavailable(StorageError):
    """The ledger's database is away or locked; what was asked may be tried again."""


class ClusterUnavailable(FsuError):
    """No Ray head answers, or it refuses the token."""

    exit_code = 2


class TransitionRefused(FsuError):
    """A guarded update matched nothing: the row was no longer in the state it had to be in."""


class LeaseLost(TransitionRefused):
    """The claim of this worker on its request ended before its work did."""


class Stopped(FsuError):
    """A run was told to stop, and has at its next step."""


class AuditFailed(FsuError):
    """The ledger, an artifact or a bundle is not what the audit chain says."""

    exit_code = 3


class RunFailed(FsuError):
    """A Ray run broke; the message names its cause, the log holds the rest."""
