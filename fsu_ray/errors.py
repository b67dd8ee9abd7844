"""Every error that fsu_ray raises on purpose. The message is one line that says what is wrong and what to do.

    FsuError                      exit 1
    ├── UserError                 exit 2   wrong input: nothing was written
    │   ├── NotFound                       no such model, version, request, generator
    │   ├── AlreadyExists                  a name that is taken
    │   ├── AlreadyErased                  the behaviour is erased already
    │   ├── InvalidBehaviour               target classes that cannot be erased
    │   ├── InvalidSamples                 target samples that cannot be read or do not fit the model
    │   ├── GeneratorUnfit                 a named generator that cannot serve its request
    │   ├── InvalidWeights                 weights that do not fit, are truncated, or are not safetensors
    │   ├── UnsupportedModel               no such architecture, or one that cannot be inverted
    │   ├── InvalidData                    a data set that cannot be read
    │   └── InvalidConfig                  settings or a recipe that do not parse, an unusable folder or ledger
    ├── StorageError              exit 2   artifacts: not writable, disk full, missing, or not what their digest says
    │   └── LedgerUnavailable              the ledger's database does not answer or is locked: try again
    ├── ClusterUnavailable        exit 2   no Ray head answers, or it refuses the token
    ├── TransitionRefused         exit 1   a record is not in the state that the action needs
    │   └── LeaseLost                      this worker's claim on a request has ended
    ├── Stopped                   exit 1   a run ended at its next step because it was told to
    ├── AuditFailed               exit 3   the ledger, an artifact or a bundle is not what the audit chain says
    └── RunFailed                 exit 1   a Ray run broke

Each takes one message, so that pickling between Ray processes does not change it.
"""

from __future__ import annotations


class FsuError(Exception):
    """Root of all errors raised on purpose. `exit_code` is that of the command line.

    `agreed`: every process of a run has raised this error, so no process waits for another.
    """

    exit_code = 1
    agreed = False


class UserError(FsuError):
    """Wrong input, which the caller can correct. Nothing was written."""

    exit_code = 2


class NotFound(UserError):
    """No such model, version, request or generator."""


class AlreadyExists(UserError):
    """The name is taken."""


class AlreadyErased(UserError):
    """The behaviour is already erased from the current version."""


class InvalidBehaviour(UserError):
    """Target classes that are out of range, are all classes of the model, or are none."""


class InvalidSamples(UserError):
    """Target samples that cannot be read, or whose size or channels do not fit the model."""


class GeneratorUnfit(UserError):
    """The generator that a request names is retired or sealed, or its images do not fit the model."""


class InvalidWeights(UserError):
    """Weights that do not fit the architecture, are truncated, or are not safetensors."""


class UnsupportedModel(UserError):
    """An unknown architecture, or one without the BatchNorm layers that the inversion needs."""


class InvalidData(UserError):
    """A data set that cannot be read."""


class InvalidConfig(UserError):
    """Settings, a recipe, or a ledger that this version cannot use."""


class StorageError(FsuError):
    """An artifact cannot be written, is missing, or does not match its digest."""

    exit_code = 2


class LedgerUnavailable(StorageError):
    """The ledger's database does not answer or is locked. The same call may succeed later."""


class ClusterUnavailable(FsuError):
    """No Ray head answers, or it refuses the token."""

    exit_code = 2


class TransitionRefused(FsuError):
    """A record is not, or no longer, in the state that the action needs."""


class LeaseLost(TransitionRefused):
    """This worker's claim on its request ended before its work did."""


class Stopped(FsuError):
    """A run was told to stop, and ended at its next step."""


class AuditFailed(FsuError):
    """The ledger, an artifact or a bundle is not what the audit chain says."""

    exit_code = 3


class RunFailed(FsuError):
    """A Ray run broke. The message names the cause; Ray's log holds the rest."""
