"""The trainer's configuration: what guardrail asks of the package that `launch.trainer` names.

Attributes:
    Config: the class that a TOML file is read with.
    outline: what a configuration needs of its machines, for `guardrail doctor --dry-run`.
    remarks: where a configuration differs from published runs, for `guardrail doctor`.
"""

from trainer.config.config import Config as Config
from trainer.config.estimate import outline as outline
from trainer.config.recommendations import remarks as remarks
