"""Small line charts as SVG: panels side by side, one line for each run, without a library."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#2563a8", "#c8451b", "#2e7d4f")  # told apart with each form of colour blindness, and in print
PANEL, HEIGHT, LEFT, TOP, BOTTOM, GAP = 300, 250, 46, 62, 34, 16
Curve = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """One chart.

    Attributes:
        title: What it shows.
        curves: Points `(step, value)` of each run, by the run's name; a run may be missing.
        limits: Lowest and highest value of the axis; what is beyond is drawn at the border.
    """

    title: str
    curves: Mapping[str, Curve]
    limits: tuple[float, float] = (0.0, 1.0)


def chart(title: str, panels: Sequence[Panel], horizontal: str = "optimizer steps") -> str:
    """A picture of some panels, whose runs have the same colours and one legend, as the text of an SVG file."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.curves))
    colours = dict(zip(names, COLOURS, strict=False))
    last = max(step for panel in panels for curve in panel.curves.values() for step, _ in curve)
    width = len(panels) * (PANEL + GAP)
    parts = [f'<rect width="{width}" height="{HEIGHT}" fill="white"/>']
    at = LEFT
    for name in names:
        parts.append(f'<path d="M{at} 18h22" stroke="{colours[name]}" stroke-width="3"/>{_text(at + 28, 22, name)}')
        at += 58 + 7 * len(name)
    for number, panel in enumerate(panels):
        drawn = _panel(panel, colours, last, horizontal)
        parts.append(f'<g transform="translate({number * (PANEL + GAP)} 0)">{drawn}</g>')
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" width="{width}" role="img"'
    font = 'font-family="system-ui, sans-serif" font-size="12" fill="none"'
    return "\n".join([f"{opening} {font}>", f"<title>{escape(title)}</title>", *parts, "</svg>", ""])


def _panel(panel: Panel, colours: Mapping[str, str], last: float, horizontal: str) -> str:
    """Axes, grid and lines of one panel."""
    low, high = panel.limits
    right, floor = PANEL, HEIGHT - BOTTOM

    def place(step: float, value: float) -> tuple[float, float]:
        inside = min(max(value, low), high)
        return LEFT + (right - LEFT) * step / last, floor - (floor - TOP) * (inside - low) / (high - low)

    parts = [_text(LEFT, TOP - 14, panel.title, weight="600")]
    for share in (0.0, 0.5, 1.0):
        value = low + share * (high - low)
        _, y = place(0, value)
        parts += [f'<path d="M{LEFT} {y:.1f}H{right}" stroke="#ddd"/>', _text(LEFT - 6, y + 4, f"{value:.3g}", "end")]
        parts.append(_text(place(share * last, low)[0], floor + 16, f"{share * last:.0f}", "middle"))
    parts.append(_text(LEFT + (right - LEFT) / 4, floor + 16, horizontal, "middle", colour="#777"))
    for name, curve in panel.curves.items():
        line = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in curve)
        parts.append(f'<polyline points="{line}" stroke="{colours[name]}" stroke-width="2" stroke-linejoin="round"/>')
    return "".join(parts)


def _text(x: float, y: float, words: str, anchor: str = "start", weight: str = "400", colour: str = "#333") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} font-weight="{weight}" fill="{colour}">{escape(words)}</text>'
