"""Everything that crosses a process boundary, as frozen dataclasses. Knows no Ray, no torch and no HTTP."""
