"""The tests. Whoever imports them does without the package that tests/support/absent tells of."""

import sys

sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]
