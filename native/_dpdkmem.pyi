# The compiled extension. cdata has no static type: the conversion to types of ours is native/__init__.py's work.
from __future__ import annotations

from typing import Any

ffi: Any
lib: Any
