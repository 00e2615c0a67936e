"""Places in the project's directory."""

from __future__ import annotations

from pathlib import Path

#: Directory of the project.
ROOT = Path(__file__).resolve().parents[2]
