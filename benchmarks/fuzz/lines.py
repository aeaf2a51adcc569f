"""Which lines of the decoding files are reached."""

from pathlib import Path
from types import CodeType, FrameType

FOLDERS = ("/schemas/", "/broker_fl/codecs/", "/broker_fl/transports/parts.py", "/aggregator/admission.py")

Reached = dict[str, tuple[int, int]]
"""By file, of the functions that ran: lines that did, and all."""


class Lines:
    """A trace function, for sys.settrace."""

    def __init__(self) -> None:
        self.found = 0
        self._left: dict[CodeType, set[int]] = {}

    def __call__(self, at: FrameType, event: str, _: object) -> "Lines | None":
        code = at.f_code
        left = self._left.get(code)
        if left is None:
            left = self._left[code] = _lines_of(code)
        if not left:
            return None
        if event == "line" and at.f_lineno in left:
            left.discard(at.f_lineno)
            self.found += 1
        return self

    def reached(self) -> Reached:
        counts: Reached = {}
        for code, left in self._left.items():
            if lines := len(_lines_of(code)):
                file = "/".join(Path(code.co_filename).parts[-2:])
                ran, every = counts.get(file, (0, 0))
                counts[file] = (ran + lines - len(left), every + lines)
        return dict(sorted(counts.items()))


def _lines_of(code: CodeType) -> set[int]:
    """None outside the watched files."""
    if not any(folder in code.co_filename for folder in FOLDERS):
        return set()
    return {line for *_, line in code.co_lines() if line is not None and line != code.co_firstlineno}
