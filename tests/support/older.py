"""Settings for tests that also run over older versions of the product (`python -m tests.support.faults
--against REVISION`).
"""

from __future__ import annotations

from typing import Any

from guardrail.core.guard_options import GuardOptions

# These tests skip much of a tiny corpus. Older versions have no limit on that, and refuse the key.
NO_LIMIT: dict[str, Any] = (
    {"max_skipped_share": 1.0} if "max_skipped_share" in GuardOptions.__struct_fields__ else {}
)
