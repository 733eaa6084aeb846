"""The style sheet of a report."""

from __future__ import annotations

from dovetail.run.report.themes import (
    DARK,
    DARK_GRID,
    DARK_INK,
    DARK_PAPER,
    LIGHT,
    LIGHT_GRID,
    LIGHT_INK,
    LIGHT_PAPER,
    run_colors,
)

_RULES = """
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif;
       color: var(--ink); background: var(--paper); overflow-wrap: anywhere; }
h1, h2, h3 { line-height: 1.2; } h3 { margin: 0 0 .25rem; font-size: 1rem; }
.skip { position: absolute; left: -999rem; }
.skip:focus { position: static; }
a { color: inherit; }
:focus-visible { outline: 3px solid var(--focus); outline-offset: 2px; }
.panels, .media { display: grid; gap: 1.5rem 2rem;
                  grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); }
figure { margin: 0; min-width: 0; max-width: 32rem; }
figure svg, figure img { display: block; width: 100%; height: auto; }
figure svg text { font-family: system-ui, sans-serif !important; }
figcaption, .note { font-size: .875rem; }
.over-time { display: none; }
.curves:has(#axis-time:checked) .over-time { display: block; }
.curves:has(#axis-time:checked) .over-step { display: none; }
fieldset { border: 1px solid var(--grid); border-radius: .3rem; margin: 1rem 0;
           padding: .25rem .75rem; }
fieldset label { display: inline-block; padding: .4rem 1rem .4rem .2rem; }
.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .25rem 1.5rem; }
.swatch, .stroke { display: inline-block; width: 1.6rem; margin-right: .5rem;
                   vertical-align: .25em; border-top: .2rem solid currentColor; }
.stroke.val { border-top-style: dashed; } .stroke.test { border-top-style: dotted; }
.scroll { overflow-x: auto; margin: 1rem 0; }
.scroll table { width: max-content; overflow-wrap: normal; }
table { border-collapse: collapse; }
caption { text-align: left; font-weight: 600; padding-bottom: .25rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem 1.25rem .3rem 0;
         border-bottom: 1px solid var(--grid); min-width: 5rem; max-width: 24rem; }
tbody th { font-weight: 400; }
td { font-variant-numeric: tabular-nums; }
pre { overflow-x: auto; padding: .75rem; border: 1px solid var(--grid); font-size: .875rem; }
summary { cursor: pointer; padding: .4rem 0; }
@media (max-width: 700px) {
  .panels, .media { grid-template-columns: 1fr; }
  tbody th { max-width: 10rem; overflow-wrap: anywhere; } }
@media print { .scroll { overflow: visible; } }
"""


def style_sheet(num_runs: int) -> str:
    """Return the style sheet, with a colour for each run in light and dark."""
    light = _variables(LIGHT_INK, LIGHT_PAPER, LIGHT_GRID, "#0550ae", run_colors(num_runs, LIGHT))
    dark = _variables(DARK_INK, DARK_PAPER, DARK_GRID, "#79c0ff", run_colors(num_runs, DARK))
    return (
        f":root {{ color-scheme: light dark; {light} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}{_RULES}"
    )


def _variables(ink: str, paper: str, grid: str, focus: str, runs: tuple[str, ...]) -> str:
    colors = {"ink": ink, "paper": paper, "grid": grid, "focus": focus}
    colors.update({f"run-{number}": color for number, color in enumerate(runs)})
    return " ".join(f"--{name}: {color};" for name, color in colors.items())
