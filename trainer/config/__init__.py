"""The trainer's configuration: what guardrail asks of the package that `launch.trainer` names.

Attributes:
    Config: the class that a TOML file is read with.
    outline: what a configuration asks of its machines, for `guardrail doctor --dry-run`.
    remarks: where a configuration leaves published practice, for `guardrail doctor`.
"""

from trainer.config.config import Config as Config
from trainer.config.estimate import outline as outline
from trainer.config.recommendations import remarks as remarks
