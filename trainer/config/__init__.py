"""The trainer's configuration. `Config` is the class that guardrail reads a TOML file with."""

from trainer.config.config import Config as Config
