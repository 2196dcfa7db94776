"""The lines that training programs print: one pattern per format."""

from __future__ import annotations

import re

from guardrail.core.records.signals import GRAD_NORM, LOSS, LOSS_SCALE

NUMBER = r"[-+]?(?:nan|inf(?:inity)?|1\.#\w+|\d[\d,]*\.?\d*(?:e[-+]?\d+)?|\.\d+)"
_NO_NUMBER = r"none|null|n/a|\*+"  # where a number should be
_STEP = r"(?P<step>\d[\d,]*)"


def _compile_pattern(pattern: str) -> re.Pattern[str]:
    """Compile a pattern in which `{step}`, `{loss}`, `{grad_norm}`, `{loss_scale}` are named
    numbers, and `{n}` is any number.
    """
    named = {name: f"(?P<{name}>{NUMBER}|{_NO_NUMBER})" for name in (LOSS, GRAD_NORM, LOSS_SCALE)}
    return re.compile(pattern.format(step=_STEP, n=NUMBER, **named), re.IGNORECASE)


# Name of the format -> the line of one step. Optional parts come after what makes the line one of
# this format.
FORMATS = {
    # s:12 trl:10.2301 lr:0.000012 norm:3.11
    "llm.c": _compile_pattern(r"^s:{step} trl:{loss}(?:.*? norm:{grad_norm})?"),
    # step   12/19560 | loss 10.230143 (-0.21z)| norm 3.1122 (+0.33z)| lr 1.03e-05 | 3060.00 ms | ...
    "llm.c output": _compile_pattern(
        r"^step\s+{step}/\d+\s*\|\s*(?:train )?loss {loss}(?: \([^)]*\))?\s*(?:\|\s*norm {grad_norm})?"
    ),
    # iter 12: loss 10.2301, time 250.11ms, mfu 20.01%
    "nanoGPT": _compile_pattern(r"\biter {step}: (?:train )?loss {loss}"),
    # 12 train 10.230143
    "build-nanogpt": _compile_pattern(r"^{step} train {loss}\s*$"),
    # step    12 | loss: 10.230143 | lr 1.0e-05 | norm: 3.1122 | dt: ...
    # step 00012/21400 (0.06%) | loss: 10.230143 | lrm: 1.00 | ...
    "nanochat": _compile_pattern(
        r"\bstep\s+{step}(?:/\d+)?(?: \([^)]*\))?\s*\|\s*(?:train )?loss:\s*{loss}"
        r"(?:.*?\|\s*(?:grad )?norm:\s*{grad_norm})?"
    ),
    # step:12/5100 train_loss:10.2301 train_time:2100ms step_avg:250.11ms
    "modded-nanogpt": _compile_pattern(
        r"\bstep:{step}(?:/\d+)? train_loss:{loss}(?:.*?\bgrad_norm:{grad_norm})?"
    ),
    # iteration    12/  159576 | consumed samples: ... | lm loss: 1.02E+01 | loss scale: 4096.0 | grad norm: 3.112 | ...
    "Megatron": _compile_pattern(
        r"\biteration\s+{step}/\s*\d+\s*\|.*?\|\s*"
        r"(?:(?:lm[ _]loss|loss|reduced_train_loss|train loss|loss scale|grad norm): {n}|number of skipped iterations:)"
    ),
    # [rank0]:[titan] 2025-06-04 08:51:48,074 - root - INFO - step: 12  loss: 10.2301  grad_norm: 3.1122  memory: ...
    "torchtitan": _compile_pattern(
        r"\bstep:\s*{step}(?:/\d+ = [\d.]+%)?\s+loss:\s*{loss}(?:.*?\bgrad_norm:\s*{grad_norm})?"
    ),
    # {'loss': 10.2301, 'grad_norm': 3.1122, 'learning_rate': 1.0e-05, 'epoch': 0.01}
    # The Trainer prints no step.
    "Trainer output": _compile_pattern(r"\{{'loss': (?:'|tensor\()?{n}"),
    # (TaskRunner pid=7) step:12 - actor/pg_loss:-0.0129 - actor/grad_norm:0.317 -
    # critic/rewards/mean:0.010 - ...
    "verl": _compile_pattern(r"\bstep:\s?{step} - (?:.* - )?[\w/]*(?:loss|grad_norm)[\w/]*:\s?{n}"),
    # Train epoch [1/1]: 100%|####| 4/4 [00:10<00:00, 10.1s/it, act_loss=-0.0012, kl=0.0010, rm=0.010, actor_gn=0.31]
    "progress bar": _compile_pattern(r"\b{step}/\d+ \[\d[^\]]*?, \w*loss={n}"),
    # any line with a step and then a loss
    "text": _compile_pattern(
        r"\b(?:global[ _]step|step|iteration|iter)\b\s*[:=#]?\s*\[?{step}\b(?:.*?[^\w/-])??"
        r"(?<!val )(?<!valid )(?<!validation )(?<!eval )(?<!test )(?<!aux )(?:train(?:ing)?[ _/])?loss\s*[:=]?\s*{loss}"
        r"(?:.*?\b(?:grad(?:ient)?[ _]?norm|gnorm|norm)\s*[:=]?\s*{grad_norm})?"
    ),
}

# The line of a step without its loss, of formats that print the loss in the middle of the line.
WITHOUT_LOSS = {
    "llm.c": _compile_pattern(r"^s:{step} .*?norm:{grad_norm}"),
    "llm.c output": _compile_pattern(r"^step\s+{step}/\d+\s*\|.*?norm {grad_norm}"),
    "nanochat": _compile_pattern(
        r"\bstep\s+{step}(?:/\d+)?(?: \([^)]*\))?\s*\|.*?\bnorm:\s*{grad_norm}"
    ),
    "modded-nanogpt": _compile_pattern(r"\bstep:{step}(?:/\d+)? .*?\bgrad_norm:{grad_norm}"),
    "torchtitan": _compile_pattern(r"\bstep:\s*{step}\b.*?\bgrad_norm:\s*{grad_norm}"),
    "text": _compile_pattern(
        r"\b(?:global[ _]step|step|iteration|iter)\b\s*[:=#]?\s*\[?{step}\b.*?"
        r"\b(?:grad(?:ient)?[ _]?norm|gnorm)\s*[:=]?\s*{grad_norm}"
    ),
}
